"""The measurements of a run beside those of the run that it is held against; paired image by image where tables have images.

With aᵢ and bᵢ the values of image i in the two runs, the difference is their mean, mean(aᵢ − bᵢ), or, where images weigh
differently, the ratio of sums, Σ(aᵢ − bᵢ) / Σwᵢ. Its 95 % interval is the bootstrap over images.

Shape letters: b image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from regvit.report.compare import Measured
from regvit.stats import miou
from regvit.stats.bootstrap import mean_with_interval

RESAMPLES = 1000

Columns = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Value:
    """A figure with its 95 % interval and the number of images behind it; None where the metrics have none of them."""

    value: float
    lo: float | None = None
    hi: float | None = None
    n: int | None = None

    @property
    def side(self) -> int:
        """1 where the whole interval is above zero, −1 where it is below, else 0."""
        return 0 if self.lo is None or self.hi is None else (self.lo > 0) - (self.hi < 0)


@dataclass(frozen=True)
class Measurements:
    """Everything in metrics/ about a run.

    Args:
        run: what the comparison tables take.
        backbone: name of the run's backbone.
        found: `{stage: {dataset: metrics}}` of the measurements, as far as they were made.
        tables: `{(stage, dataset, name): columns}` of the tables beside them, cells as text.
    """

    run: Measured
    backbone: str
    found: Mapping[str, Mapping[str, Mapping]] = field(default_factory=dict)
    tables: Mapping[tuple[str, str, str], Columns] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def untouched(self) -> bool:
        """Whether the run is its backbone as it is, without registers of ours and without silenced neurons."""
        return self.run.registers == "none" and self.run.neurons == "selected"

    def of(self, stage: str, dataset: str, *path: str) -> Mapping:
        """Metrics of a stage, or of a part of them; empty where there are none."""
        values: object = self.found.get(stage, {}).get(dataset, {})
        for step in path:
            values = values.get(step) if isinstance(values, Mapping) else None
        return values if isinstance(values, Mapping) else {}


def value_of(values: Mapping, key: str, n: int | None = None) -> Value | None:
    """The figure `key` with `<key>_lo` and `<key>_hi`; None where the metrics lack it.

    Args:
        n: images behind it, where `values` have no `n` of their own.
    """
    if values.get(key) is None:
        return None
    return Value(values[key], values.get(f"{key}_lo"), values.get(f"{key}_hi"), values.get("n", n))


def datasets_of(runs: Sequence[Measurements], stage: str) -> list[str]:
    """Data sets for which some run has the stage's metrics, in their order."""
    return list(dict.fromkeys(name for run in runs for name in run.found.get(stage, {})))


def column_mean(run: Measurements, stage: str, dataset: str, column: str, seed: int = 0) -> Value | None:
    """Mean over images of a column of the table `images`; empty cells are left out, and None is returned where all are."""
    values = numbers(run.tables.get((stage, dataset, "images"), {}).get(column, ()))
    return value_of(mean_with_interval("mean", values, seed, RESAMPLES), "mean", int((~np.isnan(values)).sum()))


def paired_difference(
    a: Measurements, b: Measurements, stage: str, dataset: str, column: str, weight: str | None = None, seed: int = 0
) -> Value | None:
    """Run a minus run b over the images that the tables `images` of both have; None where they share no value.

    Args:
        column: one value an image; an empty cell is no value.
        weight: column to divide the sum of the differences by, the same in both runs; None: the images count alike.
        seed: of the bootstrap.
    """
    tables = [run.tables.get((stage, dataset, "images"), {}) for run in (a, b)]
    if any(column not in table or (weight and weight not in table) for table in tables):
        return None
    rows = [{image: i for i, image in enumerate(table["image_id"])} for table in tables]
    shared = [image for image in rows[0] if image in rows[1]]

    def values(name: str) -> list[Float[np.ndarray, " b"]]:
        return [numbers(table[name])[[row[image] for image in shared]] for table, row in zip(tables, rows, strict=True)]

    first, second = values(column) if shared else (np.empty(0), np.empty(0))
    if weight is None:
        gained = first - second
        found = mean_with_interval("difference", gained, seed, RESAMPLES)
        return value_of(found, "difference", int((~np.isnan(gained)).sum()))
    weights, others = values(weight) if shared else (np.empty(0), np.empty(0))
    if not np.array_equal(weights, others) or not weights.sum():  # counted on other patches: no pair
        return None
    gained, weights = (each[weights > 0] for each in (first - second, weights))
    draws = np.random.default_rng(seed).integers(len(gained), size=(RESAMPLES, len(gained)))
    low, high = np.percentile(gained[draws].sum(1) / weights[draws].sum(1), [2.5, 97.5])
    return Value(float(gained.sum() / weights.sum()), float(low), float(high), len(gained))


def paired_miou_difference(a: Measurements, b: Measurements, dataset: str, seed: int = 0) -> Value | None:
    """mIoU of run a minus that of run b over the images that both have; None where they share none, or their masks differ."""
    tables = [run.tables.get(("segment", dataset, "pixels"), {}) for run in (a, b)]
    if not all(tables):
        return None
    images = {image: i for i, image in enumerate(sorted(set(tables[0]["image_id"]) & set(tables[1]["image_id"])))}
    values = 1 + max(int(value) for table in tables for value in table["mask_value"])

    def counts(table: Columns) -> miou.ClassCounts:
        found = np.zeros((3, len(images), values), dtype=np.int64)
        columns = (table[name] for name in ("image_id", "mask_value", "right", "predicted", "actual"))
        for image, value, *pixels in zip(*columns, strict=True):
            if image in images:
                found[:, images[image], int(value)] = [int(cell) for cell in pixels]
        return miou.ClassCounts(*found)

    first, second = (counts(table) for table in tables)
    if not images or not np.array_equal(first.actual, second.actual):
        return None
    found = miou.paired_miou_difference(first, second, seed, RESAMPLES)
    return Value(found.value, found.lo, found.hi, found.n)


def numbers(cells: Sequence[str]) -> Float[np.ndarray, " b"]:
    """A column of numbers; nan where a cell is empty."""
    return np.array([float(cell) if cell else math.nan for cell in cells])
