"""The rows of a manifest, held in columns: some hundred bytes an image, where an object each would take a kilobyte.

`Rows` is a sequence of `Row`, of which each is made when it is asked for. Beneath it are

- `label` and `split`: a number a row, and the distinct texts;
- the other columns: their texts one after the other, and where each ends; a path that is also the image's id is not
  held twice, and a SHA-256 in hex is held as its 32 bytes.

Parts of it (a slice, a split, a sample) share the columns, and add 8 bytes a row.
"""

import dataclasses
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from jaxtyping import Int

SHA256 = re.compile("[0-9a-f]{64}")
DIGEST, EMPTY = b"\xff", b"\xfe"  # how what is held begins where it is no text: UTF-8 has neither byte


@dataclass(frozen=True)
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
REPEATED = ("label", "split")  # columns of few distinct texts


class Rows(Sequence[Row]):
    """Rows that do not change: like a tuple of them, and equal to one that has the same.

    Args:
        rows: in their order.
    """

    __hash__ = None  # it would have to be that of the tuple, which takes what is saved here

    def __init__(self, rows: Iterable[Row] = ()):
        self._columns = _Columns()
        for row in rows:
            self._columns.append([getattr(row, name) for name in COLUMNS])
        self._places: range | Int[np.ndarray, " b"] = range(len(self._columns))

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Rows":
        """These rows as they are now: the columns of a `RowList` are shared, and not what is added to it later."""
        return rows[:] if isinstance(rows, Rows) else Rows(rows)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, which: int) -> Row: ...
    @overload
    def __getitem__(self, which: slice) -> "Rows": ...
    def __getitem__(self, which):
        if isinstance(which, slice):
            return _part(self._columns, self._places[which])
        return self._columns.row(int(self._places[which]))

    def __iter__(self) -> Iterator[Row]:
        return map(self._columns.row, _each(self._places))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows | tuple):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __repr__(self) -> str:
        shown = ", ".join(repr(row) for row in self[:3])
        return f"{type(self).__name__}([{shown}{', …' if len(self) > 3 else ''}], {len(self)} rows)"

    def __reduce__(self) -> tuple:
        """Only the rows of a part are sent to another process, not all that its columns hold."""
        columns = self._columns if self._is_whole() else Rows(self)._columns
        return _part, (columns, range(len(self)))

    def select(self, which: Sequence[int] | Int[np.ndarray, " n"]) -> "Rows":
        """Some of the rows by their numbers, in the order given.

        Raises:
            IndexError: a number is out of range.
        """
        return _part(self._columns, self._place_array()[np.asarray(which, dtype=np.intp)])

    def column(self, name: str) -> "Column":
        """The texts of one column, without making rows of them.

        Raises:
            KeyError: there is no such column.
        """
        return Column(self._columns[name].get, self._places)

    def codes(self, name: str) -> tuple[Int[np.ndarray, " b"], tuple[str, ...]]:
        """`label` or `split` of each row as a number, and the texts that the numbers stand for.

        Some of the texts may be those of rows that are not in this part.

        Raises:
            ValueError: another column.
        """
        if name not in REPEATED:
            raise ValueError(f"column {name!r} is not held as numbers; expected one of {', '.join(REPEATED)}")
        codes, texts = self._columns[name].codes()
        return (codes if self._is_whole() else codes[self._place_array()]), texts

    def _is_whole(self) -> bool:
        return isinstance(self._places, range) and self._places == range(len(self._columns))

    def _place_array(self) -> Int[np.ndarray, " b"]:
        places = self._places
        return np.arange(places.start, places.stop, places.step) if isinstance(places, range) else places


class RowList(Rows):
    """Rows that more can be added to."""

    def append(self, row: Row) -> None:
        """One row more."""
        self.put([getattr(row, name) for name in COLUMNS])

    def put(self, values: Sequence[str]) -> None:
        """One row more, by its values in the order of `COLUMNS`."""
        self._columns.append(values)
        self._places = range(len(self._columns))


class Column(Sequence[str]):
    """The texts of one column of some rows; each is made when it is asked for."""

    def __init__(self, get: Callable[[int], str], places: range | Int[np.ndarray, " b"]):
        self._get, self._places = get, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> "Column": ...
    def __getitem__(self, which):
        if isinstance(which, slice):
            return Column(self._get, self._places[which])
        return self._get(int(self._places[which]))

    def __iter__(self) -> Iterator[str]:
        return map(self._get, _each(self._places))


def _each(places: range | Int[np.ndarray, " b"]) -> Iterable[int]:
    return places if isinstance(places, range) else map(int, places)


def _part(columns: "_Columns", places: range | Int[np.ndarray, " b"]) -> Rows:
    """The rows that stand at these places of the columns."""
    rows = Rows.__new__(Rows)
    rows._columns, rows._places = columns, places
    return rows


class _Columns:
    """All columns of some rows; rows can be added."""

    def __init__(self):
        ids = _Texts()
        made = {"image_id": ids, "path": _Paths(ids), "label": _Repeated(), "split": _Repeated()}
        self._of_name = {name: made.get(name) or _Texts() for name in COLUMNS}
        self._all = tuple(self._of_name.values())
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, name: str) -> "_Texts | _Repeated":
        return self._of_name[name]

    def append(self, values: Sequence[str]) -> None:
        for column, text in zip(self._all, values, strict=True):
            column.put(self._n, text)
        self._n += 1

    def row(self, place: int) -> Row:
        return Row(*[column.get(place) for column in self._all])


class _Texts:
    """Texts of which few are alike: their UTF-8 one after the other, and where each ends.

    Empty ones are not held after the last that is not, so that a column of nothing else takes nothing.
    """

    def __init__(self):
        self._bytes, self._ends = bytearray(), array("Q")

    def put(self, row: int, text: str) -> None:
        """The text of a row after all those that were put before."""
        if text:
            digest = len(text) == 64 and SHA256.fullmatch(text)
            self._add(row, DIGEST + bytes.fromhex(text) if digest else text.encode("utf-8", "surrogatepass"))

    def get(self, row: int) -> str:
        held = self._held(row)
        return held[1:].hex() if held[:1] == DIGEST else held.decode("utf-8", "surrogatepass")

    def _add(self, row: int, held: bytes) -> None:
        self._ends.extend(len(self._bytes) for _ in range(row - len(self._ends)))
        self._bytes += held
        self._ends.append(len(self._bytes))

    def _held(self, row: int) -> bytearray | bytes:
        if row >= len(self._ends):
            return b""
        return self._bytes[self._ends[row - 1] if row else 0 : self._ends[row]]


class _Paths(_Texts):
    """Paths, of which those that are also the image's id are not held."""

    def __init__(self, ids: _Texts):
        super().__init__()
        self._ids = ids

    def put(self, row: int, text: str) -> None:
        """The path of a row whose id was put already."""
        if text != self._ids.get(row):
            self._add(row, text.encode("utf-8", "surrogatepass") or EMPTY)

    def get(self, row: int) -> str:
        held = self._held(row)
        if not held:
            return self._ids.get(row)
        return "" if held == EMPTY else held.decode("utf-8", "surrogatepass")


class _Repeated:
    """Texts of which many are alike: a number each, and the distinct texts."""

    def __init__(self):
        self._codes, self._code_of, self._texts = array("I"), {}, []

    def put(self, row: int, text: str) -> None:
        """The text of the next row."""
        code = self._code_of.setdefault(text, len(self._texts))
        if code == len(self._texts):
            self._texts.append(text)
        self._codes.append(code)

    def get(self, row: int) -> str:
        return self._texts[self._codes[row]]

    def codes(self) -> tuple[Int[np.ndarray, " b"], tuple[str, ...]]:
        """The numbers, copied, and the distinct texts."""
        return np.array(self._codes, dtype=np.uint32), tuple(self._texts)
