"""The manifest of a data set: which images there are, in a fixed order, with their labels and splits.

A data set is a folder with two files:

- `manifest.csv`, one row an image (columns `image_id, path, label, split, boxes, mask, sha256`, and `depth` where a row
  has one), UTF-8, `\\n` line ends;
- `dataset.json`, `{name, root, classes, about}`: `root` is where the paths of the manifest start (`"."` for the folder
  itself, or a folder of the user's that is read in place), `about` holds source, licence and attribution.

Row order is part of the contract: row i of a feature store belongs to row i of the manifest.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from .files import write_bytes, write_text

SPLITS = ("train", "val", "test")
FARTHEST = 1 << 31  # pixels: no corner of a box lies there; nor is it infinite, which Python's JSON reader lets pass


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
        rows: one per image, in manifest order.
        digest: SHA-256 (hex) of the bytes of the whole `manifest.csv`, also for a subset.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    rows: tuple[Row, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, split: str) -> "Dataset":
        """The same data set with the rows of one split only, in manifest order; the digest stays.

        Raises:
            ValueError: `split` is not one of "train", "val", "test".
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        return dataclasses.replace(self, rows=tuple(row for row in self.rows if row.split == split))

    def labels(self) -> np.ndarray:
        """Class index of each image as int64, shape (b,); -1 where an image has no label."""
        index = {name: i for i, name in enumerate(self.classes)} | {"": -1}
        return np.array([index[row.label] for row in self.rows], dtype=np.int64)

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
    folder, rows, classes = Path(folder), tuple(rows), tuple(classes)
    _check(rows, classes, f"the rows given for data set {name!r}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [column for column in COLUMNS if column not in LATER or any(getattr(row, column) for row in rows)]
    writer.writerow(columns)
    writer.writerows([getattr(row, column) for column in columns] for row in rows)
    description = {"name": name, "root": Path(root).as_posix(), "classes": list(classes), "about": about}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "manifest.csv", text.getvalue().encode())
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
    content = table.read_bytes()
    rows = _rows(content, table)
    _check(rows, tuple(about["classes"]), str(table))
    return Dataset(about["name"], root, tuple(about["classes"]), rows, hashlib.sha256(content).hexdigest())


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


def _rows(content: bytes, table: Path) -> tuple[Row, ...]:
    """The rows of a manifest's bytes, not yet held to the contract."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidManifest(f"{table}, line {line}: it is not UTF-8 ({error.reason}); save it as UTF-8, or download the "
                              "data set again") from error  # fmt: skip
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    end = 0  # line of the last record that was read
    try:
        if missing := [column for column in REQUIRED if column not in (reader.fieldnames or ())]:
            raise InvalidManifest(f"{table} lacks the column(s) {', '.join(missing)}; it needs {', '.join(REQUIRED)}")
        end = reader.line_num
        for record in reader:
            rows.append(_row(record, reader.line_num, table))
            end = reader.line_num
    except csv.Error as error:
        raise InvalidManifest(f"{table}, line {end + 1}: {error}; close what it opens with a double quote and double those "
                              "within a field, or download the data set again") from error  # fmt: skip
    return tuple(rows)


def _row(record: dict, line: int, table: Path) -> Row:
    """One parsed CSV line as a Row; optional columns may be absent, unknown ones are ignored."""
    values = {column: record[column] for column in COLUMNS if column in record}
    if None in record or None in values.values():
        raise InvalidManifest(f"{table}, line {line}: the number of fields differs from the header; repair the line")
    return Row(**values)


def _check(rows: tuple[Row, ...], classes: tuple[str, ...], where: str) -> None:
    """Hold rows to the contract; the first fault is raised as InvalidManifest."""
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise InvalidManifest(f"{where}: class {twice[0]!r} is named twice; class names must be unique")
    if "" in classes:
        raise InvalidManifest(f"{where}: a class has an empty name; an empty label means that an image has none")
    known, seen = set(classes) | {""}, set()
    for number, row in enumerate(rows, start=1):
        fault = None
        if not row.image_id:
            fault = "image_id is empty; give each image a unique one"
        elif row.image_id in seen:
            fault = f"image_id {row.image_id!r} occurs twice; make it unique"
        elif leaving := [path for path in (row.path, row.mask or ".", row.depth or ".") if escapes(path)]:
            fault = f"path {leaving[0]!r} leaves the root of the data set; use a relative path without '..'"
        elif row.label not in known:
            fault = f"label {row.label!r} is not among the {len(classes)} classes ({', '.join(classes[:8])}, …)"
        elif row.split not in SPLITS:
            fault = f"split {row.split!r} is unknown; use one of {', '.join(SPLITS)}"
        elif row.boxes and not _are_boxes(row.boxes):
            fault = f"boxes {row.boxes[:200]!r} are not a JSON list of [x0, y0, x1, y1] with x0 < x1 and y0 < y1"
        if fault:
            raise InvalidManifest(f"{where}, row {number}: {fault}")
        seen.add(row.image_id)


def escapes(path: str) -> bool:
    """Whether a manifest path is empty, absolute (POSIX or Windows), climbs out of its root, or holds a NUL."""
    pure = PurePosixPath(path)
    return not path or "\\" in path or "\0" in path or path[1:3] == ":/" or pure.is_absolute() or ".." in pure.parts


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
