"""Final files, whole or not there: each is written in a folder beside its name, synced, and renamed in one step.

A kill, Ctrl-C or a full disk in the middle leaves the file that was there before, and at most a folder `<name>.partial`
beside it, which the next write of the same file clears away with all that libraries may have left in it. A link is
replaced, not written through: what it leads to, such as DVC's cache, stays as it is.
"""

import csv
import json
import math
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

DEVICES = ("/dev", "/dev/fd", "/proc/self/fd")  # but not /dev/shm, a place for files


class FolderLocked(RuntimeError):
    """Another process is at work in the folder; the message says which."""


@contextmanager
def write_atomic(path: Path | str) -> Iterator[Path]:
    """A path of the same file name to write to; what is there at the end of the block gets the final place.

    Args:
        path: final one; its folder must exist.
    Raises:
        OSError: the path is one of the system's, the file cannot be written, or none was, or another process writes the
            same one at the same time. What was in the final place stays.
    """
    path = Path(path)
    if str(path.absolute().parent) in DEVICES:  # /dev/stdout is a link: it would become a file, for everyone
        raise OSError(f"{path} is no place for a file, which replaces what is there; give a path in a folder of yours")
    folder = path.with_name(f"{path.name}.partial")
    if folder.exists():  # of a process that was killed
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder / path.name
        sync(folder / path.name)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync_folder(path.parent)


def write_bytes(path: Path | str, content: bytes) -> None:
    """The bytes as a file, whole or not there."""
    with write_atomic(path) as beside:
        beside.write_bytes(content)


def write_text(path: Path | str, text: str) -> None:
    """The text as a UTF-8 file, whole or not there; line ends stay as they are."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, values: object) -> None:
    """Plain values as a JSON file of one value a line, whole or not there.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has no word for; nothing is written.
    """
    try:
        text = json.dumps(values, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot hold these values: {error}; leave out or name what is not a number") from error
    write_text(path, text + "\n")


def cell(value: float) -> str:
    """A figure in a table: six digits, empty where it is not finite, as no value is there."""
    return f"{value:.6g}" if math.isfinite(value) else ""


def write_table(path: Path | str, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """A header and rows as a CSV file, whole or not there."""
    with write_atomic(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_picture(path: Path | str, figure: object, dpi: int) -> None:
    """A figure of matplotlib as a PNG, without the version that drew it; its folder is made if missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(path) as beside:
        figure.savefig(beside, dpi=dpi, metadata={"Software": None})


def sync(path: Path) -> None:
    """Waits until a file and its name in the folder are on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a working folder, which is made if missing, for the block; the end of the process lets go of it too.

    Raises:
        FolderLocked: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / "lock", timeout=0), folder / "holder"
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError):  # FileNotFoundError: its holder has just finished and removed the folder
        name = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise FolderLocked(f"{folder} is being written by {name}; wait for it, or end it and run again") from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()
