"""Figures in long format: one row a figure, with its interval, so that every table, picture and comparison reads the same files.

A measurement leaves `figures.csv` with the columns below. What does not apply to a figure (a detector, say) stays empty.
Values are fractions, not per cent, and have six digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from regvit.files import write_text
from regvit.stats.intervals import Estimate

COLUMNS = ("run", "dataset", "readout", "classifier", "detector", "metric", "value", "lo", "hi", "n")
KEYS = COLUMNS[:6]
DIFFERENCE_COLUMNS = (
    "run", "reference", "dataset", "readout", "reference_readout", "classifier", "detector", "metric",
    "difference", "lo", "hi", "p", "n",
)  # fmt: skip  # of tables of paired differences: run minus reference
DIGITS = 6


@dataclass(frozen=True)
class Figure:
    """One figure of a run.

    Args:
        metric: its name, such as `top1` or `rmse_at_outliers`.
        value: fraction, or in the metric's own unit; None where there was nothing to measure at.
        lo, hi: 95 % interval, if it has one.
        n: images (or what else was counted) behind it.
    """

    metric: str
    value: float | None
    lo: float | None = None
    hi: float | None = None
    n: int | None = None
    readout: str = ""
    classifier: str = ""
    detector: str = ""

    @classmethod
    def of(cls, metric: str, found: Estimate | None, **keys: str) -> Figure:
        """From an estimate; None: there was nothing to measure at."""
        values = (None, None, None, None) if found is None else (found.value, found.lo, found.hi, found.n)
        return cls(metric, *values, **keys)


def figures_table(figures: Iterable[Figure], run: str, dataset: str) -> pd.DataFrame:
    """The figures of a run on a data set as a table with `COLUMNS`."""
    table = pd.DataFrame(
        [{"run": run, "dataset": dataset} | asdict(figure) for figure in figures], columns=list(COLUMNS)
    )
    return table.astype({"value": float, "lo": float, "hi": float, "n": "Int64"})


def write_csv(path: Path | str, table: pd.DataFrame) -> None:
    """A table whose numbers have six digits, empty where there is no value; its folder is made if missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, table.to_csv(index=False, float_format=f"%.{DIGITS}g"))


def write_figures(path: Path | str, *tables: pd.DataFrame) -> None:
    """Tables of `figures_table`, one below the other, as a CSV file."""
    write_csv(path, pd.concat(tables) if tables else figures_table((), "", ""))


def read_figures(path: Path | str) -> pd.DataFrame:
    """A file of `write_figures`; empty keys are empty texts, missing numbers NaN.

    Raises:
        ValueError: the file has other columns.
    """
    table = pd.read_csv(path, dtype=dict.fromkeys(KEYS, str) | {"n": "Int64"}, keep_default_na=True)
    if tuple(table.columns) != COLUMNS:
        raise ValueError(
            f"{path} has the columns {', '.join(table.columns)}, expected {', '.join(COLUMNS)}; run its stage again"
        )
    return table.fillna(dict.fromkeys(KEYS, ""))
