"""The images that a command is given: files, and folders of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from regvit.cli.errors import WrongInput, in_words

if TYPE_CHECKING:
    from regvit.data.decoding import Transform
    from regvit.data.manifest import Dataset


def images_at(paths: Iterable[Path]) -> Dataset:
    """The files, and those in the folders, each once, as a data set of one split."""
    from regvit.data.manifest import Dataset, Row

    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            files |= dict.fromkeys(image_files(path))
        elif path.is_file():
            files[path] = None
        else:
            raise WrongInput(f"{path} is neither a file nor a folder; give images, or folders of them")
    rows = tuple(Row(str(i), path.absolute().as_posix(), "", "train") for i, path in enumerate(files))
    return Dataset("images", Path("."), (), rows, "")


def readable(images: Dataset, transform: Transform) -> Dataset:
    """The images that can be decoded; the others are named, with the reason."""
    from dataclasses import replace

    from regvit.data.decoding import UnreadableImage
    from regvit.data.progress import progress

    rows = []
    with progress(len(images), "reading images") as bar:
        for i, row in enumerate(images.rows):
            try:
                transform.load(images.image_path(i))
                rows.append(row)
            except UnreadableImage as error:
                bar.line(f"left out: {in_words(error)}")
            bar.advance()
    if not rows:
        raise WrongInput(f"none of the {len(images)} images can be read")
    return replace(images, rows=tuple(rows))


def image_files(folder: Path | str) -> list[Path]:
    """The files below a folder that have the extension of an image format, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give one that holds images")
    known = Image.registered_extensions()
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in known
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"{folder} holds no file with the extension of an image format (.png, .jpg, …)")
    return files
