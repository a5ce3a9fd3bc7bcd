"""What was measured, as the parameters say it, and the tables that the stages left of it.

Stages and sets are those of the parameters: what lies in metrics/ besides, of a set that was taken away, is not looked at.

Which run each run is held against (`references`):
A run with a cure has as reference the first run that is the same but for the cure. One that does something else to its
backbone's tokens (registers, or a control's neurons) has the first run of the same backbone that does nothing. A run on a
backbone that was planted or trained here, and does nothing to it, has the first such run of the same backbone as it came.
Others have none, unless one is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from regvit.stats.figures import KEYS, read_figures

MEASUREMENTS = (
    *("attention", "tokens", "token_classes", "discover", "discover_published", "segment", "depth"),
    *("hummingbird", "correspond", "retrieve", "zeroshot", "zeroshot_segment"),
)  # each for the sets that it names
AS_IT_CAME = {"plant": None, "train": None}  # of a backbone's entry
OOD, ANOMALIES = "ood", "anomalies"  # data sets that are several: images of all OOD sets; mean over the anomaly sets


@dataclass(frozen=True)
class Study:
    """The runs and what was measured of them.

    Args:
        runs: `{name: {backbone, registers, num_registers, neurons}}`, in the order of the tables.
        backbones, datasets, scenes: their entries in params.yaml, by name.
        in_distribution: the ID set.
        measured: data sets by measurement.
        zeroshot_runs: those that zero-shot classification and segmentation are of.
        detectors: of anomalies; the first one is shown.
        references: which run each run is held against.
        bases: readouts that the other readouts of a run are held against.
        readouts: rows of the tables about readouts; None: all that a run has.
        pairs: runs that are held against a second, third, … one, `(run, other)`.
        seed: of the bootstrap.
        folder: metrics/.
    """

    runs: Mapping[str, Mapping]
    backbones: Mapping[str, Mapping]
    datasets: Mapping[str, Mapping]
    scenes: Mapping[str, Mapping]
    in_distribution: str
    measured: Mapping[str, Sequence[str]]
    zeroshot_runs: Sequence[str] = ()
    detectors: Sequence[str] = ("msp",)
    references: Mapping[str, str] = field(default_factory=dict)
    bases: Sequence[str] = ("cls",)
    readouts: Sequence[str] | None = None
    pairs: Sequence[tuple[str, str]] = ()
    seed: int = 0
    folder: Path = Path("metrics")

    @classmethod
    def of(cls, params: Mapping, folder: Path = Path("metrics")) -> Study:
        """The study that parameters describe, as plain dictionaries (params.yaml, read or dumped)."""
        measured = {stage: tuple(params[stage]["datasets"]) for stage in MEASUREMENTS}
        named = {name: params[name] for name in ("runs", "backbones", "datasets", "scenes", "in_distribution", "seed")}
        return cls(
            **named,
            measured=measured,
            zeroshot_runs=tuple(params["zeroshot"]["runs"]),
            detectors=tuple(params["evaluate"]["detectors"]),
            references=references(params["runs"], params["backbones"], params["compare"]["references"]),
            bases=tuple(params["compare"].get("bases", cls.bases)),
            readouts=params["compare"].get("readouts"),
            pairs=tuple(map(tuple, params["compare"].get("pairs", ()))),
            folder=folder,
        )

    def held(self) -> list[tuple[str, str]]:
        """Every run and what it is held against: references first."""
        return list(dict.fromkeys([*self.references.items(), *self.pairs]))

    def sets(self, role: str) -> list[str]:
        """Data sets with a role: `id`, `ood` or `anomaly`."""
        return [name for name, entry in self.datasets.items() if entry["role"] == role]

    def untouched(self, run: str) -> bool:
        """Whether the run is its backbone as it is, without registers of ours, silenced neurons or a cure."""
        return _does_nothing(self.runs[run])

    def cure(self, run: str) -> str:
        """The name of the run's cure; empty where it has none."""
        cure = self.runs[run].get("cure") or ""
        return cure if isinstance(cure, str) else cure["name"]

    def neurons(self, run: str) -> str:
        """Whose work the registers take over: `selected`, or a control."""
        return self.runs[run].get("neurons") or "selected"

    def planted(self, backbone: str) -> bool:
        """Whether register neurons were put into it, so that the truth is known."""
        return self.backbones[backbone].get("plant") is not None

    def stages(self, run: str) -> Iterator[tuple[str, str]]:
        """(stage, data set) of each measurement of a run; what is of the ID set's images has no folder for it."""
        for stage in ("probe", "evaluate", "verify"):
            yield stage, self.in_distribution
        for stage, names in self.measured.items():
            if not stage.startswith("zeroshot") or run in self.zeroshot_runs:
                yield from ((stage, name) for name in names)

    def path(self, run: str, stage: str, dataset: str, file: str) -> Path:
        """Where a stage leaves a file of a run."""
        folder = self.folder / "runs" / run / stage
        return (folder / dataset if stage in MEASUREMENTS else folder) / file

    def table(self, run: str, stage: str, dataset: str, name: str) -> pd.DataFrame:
        """A table beside the figures; empty where the stage did not measure the run, or leaves no such table."""
        path = self.path(run, stage, dataset, f"{name}.csv")
        return read_table(path) if (stage, dataset) in self.stages(run) and path.is_file() else pd.DataFrame()

    def search(self, backbone: str, name: str) -> pd.DataFrame:
        """A table of the search for register neurons."""
        return read_table(existing(self.folder / "backbones" / backbone / f"{name}.csv"))


def references(
    runs: Mapping[str, Mapping], backbones: Mapping[str, Mapping], chosen: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Which run each run is held against; runs without a reference are left out.

    Args:
        runs: `{name: {backbone, registers, neurons?, cure?}}`, in their order.
        backbones: `{name: {…, plant?, train?}}`.
        chosen: reference by run, where it shall be another.
    Raises:
        ValueError: a chosen run does not exist, or a run is its own reference.
    """
    found = {}
    untouched = [name for name, run in runs.items() if _does_nothing(run)]
    for name, run in runs.items():
        backbone = backbones[run["backbone"]]
        as_it_came = {**backbone, **AS_IT_CAME}
        candidates = []
        if run.get("cure"):
            candidates = [other for other, each in runs.items() if {"cure": None} | each == {**run, "cure": None}]
        elif name not in untouched and not _trained_here(run, backbone):
            candidates = [other for other in untouched if runs[other]["backbone"] == run["backbone"]]
        elif AS_IT_CAME | backbone != as_it_came:
            candidates = [other for other in untouched if AS_IT_CAME | backbones[runs[other]["backbone"]] == as_it_came]
        if candidates:
            found[name] = candidates[0]
    for name, other in (chosen or {}).items():
        if strange := [each for each in (name, other) if each not in runs]:
            raise ValueError(f"compare.references names the run {strange[0]!r}; there are {', '.join(runs)}")
        if name == other:
            raise ValueError(f"compare.references holds the run {name!r} against itself; name another")
        found[name] = other
    return {name: found[name] for name in runs if name in found}


def _trained_here(run: Mapping, backbone: Mapping) -> bool:
    """Whether the run's registers, if any, are those that its backbone was trained with here."""
    return run["registers"] == "trained" and backbone.get("train") is not None


def _does_nothing(run: Mapping) -> bool:
    return run["registers"] == "none" and (run.get("neurons") or "selected") == "selected" and not run.get("cure")


class Value(NamedTuple):
    """A figure, its 95 % interval and the number of images behind it, as far as there are any."""

    value: float
    lo: float | None = None
    hi: float | None = None
    n: int | None = None

    @property
    def side(self) -> int:
        """1 where the whole interval is above zero, −1 where it is below, else 0."""
        return 0 if self.lo is None or self.hi is None else (self.lo > 0) - (self.hi < 0)


def all_figures(study: Study) -> pd.DataFrame:
    """Every figure of every run and backbone, a row each, with the stage in front of the columns of `stats.figures`.

    Raises:
        FileNotFoundError: a stage has not run; the message says which file is missing.
    """
    parts = []
    for backbone in study.backbones:
        parts.append(("identify", study.folder / "backbones" / backbone / "figures.csv"))
    for run in study.runs:
        parts += [(stage, study.path(run, stage, dataset, "figures.csv")) for stage, dataset in study.stages(run)]
    tables = [read_figures(existing(path)).assign(stage=stage) for stage, path in parts]
    joined = pd.concat(tables, ignore_index=True)
    return joined[["stage", *joined.columns.drop("stage")]]


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file; an `image_id` is text, though it may look like a number."""
    return pd.read_csv(path, dtype={"image_id": str})


def read_compared(path: Path) -> pd.DataFrame:
    """One of the two tables of `compare`; empty keys are empty texts."""
    keys = ["stage", *KEYS, "reference", "reference_readout"]
    table = pd.read_csv(existing(path), dtype=dict.fromkeys(keys, str))
    return table.fillna({name: "" for name in keys if name in table.columns})


def existing(path: Path) -> Path:
    """The path of a file that a stage must have left."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: run `dvc repro` first")
    return path
