"""The figures and paired differences of a study, looked up by what they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from regvit.report.catalogue import METRICS
from regvit.report.study import Study, Value, all_figures, read_compared


class Place(NamedTuple):
    """What a figure is of; what does not apply is empty."""

    stage: str
    metric: str
    dataset: str
    readout: str = ""
    classifier: str = ""
    detector: str = ""


@dataclass(frozen=True)
class Results:
    """Every figure by run (or backbone) and place, and every difference by run, what it is held against, and place.

    Args:
        figures: `{(run, place): value}`.
        differences: `{(run, reference, reference readout, place): value}`; its place has the run's own readout.
    """

    study: Study
    figures: Mapping[tuple, Value]
    differences: Mapping[tuple, Value]

    @classmethod
    def of(cls, study: Study, figures: pd.DataFrame, differences: pd.DataFrame | None = None) -> Results:
        found, changes = {}, {}
        for row in figures.dropna(subset="value").itertuples():  # without those where there was nothing to measure at
            found[row.run, _place(row)] = Value(row.value, *_interval(row))
        for row in () if differences is None else differences.itertuples():
            key = (row.run, row.reference, row.reference_readout, _place(row))
            changes[key] = Value(row.difference, *_interval(row))
        return cls(study, found, changes)

    @classmethod
    def read(cls, study: Study) -> Results:
        """From what `compare` left; figures of runs that the parameters do not have any more are not in it."""
        folder = study.folder / "compare"
        return cls.of(study, read_compared(folder / "figures.csv"), read_compared(folder / "differences.csv"))

    @classmethod
    def measured(cls, study: Study) -> Results:
        """From the stages' own tables, without differences."""
        return cls.of(study, all_figures(study))

    def value(self, run: str, place: Place) -> Value | None:
        return self.figures.get((run, place))

    def change(self, run: str, place: Place, base: str | None = None) -> Value | None:
        """Difference to the run's reference, same readout; or, with a base, to that readout of the run itself."""
        reference = run if base else self.study.references.get(run, "")
        return self.differences.get((run, reference, base or place.readout, place))

    def places(self, stage: str, dataset: str | None = None) -> list[Place]:
        """What a stage measured, in the order of the catalogue, each once; of one data set, if it is given."""
        names = list(METRICS[stage])
        found = dict.fromkeys(place for _, place in self.figures if place.stage == stage and place.metric in names)
        shown = (place for place in found if dataset in (None, place.dataset))
        return sorted(shown, key=lambda place: names.index(place.metric))

    def readouts(self, run: str) -> list[str]:
        """Readouts that a run was evaluated with."""
        places = (place for name, place in self.figures if name == run and place.stage == "evaluate")
        return list(dict.fromkeys(place.readout for place in places if place.readout))

    def top1(self, readout: str, dataset: str, classifier: str = "linear") -> Place:
        return Place("evaluate", "top1", dataset, readout, classifier)

    def anomaly(self, metric: str, dataset: str, readout: str = "cls", detector: str | None = None) -> Place:
        """A figure of a detector (the first one unless told otherwise)."""
        return Place("evaluate", metric, dataset, readout, "", detector or self.study.detectors[0])

    def searched(self, backbone: str, metric: str) -> float | None:
        """A figure of the search for register neurons."""
        value = self.value(backbone, Place("identify", metric, self.study.in_distribution))
        return None if value is None else value.value

    def verified(self, run: str, metric: str) -> Value | None:
        """A figure of the run on held-out images."""
        return self.value(run, Place("verify", metric, self.study.in_distribution))

    def outliers(self, run: str) -> Value | None:
        """Share of held-out patches that are outliers in the run's own model; None where its backbone shows none."""
        shown = self.searched(self.study.runs[run]["backbone"], "outliers_found")
        return self.verified(run, "outlier_fraction") if shown else None


def _place(row) -> Place:
    classifier = "" if row.detector else row.classifier  # detectors see the linear probe, if any
    return Place(row.stage, row.metric, row.dataset, row.readout, classifier, row.detector)


def _interval(row) -> tuple[float | None, float | None, int | None]:
    """Both ends and the number of images, as far as they are there."""
    lo, hi, n = (None if pd.isna(value) else value for value in (row.lo, row.hi, row.n))
    return lo, hi, None if n is None else int(n)
