"""Images of the user's, which stay where they are: a tree of class folders, or a list of files.

| path | splits |
|---|---|
| `<path>/<class>/…` | by the seed; all test if the set is not trained on (role ood or anomaly) |
| `<path>/{train,val,test}/<class>/…` | the folders'; val is taken out of train if it is missing |
| `<path>/{train,val}/<class>/…` | as published without test labels (ImageNet): val is the test split, and as above |
| `<list>.csv`, `.tsv`, `.txt` | `path,label[,split]` a line, as above where no split is given |

Paths of a list are relative to the list, or absolute. An image outside of a class folder, or without a label in the
list, has none. Every image is decoded once; those that cannot be used are rejected with the reason.
"""

import csv
import os
import sys
from pathlib import Path, PurePosixPath

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.decoding import image_suffixes
from regvit.data.manifest import Row

LIST_SUFFIXES = (".csv", ".tsv", ".txt")
BLANKS = " \t\n"  # around a field of a list; others, such as no-break spaces, belong to a name
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def folder(builder: DatasetBuilder, rest: str) -> None:
    """A tree of images, or a list of them, read in place."""
    path = Path(rest).expanduser()
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        root, rows = read_list(path)
    elif path.is_dir():
        root, rows = path, list_tree(path, builder)
    else:
        raise FileNotFoundError(f"{path}, the folder of source {builder.entry.source!r}, does not exist; "
                                f"give a folder or a list ({', '.join(LIST_SUFFIXES)}) by an absolute path, or by one "
                                "relative to where the command runs")  # fmt: skip
    builder.about["images"] = "read in place; see their owner for licence and attribution"
    builder.read_in_place(root, builder.plan(rows))


# A tree of folders.


def list_tree(root: Path, builder: DatasetBuilder) -> list[Row]:
    """Every image file under `root` with class and split by its folders, sorted by path.

    Those beside split folders are rejected.


    Raises:
        ValueError: there is none, or split folders and class folders stand side by side.
    """
    names = find_images(root)
    if not names:
        raise ValueError(f"{root} holds no image; looked for {', '.join(image_suffixes())} in it and all its folders")
    if not _has_split_folders(root, names):
        return [Row(name, name, sys.intern(name.split("/")[0]) if "/" in name else "", "") for name in names]
    rows = []
    for name in names:
        split, *folders = name.split("/")
        if folders:
            rows.append(Row(name, name, sys.intern(folders[0]) if len(folders) > 1 else "", SPLIT_FOLDERS[split]))
        else:
            builder.reject(Row(name, name, "", ""), "it lies beside the split folders; move it into one")
    return rows


def _has_split_folders(path: Path, found: list[str]) -> bool:
    """Whether the topmost folders are splits rather than classes.

    Raises:
        ValueError: some are and some are not. (One class called "train" among others is a class.)
    """
    tops = {name.split("/")[0] for name in found if "/" in name}
    splits, others = tops & SPLIT_FOLDERS.keys(), tops - SPLIT_FOLDERS.keys()
    if len(splits) > 1 and others:
        raise ValueError(
            f"{path} has split folders ({', '.join(sorted(splits))}) beside others ({', '.join(sorted(others)[:5])}); "
            "leave only train, val and test, or only class folders"
        )
    return bool(splits) and not others


def find_images(root: Path) -> list[str]:
    """Paths of all image files under `root`, relative to it, sorted; links are followed, hidden names are not."""
    found, visited = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in visited else [name for name in folders if not name.startswith(".")]
        if real not in visited:
            names = [name for name in files if not name.startswith(".") and name.lower().endswith(image_suffixes())]
            found += [(Path(folder) / name).relative_to(root).as_posix() for name in names]
        visited.add(real)
    return sorted(found)


# A list of files.


def read_list(file: Path) -> tuple[Path, list[Row]]:
    """The images that a list names, in its order, and the folder that their paths start from.

    A first line that begins with `path` names the columns (`path`, `label`, `split`, in any order; others are
    ignored). In a .txt file without commas and tabs the label is what follows the last space. A line ends where an
    editor ends it (LF, CR LF or CR), and at no other character; spaces around a field do not count, but for those of a
    line with double quotes.

    Raises:
        ValueError: the list is empty, is not UTF-8, a double quote is not closed, a line has too many or too few fields
            or no path, or a split is unknown.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # makes every line end a line feed
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); save it as UTF-8") from error
    records = _records(file, [line + "\n" for line in text.removesuffix("\n").split("\n")])
    columns = ["path", "label", "split"]
    if records and "path" in records[0][1]:
        columns = records.pop(0)[1]
    if not records:
        raise ValueError(f"{file} names no image; expected lines of path,label[,split]")
    given = []
    for number, fields in records:
        if len(fields) > len(columns) or (len(fields) < len(columns) and columns != ["path", "label", "split"]):
            raise ValueError(f"{file}, line {number}: {len(fields)} fields, expected {','.join(columns)}; "
                             "put a field with a comma in double quotes")  # fmt: skip
        record = dict(zip(columns, fields, strict=False))
        split = record.get("split", "").strip()
        if not record["path"] or "\0" in record["path"]:
            raise ValueError(
                f"{file}, line {number}: path {record['path']!r} names no file; give one, or take the line away"
            )
        if split and split not in SPLIT_FOLDERS:
            raise ValueError(f"{file}, line {number}: split {split!r} is unknown; use train, val or test")
        given.append((record["path"], record.get("label", "").strip(), SPLIT_FOLDERS.get(split, "")))
    if len({bool(split) for _, _, split in given}) == 2:
        raise ValueError(f"{file} gives a split to some images and not to others; give it to all or to none")
    root = _common_root(file.parent, [path for path, _, _ in given])
    listed, seen = [], set()
    for path, label, split in given:
        name = _relative(file.parent, path, root)
        listed.append(Row(name, name, label, split))
        if name in seen:
            raise ValueError(f"{file} names {path!r} twice; take one of the two lines away")
        seen.add(name)
    return root, listed


def _records(file: Path, lines: list[str]) -> list[tuple[int, list[str]]]:
    """(number of its first line, fields) of every record that is not empty.

    Raises:
        ValueError: a double quote is not closed, or stands within a quoted field.
    """
    first = lines[0]
    if file.suffix.lower() == ".txt" and "," not in first and "\t" not in first:
        stripped = [(i, line.strip(BLANKS)) for i, line in enumerate(lines, start=1)]
        return [(i, [part.strip(BLANKS) for part in line.rsplit(" ", 1)]) for i, line in stripped if line]
    reader = csv.reader(lines, delimiter="\t" if "\t" in first else ",", skipinitialspace=True, strict=True)
    records, start = [], 1
    try:
        for fields in reader:
            quoted = any('"' in line for line in lines[start - 1 : reader.line_num])
            kept = fields if quoted else [field.strip(BLANKS) for field in fields]
            records += [(start, kept)] if any(kept) else []
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}, line {start}: {error}; close what it opens with a double quote, and double those within "
                         "a field") from error  # fmt: skip
    return records


def _common_root(start: Path, paths: list[str]) -> Path:
    """`start` if all paths lie in it, else the deepest folder that holds them all, absolute."""
    if not any(PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts for path in paths):
        return start
    folders = {os.path.dirname(os.path.abspath(start / path)) for path in paths}
    return Path(os.path.commonpath(folders))


def _relative(start: Path, path: str, root: Path) -> str:
    if root == start:
        return PurePosixPath(path).as_posix()
    return Path(os.path.abspath(start / path)).relative_to(root).as_posix()
