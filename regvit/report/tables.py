"""A table for people, made once and shown in a terminal, in Markdown, and (by the page's template) in HTML."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
from tabulate import tabulate

from regvit.report.catalogue import Metric
from regvit.report.study import Value

MARKS = {1: "▲", -1: "▼", 0: ""}
NONE = "–"


class Cell(NamedTuple):
    """A figure in a table: `62.2`, `[57.5–66.6]`, `▲`; the last two as far as there are any."""

    text: str
    interval: str = ""
    mark: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in self if part)


@dataclass(frozen=True)
class Table:
    """A frame whose cells are texts or `Cell`s, under a title; `note` is said below."""

    title: str
    frame: pd.DataFrame
    note: str = ""

    @classmethod
    def of(cls, title: str, header: Sequence[str], rows: Sequence[Sequence], note: str = "") -> Table:
        """From rows as long as the header; without rows there is nothing to note."""
        return cls(title, pd.DataFrame(list(rows), columns=list(header), dtype=object), note if rows else "")

    def __bool__(self) -> bool:
        return not self.frame.empty

    def text(self) -> str:
        """For a terminal, in columns."""
        return "\n".join([self.title, self._drawn("simple"), *textwrap.wrap(self.note, 120)])

    def markdown(self) -> str:
        """For the README and comments."""
        table = self._drawn("pipe")
        return f"{table}\n\n{self.note}" if self.note else table

    @property
    def kinds(self) -> list[str]:
        """Of each column: `v` figures with intervals or marks, `n` figures, `t` text. Figures stand to the right."""
        kinds = []
        for _, column in self.frame.items():
            figures = [cell for cell in column if isinstance(cell, Cell)]
            kinds.append("t" if not figures else "v" if any(each.interval or each.mark for each in figures) else "n")
        return kinds

    def _drawn(self, style: str) -> str:
        shown = self.frame.map(lambda cell: str(cell).replace("|", r"\|") if style == "pipe" else str(cell))
        sides = ["left" if kind == "t" else "right" for kind in self.kinds]
        rows, header = shown.to_numpy().tolist(), list(shown.columns)
        return tabulate(rows, header, style, colalign=sides, disable_numparse=True, preserve_whitespace=True)


def show(value: Value | None, metric: Metric, mark: int = 0) -> Cell | str:
    """`65.2 [61.0–69.1] ▲`, or `–`."""
    if value is None:
        return NONE
    middle, low, high = (None if v is None else number(metric.scale * v, metric.digits) for v in value[:3])
    if low is None or high is None:
        return Cell(middle, "", MARKS[mark])
    return Cell(middle, f"[{low}{', ' if low.startswith('−') else '–'}{high}]", MARKS[mark])


def show_change(value: Value | None, metric: Metric) -> Cell | str:
    """`+1.2 [−0.3, +2.7]` and its mark, or `–`."""
    if value is None:
        return NONE
    middle, low, high = (None if v is None else number(metric.scale * v, metric.digits, signed=True) for v in value[:3])
    return Cell(middle, "" if low is None else f"[{low}, {high}]", MARKS[metric.better * value.side])


def number(value: float, digits: int, signed: bool = False) -> str:
    """With a minus sign of its own width; `±0.0` where a signed one rounds to zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return ("±" if signed else "") + text
    return ("−" if value < 0 else "+" if signed else "") + text
