"""The manifest of a data set: which images there are, in a fixed order, with their labels and splits.

A data set is a folder with two files:

- `manifest.csv`, one row an image (columns `image_id, path, label, split, boxes, mask, sha256`, and `depth` where a row
  has one), UTF-8, `\\n` line ends;
- `dataset.json`, `{name, root, classes, about}`: `root` is where the paths of the manifest start (`"."` for the folder
  itself, or a folder of the user's that is read in place), `about` holds source, licence and attribution.

Row order is part of the contract: row i of a feature store belongs to row i of the manifest.
"""

import codecs
import csv
import dataclasses
import hashlib
import io
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
from jaxtyping import Int

from regvit.data.rows import COLUMNS, Row, RowList, Rows
from regvit.files import write_table, write_text

SPLITS = ("train", "val", "test")
READ_AT_ONCE = 1 << 20  # bytes
FARTHEST = 1 << 31  # pixels: no corner of a box lies there; nor is it infinite, which Python's JSON reader lets pass


LATER = ("depth",)  # added after the first manifests were made: written only where a row has one, so that those stay
REQUIRED = tuple(field.name for field in dataclasses.fields(Row) if field.default is dataclasses.MISSING)


class InvalidManifest(ValueError):
    """A manifest or `dataset.json` that breaks the contract; the message names the file, the line and the cure."""


@dataclass(frozen=True)
class Dataset:
    """A data set read from its folder.

    Attributes:
        name: as in `params.yaml`.
        root: folder that the paths of the rows are relative to.
        classes: class names; the label index of an image is its place in here.
        rows: one per image, in manifest order; a tuple of rows becomes `Rows`.
        digest: SHA-256 (hex) of the bytes of the whole `manifest.csv`, also for a subset.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    rows: Rows
    digest: str

    def __post_init__(self):
        object.__setattr__(self, "rows", Rows.of(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, split: str) -> "Dataset":
        """The same data set with the rows of one split only, in manifest order; the digest stays.

        Raises:
            ValueError: `split` is not one of "train", "val", "test".
        """
        return dataclasses.replace(self, rows=self.rows.select(self.split_rows(split)))

    def split_rows(self, split: str) -> Int[np.ndarray, " b"]:
        """Numbers of the rows of one split, ascending.

        Raises:
            ValueError: `split` is not one of "train", "val", "test".
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        codes, splits = self.rows.codes("split")
        return np.flatnonzero(codes == splits.index(split)) if split in splits else np.empty(0, dtype=np.int64)

    def labels(self) -> Int[np.ndarray, " b"]:
        """Class index of each image as int64; -1 where an image has no label."""
        index = {name: i for i, name in enumerate(self.classes)} | {"": -1}
        codes, names = self.rows.codes("label")
        of_code = np.zeros(len(names), dtype=np.int64)
        for code in np.unique(codes):  # the rows may be a part, and names those of others
            of_code[code] = index[names[code]]
        return of_code[codes]

    def image_path(self, i: int) -> Path:
        """Where image `i` of the rows lies.

        Raises:
            IndexError: `i` is out of range.
        """
        if not 0 <= i < len(self.rows):
            raise IndexError(f"image {i} is out of range (0 to {len(self.rows) - 1}) in data set {self.name!r}")
        return self.root / self.rows[i].path


def write_dataset(
    folder: Path | str,
    name: str,
    rows: Iterable[Row],
    classes: Sequence[str],
    about: dict,
    root: Path | str = ".",
) -> None:
    """Write `manifest.csv` and `dataset.json` into `folder`, which is made if it is missing.

    Args:
        folder: of the data set.
        name: of the data set.
        rows: written in the order given.
        classes: class names, in the order of the label indices.
        about: source, licence and attribution; plain JSON values.
        root: where the paths of the rows start, relative to `folder` or absolute.
    Raises:
        InvalidManifest: the rows break the contract (see `read_dataset`); nothing is written.
    """
    folder, rows, classes = Path(folder), Rows.of(rows), tuple(classes)
    contract = _Contract(classes, f"the rows given for data set {name!r}")
    for values in zip(*map(rows.column, COLUMNS), strict=True):
        contract.look(*values)
    contract.hold(rows)
    columns = [column for column in COLUMNS if column not in LATER or any(rows.column(column))]
    description = {"name": name, "root": Path(root).as_posix(), "classes": list(classes), "about": about}
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "manifest.csv", columns, zip(*map(rows.column, columns), strict=True))
    write_text(folder / "dataset.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def read_dataset(folder: Path | str) -> Dataset:
    """Read a data set and check it.

    Raises:
        FileNotFoundError: the folder has no `manifest.csv` or no `dataset.json`, or its root is gone.
        InvalidManifest: a file is not the CSV or JSON that it should be, a column is missing, an `image_id` occurs twice,
            a path leaves the root, a label is not among the classes, a split is unknown, or boxes are not JSON; the
            message names the line.
    """
    folder = Path(folder)
    table, description = folder / "manifest.csv", folder / "dataset.json"
    for file in (table, description):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; a data set is a folder made by the download stage")
    about = _describe(description)
    # Lexical, not resolved: a folder of DVC's may be a link into its cache, and ".." must not start from there.
    root = Path(os.path.normpath(os.path.abspath(folder / about.get("root", "."))))
    if not root.is_dir():
        raise FileNotFoundError(f"{root}, the image folder of data set {about['name']!r}, does not exist; "
                                "put it back, or give its absolute path as the source and download again")  # fmt: skip
    classes = tuple(about["classes"])
    contract = _Contract(classes, str(table))
    with open(table, "rb") as file:  # gone through twice: as text it would take several times what the rows do
        digest = _digest(file, table)
        file.seek(0)
        rows = _rows(io.TextIOWrapper(file, encoding="utf-8", newline=""), table, contract)
    contract.hold(rows)
    return Dataset(about["name"], root, classes, rows, digest)


def stratified_splits(labels: Mapping[str, str], seed: int, shares: tuple[float, float, float]) -> dict[str, str]:
    """Assign keys to train, val and test, each class in the same shares.

    Within a class the keys are ordered by a hash of seed and key, so that neither the order of the mapping nor the
    keys of other classes matter, and one key more moves at most a key or two across the borders.

    Args:
        labels: class of each key.
        shares: of train, val and test; their sum is 1.
    Returns:
        Split of each key, in the order of `labels`.
    Raises:
        ValueError: a share is negative or the sum is not 1.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares {shares} of train, val and test must not be negative and must sum to 1")
    by_class = {}
    for key, label in labels.items():
        by_class.setdefault(label, []).append(key)
    split = {}
    for keys in by_class.values():
        keys.sort(key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
        ends = round(len(keys) * shares[0]), round(len(keys) * (shares[0] + shares[1]))
        for place, key in enumerate(keys):
            split[key] = SPLITS[sum(place >= end for end in ends)]
    return {key: split[key] for key in labels}


def _describe(file: Path) -> dict:
    """What `dataset.json` says, its keys held to their kinds."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise InvalidManifest(f"{file} is not JSON ({error}); download the data set again") from error
    if not isinstance(about, dict):
        raise InvalidManifest(f"{file} holds a {type(about).__name__}, expected an object; download the data set again")
    if missing := [key for key in ("name", "classes") if key not in about]:
        raise InvalidManifest(f"{file} lacks {', '.join(missing)}; download the data set again")
    for key in ("name", "root"):
        if not isinstance(value := about.get(key, "."), str) or "\0" in value:
            raise InvalidManifest(f"{file}: {key} is {value!r}, expected text; download the data set again")
    if not isinstance(about["classes"], list) or not all(isinstance(name, str) for name in about["classes"]):
        raise InvalidManifest(f"{file}: classes are {str(about['classes'])[:80]}, expected a list of names; download the "
                              "data set again")  # fmt: skip
    return about


def _digest(file: BinaryIO, table: Path) -> str:
    """SHA-256 (hex) of a manifest's bytes, which must be UTF-8."""
    digest, decoder, lines = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        part = file.read(READ_AT_ONCE)
        digest.update(part)
        try:
            decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            line = lines + error.object.count(b"\n", 0, error.start) + 1
            raise InvalidManifest(f"{table}, line {line}: it is not UTF-8 ({error.reason}); save it as UTF-8, or download "
                                  "the data set again") from error  # fmt: skip
        lines += part.count(b"\n")
        if not part:
            return digest.hexdigest()


def _rows(text: TextIO, table: Path, contract: "_Contract") -> Rows:
    """The rows of a manifest; the contract has had a look at each, and is yet to be held to."""
    reader, rows = csv.reader(text, strict=True), RowList()
    end = 0  # line of the last record that was read
    try:
        header = next(reader, [])
        if missing := [column for column in REQUIRED if column not in header]:
            raise InvalidManifest(f"{table} lacks the column(s) {', '.join(missing)}; it needs {', '.join(REQUIRED)}")
        end, place = reader.line_num, {column: i for i, column in enumerate(header)}
        fewest = 1 + max(place[column] for column in COLUMNS if column in place)
        values_of = itemgetter(*[place.get(column, -1) for column in COLUMNS])  # unknown columns are ignored
        for fields in filter(None, reader):
            if not fewest <= len(fields) <= len(header):
                raise InvalidManifest(f"{table}, line {reader.line_num}: the number of fields differs from the header; "
                                      "repair the line")  # fmt: skip
            values = values_of([*fields, ""])  # the last is that of columns which are not there
            contract.look(*values)
            rows.put(values)
            end = reader.line_num
    except csv.Error as error:
        raise InvalidManifest(f"{table}, line {end + 1}: {error}; close what it opens with a double quote and double those "
                              "within a field, or download the data set again") from error  # fmt: skip
    return Rows.of(rows)


class _Contract:
    """What rows and classes are held to. Looks at row after row and keeps the first fault, without keeping the rows."""

    def __init__(self, classes: tuple[str, ...], where: str):
        self._classes, self._where = classes, where
        self._known = {*classes, ""}
        self._hashes = array("q")  # of the ids: 8 bytes a row find those that may be there twice
        self._fault = ""

    def look(
        self, image_id: str, path: str, label: str, split: str, boxes: str, mask: str, sha256: str, depth: str
    ) -> None:
        """The next row, as `COLUMNS` has it."""
        if self._fault:
            return
        self._hashes.append(hash(image_id))
        if not image_id:
            self._fault = "image_id is empty; give each image a unique one"
        elif leaving := [each for each in (path, mask or ".", depth or ".") if escapes(each)]:
            self._fault = f"path {leaving[0]!r} leaves the root of the data set; use a relative path without '..'"
        elif label not in self._known:
            shown = ", ".join(self._classes[:8])
            self._fault = f"label {label!r} is not among the {len(self._classes)} classes ({shown}, …)"
        elif split not in SPLITS:
            self._fault = f"split {split!r} is unknown; use one of {', '.join(SPLITS)}"
        elif boxes and not _are_boxes(boxes):
            self._fault = f"boxes {boxes[:200]!r} are not a JSON list of [x0, y0, x1, y1] with x0 < x1 and y0 < y1"

    def hold(self, rows: Rows) -> None:
        """Raises the first fault as InvalidManifest: of the classes, or of the rows that were looked at, which these are."""
        classes, number, fault = self._classes, len(self._hashes), self._fault
        if len(set(classes)) < len(classes):
            twice = min(name for name, count in Counter(classes).items() if count > 1)
            raise InvalidManifest(f"{self._where}: class {twice!r} is named twice; class names must be unique")
        if "" in classes:
            raise InvalidManifest(
                f"{self._where}: a class has an empty name; an empty label means that an image has none"
            )
        if (again := self._first_again(rows)) is not None:
            number, fault = again + 1, f"image_id {rows[again].image_id!r} occurs twice; make it unique"
        if fault:
            raise InvalidManifest(f"{self._where}, row {number}: {fault}")

    def _first_again(self, rows: Rows) -> int | None:
        """Number of the first row whose id an earlier one has, up to that of the first other fault."""
        hashes = np.array(self._hashes)
        ordered = np.sort(hashes)
        alike = np.flatnonzero(np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]]))
        seen = set()
        for row, image_id in zip(alike.tolist(), rows.select(alike).column("image_id"), strict=True):
            if image_id in seen:
                return row
            seen.add(image_id)
        return None


def escapes(path: str) -> bool:
    """Whether a manifest path is empty, absolute (POSIX or Windows), climbs out of its root, or holds a NUL."""
    up = ".." in path and ".." in path.split("/")
    return not path or "\\" in path or "\0" in path or path[1:3] == ":/" or path[0] == "/" or up


def _are_boxes(text: str) -> bool:
    try:
        boxes = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, a number of too many digits, or nested without end
        return False
    return isinstance(boxes, list) and all(
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < FARTHEST for v in box)
        and box[0] < box[2]
        and box[1] < box[3]
        for box in boxes
    )
