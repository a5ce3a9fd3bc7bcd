"""The manifest of a data set: which images there are, in a fixed order, with their labels and splits.

A data set is a folder with two files:

- `manifest.csv`, one row an image (columns `image_id, path, label, split, boxes, mask, sha256`, and `depth` where a row
  has one), UTF-8, `\\n` line ends;
- `dataset.json`, `{name, root, classes, about}`: `root` is where the paths of the manifest start (`"."` for the folder
  itself, or a folder of the user's that is read in place), `about` holds source, licence and attribution.

Row order is part of the contract: row i of a feature store belongs to row i of the manifest.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from regvit.data.rows import COLUMNS, PART, SCHEMA, Row, Rows, table_of
from regvit.files import write_atomic, write_text

SPLITS = ("train", "val", "test")
REQUIRED = ("image_id", "path", "label", "split")
LATER = ("depth",)  # added after the first manifests were made: written only where a row has one, so that those stay
FARTHEST = 1 << 31  # pixels: no corner of a box lies there; nor is it infinite, which Python's JSON reader lets pass
ESCAPING = r"^$|[\\\x00]|^.:/|^/|(?:^|/)\.\.(?:/|$)"  # empty, absolute (POSIX or Windows), out of its root, or a NUL
READ_AT_ONCE = 4 << 20  # bytes


class InvalidManifest(ValueError):
    """A manifest or `dataset.json` that breaks the contract; the message names the file, the row and the cure."""


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
        if not isinstance(self.rows, Rows):
            object.__setattr__(self, "rows", Rows(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, split: str) -> Dataset:
        """The same data set with the rows of one split only, in manifest order; the digest stays.

        Raises:
            ValueError: `split` is not one of "train", "val", "test".
        """
        return dataclasses.replace(self, rows=self.rows.select(self.split_rows(split)))

    def split_rows(self, split: str) -> np.ndarray:
        """Numbers of the rows of one split, ascending, shape (b,).

        Raises:
            ValueError: `split` is not one of "train", "val", "test".
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        return np.flatnonzero(self.rows.column("split") == split)

    def labels(self) -> np.ndarray:
        """Class index of each image as int64, shape (b,); -1 where an image has no label."""
        column = self.rows.column("label").remove_unused_categories()
        index = {name: i for i, name in enumerate(self.classes)} | {"": -1}
        return np.array([index[name] for name in column.categories], dtype=np.int64)[column.codes]

    def image_path(self, i: int) -> Path:
        """Where image `i` of the rows lies.

        Raises:
            IndexError: `i` is out of range.
        """
        if not 0 <= i < len(self.rows):
            raise IndexError(f"image {i} is out of range (0 to {len(self.rows) - 1}) in data set {self.name!r}")
        return self.root / self.rows[i].path


def write_dataset(
    folder: Path | str, name: str, rows: Iterable[Row], classes: Sequence[str], about: dict, root: Path | str = "."
) -> None:
    """Write `manifest.csv` and `dataset.json` into `folder`, which is made if it is missing.

    Args:
        rows: written in the order given.
        classes: class names, in the order of the label indices.
        about: source, licence and attribution; plain JSON values.
        root: where the paths of the rows start, relative to `folder` or absolute.
    Raises:
        InvalidManifest: the rows break the contract (see `read_dataset`); nothing is written.
    """
    folder, rows = Path(folder), rows if isinstance(rows, Rows) else Rows(rows)
    _check(rows, tuple(classes), f"the rows given for data set {name!r}")
    columns = [column for column in COLUMNS if column not in LATER or any(rows.column(column))]
    description = {"name": name, "root": Path(root).as_posix(), "classes": list(classes), "about": about}
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomic(folder / "manifest.csv") as beside:
        rows.table().to_csv(beside, columns=columns, index=False, lineterminator="\n", chunksize=PART)
    write_text(folder / "dataset.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def read_dataset(folder: Path | str) -> Dataset:
    """Read a data set and check it.

    Raises:
        FileNotFoundError: the folder has no `manifest.csv` or no `dataset.json`, or its root is gone.
        InvalidManifest: a file is not the CSV or JSON that it should be, a column is missing, an `image_id` occurs twice,
            a path leaves the root, a label is not among the classes, a split is unknown, or boxes are not JSON; the
            message names the row.
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
    with open(table, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows, classes = _read_rows(table), tuple(about["classes"])
    _check(rows, classes, str(table))
    return Dataset(about["name"], root, classes, rows, digest)


def _describe(file: Path) -> dict:
    """What `dataset.json` says, its keys held to their kinds."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise InvalidManifest(f"{file} is not JSON ({error}); download the data set again") from error
    fits = isinstance(about, dict) and all(
        isinstance(text, str) and "\0" not in text for text in (about.get("name"), about.get("root", "."))
    )
    classes = about.get("classes") if fits else None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InvalidManifest(f"{file} is no object with a name and a root (texts) and classes (a list of names): "
                              f"{str(about)[:80]}; download the data set again")  # fmt: skip
    return about


def _read_rows(table: Path) -> Rows:
    try:
        with open(table, newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if missing := [column for column in REQUIRED if column not in header]:
            raise InvalidManifest(f"{table} lacks the column(s) {', '.join(missing)}; it needs {', '.join(REQUIRED)}")
        columns = [name for name in COLUMNS if name in header]
        reader = pa.csv.open_csv(
            table,
            pa.csv.ReadOptions(use_threads=False, block_size=READ_AT_ONCE),  # threads would lose count of the rows
            pa.csv.ParseOptions(newlines_in_values=True),
            pa.csv.ConvertOptions(column_types=SCHEMA, include_columns=columns),
        )
        return Rows(table_of(map(_with_all_columns, reader)))
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
        raise InvalidManifest(f"{table} is no table in UTF-8: {str(error)[:300]}; repair it or download the data set again"
                              ) from error  # fmt: skip


def _with_all_columns(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    absent = [name for name in COLUMNS if name not in batch.schema.names]
    return {name: pa.array([""] * len(batch)) if name in absent else batch[name] for name in COLUMNS}


def _check(rows: Rows, classes: tuple[str, ...], where: str) -> None:
    """Hold rows and classes to the contract.

    Raises:
        InvalidManifest: the first fault.
    """
    if "" in classes:
        raise InvalidManifest(f"{where}: a class has an empty name; an empty label means that an image has none")
    if len(set(classes)) < len(classes):
        twice = min(name for name, count in Counter(classes).items() if count > 1)
        raise InvalidManifest(f"{where}: class {twice!r} is named twice; class names must be unique")
    table = rows.table()
    faults = [  # which rows have it, the column, and what is said after the value
        (table["image_id"] == "", "image_id", "is empty; give each image a unique one"),
        (_occurs_again(table["image_id"]), "image_id", "occurs twice; make it unique"),
        *(
            (table[column].str.contains(ESCAPING) & ((table[column] != "") | (column == "path")), column,
             "leaves the root of the data set; use a relative path without '..'")
            for column in ("path", "mask", "depth")
        ),
        (~table["label"].isin([*classes, ""]), "label", f"is not among the {len(classes)} classes "
                                                        f"({', '.join(classes[:8])}, …)"),
        (~table["split"].isin(SPLITS), "split", f"is unknown; use one of {', '.join(SPLITS)}"),
        (~_are_boxes(table["boxes"]), "boxes", "are not a JSON list of [x0, y0, x1, y1] with x0 < x1 and y0 < y1"),
    ]  # fmt: skip
    first = [(int(np.argmax(wrong)), column, said) for wrong, column, said in faults if np.any(wrong)]
    if first:
        row, column, said = min(first, key=lambda fault: fault[0])
        raise InvalidManifest(f"{where}, row {row + 1}: {column} {table[column][row][:200]!r} {said}")


def _occurs_again(ids: pd.Series) -> np.ndarray:
    """Which ids an earlier one equals; by their hashes, as a set of a million ids takes what the table does."""
    hashes = np.empty(len(ids), np.int64)
    for start in range(0, len(ids), PART):
        hashes[start : start + PART] = [hash(text) for text in ids.iloc[start : start + PART].to_numpy(dtype=object)]
    ordered = np.sort(hashes)
    alike = np.flatnonzero(np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]]))
    again = np.zeros(len(ids), dtype=bool)
    again[alike] = ids.iloc[alike].duplicated()
    return again


def _are_boxes(texts: pd.Series) -> np.ndarray:
    """Which texts are boxes, or empty."""
    fit = np.ones(len(texts), dtype=bool)
    for row in np.flatnonzero(texts != ""):
        fit[row] = _is_list_of_boxes(texts[row])
    return fit


def _is_list_of_boxes(text: str) -> bool:
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


def escapes(path: str) -> bool:
    """Whether a manifest path is empty, absolute (POSIX or Windows), climbs out of its root, or holds a NUL."""
    return re.search(ESCAPING, path) is not None
