"""Lists of images: `path,label[,split]` a line, as .csv, .tsv or .txt.

A first line with one of the usual names of a column of paths names the columns, in any order and case; columns of other
names are ignored. Fields are parted by commas, semicolons, tabs or bars; in a .txt file without any, the label is what
follows the last space. Paths are relative to the list, or absolute; one that is not there may be meant with other
separators (Windows) or in the other Unicode form (macOS). What can be read in two ways is refused.
"""

import csv
import os
import unicodedata
from pathlib import Path

from regvit.data.manifest import Row
from regvit.data.splits import split_of

LIST_SUFFIXES = (".csv", ".tsv", ".txt")
DELIMITERS = ",;\t|"
BLANKS = " \t\n"  # around a field; others, such as no-break spaces, belong to a name
COLUMNS = {  # usual names of a column
    "path": (
        "path",
        "file",
        "filename",
        "file_name",
        "filepath",
        "file_path",
        "image",
        "image_path",
        "img",
        "img_path",
    ),
    "label": ("label", "labels", "class", "class_name", "category", "target"),
    "split": ("split", "subset", "set", "partition"),
}
BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def read_list(file: Path) -> tuple[Path, list[Row]]:
    """The images that a list names, in its order, and the folder that their paths start from.

    A line ends where an editor ends it (LF, CR LF or CR), and at no other character; spaces around a field do not count,
    but for those of a line with double quotes.

    Raises:
        ValueError: the list is empty or not UTF-8 or UTF-16, its header is not understood, a double quote is not closed,
            a line has too many or too few fields or no path, an image stands there twice, or a split is unknown.
    """
    records = _records(file, _text(file))
    columns = [_column(name) for name in records[0][1]] if records else []
    if headed := "path" in columns:
        records.pop(0)
        if twice := [name for name in COLUMNS if columns.count(name) > 1]:
            raise ValueError(f"{file} has several columns of {twice[0]}s in its first line; leave one of them")
    else:
        columns = ["path", "label", "split"]
    if not records:
        raise ValueError(f"{file} names no image; expected lines of path,label[,split]")
    given = [_record(file, number, fields, columns) for number, fields in records]
    if len({bool(split) for _, _, split in given}) == 2:
        raise ValueError(f"{file} gives a split to some images and not to others; give it to all or to none")
    paths = [_existing(file.parent, path) for path, _, _ in given]
    if not headed and len(paths) > 1 and not os.path.exists(paths[0]) and os.path.exists(paths[1]):
        raise ValueError(f"{file} begins with {','.join(records[0][1])!r}, which names no image and is no header that is "
                         "understood; call the columns path, label and split")  # fmt: skip
    outside = not all(path.startswith(os.path.abspath(file.parent) + os.sep) for path in paths)
    root = Path(os.path.commonpath(map(os.path.dirname, paths))) if outside else file.parent
    rows, seen = [], set()
    for path, (text, label, split) in zip(paths, given, strict=True):
        name = Path(os.path.relpath(path, root)).as_posix()
        if name in seen:
            raise ValueError(f"{file} names {text!r} twice; take one of the two lines away")
        seen.add(name)
        rows.append(Row(name, name, label, split))
    return root, rows


def _text(file: Path) -> str:
    content = file.read_bytes()
    try:
        text = content.decode(BYTE_ORDER_MARKS.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{file} holds NUL characters: it is no text, or UTF-16 without a mark; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _records(file: Path, text: str) -> list[tuple[int, list[str]]]:
    """(number of its first line, fields) of every record that is not empty.

    Raises:
        ValueError: a double quote is not closed, or stands within a quoted field.
    """
    lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
    delimiter = _delimiter(file, lines)
    if not delimiter:
        parts = [line.strip(BLANKS).rsplit(" ", 1 if file.suffix.lower() == ".txt" else 0) for line in lines]
        return [(i, [part.strip(BLANKS) for part in fields]) for i, fields in enumerate(parts, start=1) if any(fields)]
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
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


def _delimiter(file: Path, lines: list[str]) -> str:
    """The one that stands in the first line; of several, the one that ends a column's name or the path of a file."""
    present = [delimiter for delimiter in DELIMITERS if delimiter in lines[0]]
    for delimiter in present if len(present) > 1 else []:
        first = [next(csv.reader([line], delimiter=delimiter), [""])[0].strip(BLANKS) for line in lines[:2]]
        if _column(first[0]) or any(text and os.path.isfile(_existing(file.parent, text)) for text in first):
            return delimiter
    return present[0] if present else ""


def _column(name: str) -> str:
    name = name.strip().casefold().replace(" ", "_").replace("-", "_")
    return next((column for column, names in COLUMNS.items() if name in names), "")


def _record(file: Path, number: int, fields: list[str], columns: list[str]) -> tuple[str, str, str]:
    """Path, label and split of a line."""
    if len(fields) > len(columns) or (len(fields) < len(columns) and columns != ["path", "label", "split"]):
        raise ValueError(f"{file}, line {number}: {len(fields)} fields, expected {','.join(columns)}; "
                         "put a field with a comma in double quotes")  # fmt: skip
    record = dict(zip(columns, fields, strict=False))
    if not record["path"]:
        raise ValueError(f"{file}, line {number}: path '' names no file; give one, or take the line away")
    given = record.get("split", "").strip()
    if given and not split_of(given):
        raise ValueError(f"{file}, line {number}: split {given!r} is unknown; use train, val or test")
    return record["path"], record.get("label", "").strip(), split_of(given)


def _existing(folder: Path, path: str) -> str:
    """The absolute path of a file, in the spelling in which it is there."""
    spellings = [path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")), path.replace("\\", "/")]
    candidates = [os.path.abspath(folder / Path(spelling).expanduser()) for spelling in spellings]
    return next((candidate for candidate in candidates if os.path.exists(candidate)), candidates[0])
