"""Paired differences between runs: a figure of one run minus the same figure of another, on the same images.

With aᵢ and bᵢ the values of image i in the two runs, the difference is their mean, mean(aᵢ − bᵢ), or, where images weigh
differently, Σ wᵢ(aᵢ − bᵢ) / Σ wᵢ. Its 95 % interval is the bootstrap over images.

Shape letters: b image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from regvit.report.study import MEASUREMENTS, Study
from regvit.stats import miou
from regvit.stats.bootstrap import paired_mean_difference
from regvit.stats.figures import DIFFERENCE_COLUMNS, write_csv
from regvit.stats.intervals import Difference

COLUMNS = ("stage", *DIFFERENCE_COLUMNS)
OF_PROBES = ("readout", "reference_readout", "classifier", "detector")  # do not apply here
RESAMPLES = 1000
PAIRED_STAGES = ("verify", *MEASUREMENTS)


def difference_rows(study: Study) -> pd.DataFrame:
    """Every run against its references, in all figures that have a value an image."""
    rows = [row for run, reference in study.held() for row in image_differences(study, run, reference)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def write_compared(path: Path | str, table: pd.DataFrame) -> None:
    """One of the two tables of `compare` as a CSV file; what is of predictions is of the stage `evaluate`."""
    write_csv(path, table.assign(stage=table["stage"].fillna("evaluate")))


def image_differences(study: Study, run: str, reference: str, other: Study | None = None) -> Iterator[dict]:
    """A row for each figure that both runs have image by image.

    Args:
        other: where the reference lies, if it is of another experiment.
    """
    other = other or study
    for stage, dataset in study.stages(run):
        if stage not in PAIRED_STAGES or (stage, dataset) not in other.stages(reference):
            continue
        keys = {"stage": stage, "run": run, "reference": reference, "dataset": dataset} | dict.fromkeys(OF_PROBES, "")
        tables = (study.table(run, stage, dataset, "images"), other.table(reference, stage, dataset, "images"))
        if not any(table.empty for table in tables):
            same_places = study.runs[run]["backbone"] == other.runs[reference]["backbone"]
            for metric in _metrics(study, run, stage, dataset):
                if same_places or not at_outliers(stage, metric):
                    yield from _row(keys, metric, paired_mean(*tables, metric, study.seed))
        pixels = (study.table(run, stage, dataset, "pixels"), other.table(reference, stage, dataset, "pixels"))
        if not any(table.empty for table in pixels):
            yield from _row(keys, "miou", paired_miou(*pixels, study.seed))


def at_outliers(stage: str, metric: str) -> bool:
    """Whether a figure is of the places of outliers, which are others in another backbone."""
    beside = metric in ("class_top1_normal_beside", "class_top1_difference")
    return stage == "tokens" or beside or ("outlier" in metric and stage != "verify")


def paired_mean(first: pd.DataFrame, second: pd.DataFrame, metric: str, seed: int = 0) -> Difference | None:
    """First minus second over the images for which both tables have a value; None where there are none, or where their
    weights (column `<metric>_weight`) differ."""
    if metric not in first or metric not in second:
        return None
    weight = f"{metric}_weight"
    names = [metric, weight] if weight in first and weight in second else [metric]
    a, b = (table.set_index("image_id")[names] for table in (first, second))
    if not a.index.equals(b.index):
        shared = a.index[a.index.isin(b.index)]
        a, b = a.loc[shared], b.loc[shared]
    a, b = a.to_numpy(float), b.to_numpy(float)
    known = ~np.isnan(np.hstack([a, b])).any(1)
    a, b = a[known], b[known]
    if len(names) == 1:
        return paired_mean_difference(a[:, 0], b[:, 0], seed=seed)
    weights = a[:, 1]
    if not np.array_equal(weights, b[:, 1]) or not weights.sum():  # counted on other patches: no pair
        return None
    gained = a[:, 0] - b[:, 0]
    return _weighted_mean(gained[weights > 0], weights[weights > 0], seed)


def paired_miou(first: pd.DataFrame, second: pd.DataFrame, seed: int = 0) -> Difference | None:
    """mIoU of the first table of pixels minus that of the second, over the images that both have; None where they share
    none, or their masks differ."""
    images = sorted(set(first["image_id"]) & set(second["image_id"]))
    values = 1 + max(int(table["mask_value"].max()) for table in (first, second))
    counts = [_class_counts(table, images, values) for table in (first, second)]
    if not images or not np.array_equal(counts[0].actual, counts[1].actual):
        return None
    return miou.paired_miou_difference(*counts, seed, RESAMPLES)


def _weighted_mean(gained: Float[np.ndarray, " b"], weights: Float[np.ndarray, " b"], seed: int) -> Difference:
    draws = np.random.default_rng(seed).integers(len(gained), size=(RESAMPLES, len(gained)))
    drawn = (gained * weights)[draws].sum(1) / weights[draws].sum(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + RESAMPLES))
    return Difference(float(np.average(gained, weights=weights)), float(low), float(high), float(p), len(gained))


def _class_counts(table: pd.DataFrame, images: list[str], values: int) -> miou.ClassCounts:
    table = table[table["image_id"].isin(images)]
    places = (pd.Index(images).get_indexer(table["image_id"]), table["mask_value"].to_numpy(int))

    def counts(column: str) -> Int[np.ndarray, "b c"]:
        found = np.zeros((len(images), values), dtype=np.int64)
        found[places] = table[column]
        return found

    return miou.ClassCounts(counts("right"), counts("predicted"), counts("actual"))


def _metrics(study: Study, run: str, stage: str, dataset: str) -> list[str]:
    """The figures of a run that may have a value an image; mIoU has its own way."""
    figures = study.table(run, stage, dataset, "figures")
    return [name for name in dict.fromkeys(figures["metric"]) if name != "miou"]


def _row(keys: dict, metric: str, found: Difference | None) -> Iterator[dict]:
    if found is not None:
        yield keys | {
            "metric": metric,
            "difference": found.value,
            "lo": found.lo,
            "hi": found.hi,
            "p": found.p,
            "n": found.n,
        }
