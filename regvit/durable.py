"""Files that survive a kill or a power failure: locked folders, records that heal, renames in one step. POSIX only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from pathlib import Path

from regvit.files import FolderLocked


def lock_folder(folder: Path) -> int:
    """Locks a working folder, which is made if missing.

    Returns: the descriptor that holds the lock (flock) until it is closed, by hand or by the end of the process.
    Raises:
        FolderLocked: another process holds it.
    """
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its holder finished and removed the folder since the line above
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise FolderLocked(f"{folder} is being written by {holder}; wait for it, or end it and run again") from None
        except FileNotFoundError:  # likewise, between opening and locking
            current = False
        if current:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


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


def write_record(path: Path, record: dict) -> None:
    """Puts a JSON file in place in one step; on return it is on disk."""
    new = path.with_name(f"{path.name}.partial")
    new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sync(new)
    os.replace(new, path)
    sync_folder(path.parent)


def append_record(path: Path, record: dict) -> None:
    """Adds one line to a JSONL file; on return it is on disk."""
    with open(path, "ab") as file:
        file.write(json.dumps(record).encode() + b"\n")
    sync(path)


def read_records(path: Path) -> list[dict]:
    """The lines of a JSONL file; a torn line (no end, or not JSON) and all after it are cut off the file."""
    if not path.exists():
        return []
    records, whole, content = [], 0, path.read_bytes()
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # of JSON or of UTF-8: a write that a power failure cut leaves zeros
            record = None
        if not isinstance(record, dict):
            break
        records.append(record)
        whole += len(line)
    if whole < len(content):
        os.truncate(path, whole)
        sync(path)
    return records


def move_folder(source: Path, target: Path) -> None:
    """Renames a folder in one step, by way of a copy beside the target where that is on another file system.

    Raises:
        OSError: the target exists and is not an empty folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f"{target.name}.partial")
        if beside.exists():
            shutil.rmtree(beside)
        shutil.copytree(source, beside)
        for file in beside.rglob("*"):
            if file.is_file():
                sync(file)
        os.rename(beside, target)
        shutil.rmtree(source)
    sync_folder(target.parent)
