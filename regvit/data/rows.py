"""The rows of a manifest, held in columns: some 200 bytes an image, where an object each would take a kilobyte."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import overload

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.api.extensions import ExtensionArray

PART = 1 << 16  # rows that are handled at once, so that a million of them never lie in memory as Python objects


@dataclass(frozen=True, slots=True)
class Row:
    """One image.

    Attributes:
        image_id: unique within the data set.
        path: of the image, relative to the root of the data set, with forward slashes.
        label: class name, or "" where the image has none.
        split: "train", "val" or "test".
        boxes: JSON list of [x0, y0, x1, y1] in pixels (x1, y1 exclusive), or "".
        mask: path, relative to the root, of a PNG with class index + 1 at each pixel and 0 for background, or "".
        sha256: of the image file's bytes (hex), or "". With it the manifest's digest covers the images as well.
        depth: path, relative to the root, of a 16-bit PNG with the depth in millimetres at each pixel and 0 where it is
            unknown, or "".
    """

    image_id: str
    path: str
    label: str
    split: str
    boxes: str = ""
    mask: str = ""
    sha256: str = ""
    depth: str = ""


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
REPEATED = pa.dictionary(pa.int32(), pa.large_string())
SCHEMA = pa.schema({name: REPEATED if name in ("label", "split") else pa.large_string() for name in COLUMNS})


class Rows(Sequence[Row]):
    """Rows that do not change, in columns: a pandas table of Arrow strings, some 200 bytes an image.

    A part of them (a slice, a split, a sample) shares the table and adds 8 bytes a row.
    """

    __hash__ = None  # it would have to be that of the tuple, which takes what is saved here

    def __init__(self, rows: Iterable[Row] | pd.DataFrame = (), places: np.ndarray | None = None):
        self._table = rows if isinstance(rows, pd.DataFrame) else table_of(_parts(rows))
        self._columns = {name: self._table[name].array for name in COLUMNS}
        self._places = places  # numbers of the table's rows; None: all of them

    def __len__(self) -> int:
        return len(self._table) if self._places is None else len(self._places)

    @overload
    def __getitem__(self, which: int) -> Row: ...
    @overload
    def __getitem__(self, which: slice) -> Rows: ...
    def __getitem__(self, which):
        if isinstance(which, slice):
            return self.select(np.arange(len(self))[which])
        place = range(len(self))[which]
        place = place if self._places is None else self._places[place]
        return Row(*[column[place] for column in self._columns.values()])

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), PART):
            part = self.select(np.arange(start, min(start + PART, len(self))))
            yield from map(Row, *(part.column(name).to_numpy(dtype=object) for name in COLUMNS))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows | tuple):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __reduce__(self) -> tuple:
        """Only the rows of a part are sent to another process, not all of its table."""
        return Rows, (self.table(),)

    def table(self) -> pd.DataFrame:
        """The rows as a table of their own."""
        return self._table if self._places is None else self._table.iloc[self._places].reset_index(drop=True)

    def select(self, which: Sequence[int] | np.ndarray) -> Rows:
        """Some of the rows by their numbers, in the order given.

        Raises:
            IndexError: a number is out of range.
        """
        places = np.arange(len(self)) if self._places is None else self._places
        return Rows(self._table, places[np.asarray(which, dtype=np.intp)])

    def column(self, name: str) -> ExtensionArray:
        """The texts of one column; `label` and `split` are a pandas Categorical.

        Raises:
            KeyError: there is no such column.
        """
        column = self._columns[name]
        return column if self._places is None else column.take(self._places)


class RowList:
    """Rows that more are added to, held in columns."""

    def __init__(self):
        self._parts: list[dict[str, pa.Array]] = []
        self._last: list[Row] = []

    def __len__(self) -> int:
        return sum(len(part["split"]) for part in self._parts) + len(self._last)

    def append(self, row: Row) -> None:
        """One row more."""
        self._last.append(row)
        if len(self._last) == PART:
            self._parts.append(_columns(self._last))
            self._last = []

    def rows(self) -> Rows:
        """The rows as they are now."""
        return Rows(table_of([*self._parts, _columns(self._last)]))


def table_of(parts: Iterable[Mapping[str, pa.Array]]) -> pd.DataFrame:
    """One table of the columns of its parts; where paths are the ids, as of files read in place, their texts are shared."""
    tables = [SCHEMA.empty_table()]
    for part in parts:
        shared = {"path": part["image_id"]} if part["path"].equals(part["image_id"]) else {}
        tables.append(pa.table({**part, **shared}, SCHEMA))
    return pa.concat_tables(tables).to_pandas()


def _columns(rows: Sequence[Row]) -> dict[str, pa.Array]:
    return {name: pa.array([getattr(row, name) for row in rows], SCHEMA.field(name).type) for name in COLUMNS}


def _parts(rows: Iterable[Row]) -> Iterator[dict[str, pa.Array]]:
    rows = iter(rows)
    while part := list(islice(rows, PART)):
        yield _columns(part)
