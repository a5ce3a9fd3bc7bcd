"""Checks before the work that --out can be written, and writes it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from regvit.cli.errors import WrongInput
from regvit.files import write_text


def check_out(path: Path) -> None:
    """Refuses a file that could not be written, before the work of minutes and not after it; makes its folder."""
    if path.is_dir():
        raise WrongInput(f"--out {path} is a folder; name a file in it")
    if is_special(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        at = f"{error.filename}: " if error.filename and Path(error.filename) in path.parents else ""
        raise WrongInput(
            f"--out {path} cannot be written ({at}{error.strerror}); give a file in a folder that you may write to"
        ) from error


def is_special(path: Path) -> bool:
    """Whether a path is a pipe or a device, or lies where the system keeps these."""
    return (path.exists() and not path.is_file()) or path.absolute().parts[1:2] in (("dev",), ("proc",))


def write(path: Path, text: str) -> None:
    """A text file, whole or not there; pipes and devices are written to as they are.

    /dev/stdout is a link, and leads to a plain file wherever the shell sends the output to one: renaming would put a file
    in the link's place, for everyone on the machine, and "w" would cut off what else was sent there.
    """
    if is_special(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        write_text(path, text)
