"""What every measurement leaves: figures with their intervals, and a table with one value an image, by which runs are paired."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import t

from regvit.stats.bootstrap import mean_over_images
from regvit.stats.figures import Figure, figures_table, write_csv, write_figures


def mean_figures(columns: Mapping[str, Float[np.ndarray, " b"]], seed: int = 0) -> list[Figure]:
    """Mean of each column with its interval; nan where an image has no value, and then it is left out."""
    return [Figure.of(metric, mean_over_images(values, seed)) for metric, values in columns.items()]


def image_means(values: Float[np.ndarray, "b p"], chosen: Bool[np.ndarray, "b p"]) -> Float[np.ndarray, " b"]:
    """Mean over the chosen patches of each image; nan where none is chosen."""
    count = chosen.sum(1)
    total = np.where(chosen, values, 0).sum(1, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def write_images(path: Path, image_ids: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
    """`images.csv`: one row an image, one column a metric."""
    write_csv(path, pd.DataFrame({"image_id": image_ids, **columns}))


def write_results(
    folder: Path, run: str, dataset: str, figures: Iterable[Figure], image_ids: Sequence[str], columns: Mapping
) -> None:
    """`figures.csv` and `images.csv` of a measurement on one data set."""
    write_figures(folder / "figures.csv", figures_table(figures, run, dataset))
    write_images(folder / "images.csv", image_ids, columns)


def means_with_intervals(values: Float[np.ndarray, "b ..."]) -> Float[np.ndarray, "3 ..."]:
    """Mean over images and the ends of its 95 % t interval, of many columns at once; nan left out."""
    n = (~np.isnan(values)).sum(0)
    with warnings.catch_warnings():  # columns in which no image has a value
        warnings.simplefilter("ignore", RuntimeWarning)
        mean, sd = np.nanmean(values, axis=0), np.nanstd(values, axis=0, ddof=1)
        half = t.ppf(0.975, n - 1) * sd / np.sqrt(n)
    return np.stack([mean, mean - half, mean + half])
