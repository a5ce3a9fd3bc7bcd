"""Pairs of images of a data set whose points are known to show the same: `pairs.csv` beside the manifest.

A row a pair: `first` and `second` (image ids), `category`, `tolerance` (pixels of the second image within which a match
is right; empty: a patch), and `points`, a JSON list of [x, y, x', y'] in pixels of the two images as they are on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from regvit.files import write_text

FILE = "pairs.csv"
COLUMNS = ("first", "second", "category", "tolerance", "points")
DIGITS = 3  # after the point of a pixel


@dataclass(frozen=True)
class Pair:
    """Two images with points that show the same.

    Attributes:
        first, second: image ids.
        points: x, y in the first image and x, y in the second, pixels; whole numbers are edges of pixels.
        category: "" where there are none.
        tolerance: pixels of the second image within which a match is right; None: a patch.
    """

    first: str
    second: str
    points: Float[np.ndarray, "m 4"]
    category: str = ""
    tolerance: float | None = None

    @property
    def name(self) -> str:
        return f"{self.first}>{self.second}"


def write_pairs(folder: Path, pairs: Iterable[Pair]) -> None:
    """`pairs.csv` of a data set."""
    rows = [
        (pair.first, pair.second, pair.category, pair.tolerance, json.dumps(pair.points.round(DIGITS).tolist()))
        for pair in pairs
    ]
    write_text(folder / FILE, pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False))


def read_pairs(folder: Path) -> list[Pair]:
    """The pairs of a data set.

    Raises:
        FileNotFoundError: it has none.
        ValueError: the file has other columns, or a pair has points that are not four numbers each.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: take a data set with pairs (relief, spair:<folder>)")
    table = pd.read_csv(path, dtype={"first": str, "second": str, "category": str}, keep_default_na=False)
    if tuple(table.columns) != COLUMNS:
        raise ValueError(f"{path} has the columns {', '.join(table.columns)}, expected {', '.join(COLUMNS)}")
    pairs = []
    for row in table.itertuples():
        points = np.array(json.loads(row.points), dtype=float)
        if points.ndim != 2 or points.shape[1] != 4 or not np.isfinite(points).all():
            raise ValueError(f"{path}: the points of {row.first} and {row.second} are not [[x, y, x', y'], …]")
        tolerance = None if row.tolerance == "" else float(row.tolerance)
        pairs.append(Pair(row.first, row.second, points, row.category, tolerance))
    return pairs
