"""Archives of images at an address: fetched, verified, unpacked with care, then read like a folder.

An archive is a stranger's: every name in it is checked before its file is written, links and devices are refused, and
so is one that grows beyond what it may. It is unpacked beside its final place and renamed when all of it is there.
"""

import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from .downloads import fetch_file, locked
from .folders import add_in_place, find_images, list_tree
from .manifest import escapes
from .workbench import Workbench

GROWTH = 100  # times its own size that an archive of images may unpack to; those of JPEGs do not grow at all
FLOOR = 1 << 30  # bytes that any archive may unpack to
MEMBERS = 20_000_000
BLOCK = 1 << 20  # bytes copied at once


class UnsafeArchive(ValueError):
    """An archive that would write where or what it must not; nothing of it is kept."""


def archive(bench: Workbench, rest: str) -> None:
    """`<address>#sha256=<digest>`: class folders (or split folders with class folders) in a .tar or .zip archive."""
    address, _, fragment = rest.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment)
    if not match:
        raise ValueError(
            f"source 'url:{rest}' has no digest; write url:<address>#sha256=<64 hexadecimal digits, lower case>, which "
            "`sha256sum <archive>` prints, so that the data set is the same wherever it is made"
        )
    place = bench.downloads / f"{match[1][:16]}"
    file = None if place.is_dir() else fetch_file(address, f"sha256:{match[1]}", bench.downloads, bench.label)
    if file is not None:
        bench.say(f"unpacking {file.name}")
        unpack(file, place)
    root = innermost(place)
    bench.credit_to("images", address, "see its publisher", "see its publisher")
    add_in_place(bench, root, list_tree(root))


def innermost(folder: Path) -> Path:
    """The folder below which classes begin: archives often hold one folder, named like themselves, that holds all.

    One goes down while there is no image and a single folder, as long as that has folders with images itself.
    """
    while True:
        inner = {name.split("/")[0] for name in find_images(folder)}
        if len(inner) != 1 or not (folder / min(inner)).is_dir():
            return folder
        below = folder / min(inner)
        if not any("/" in name for name in find_images(below)):
            return folder
        folder = below


@dataclass(frozen=True)
class _Member:
    """A file in an archive: its name, its size in bytes as declared, and what opens it."""

    name: str
    size: int
    content: IO[bytes]


def unpack(file: Path, folder: Path, growth: float = GROWTH, floor: int = FLOOR) -> None:
    """Unpack a .tar (plain, gzip, bzip2, xz) or .zip archive into `folder`, which is whole or absent.

    Args:
        growth, floor: the files may hold `growth` times the archive's bytes, and `floor` bytes in any case.
    Raises:
        UnsafeArchive: a name is absolute, leaves the folder or occurs twice; a member is a link or a device, or is
            encrypted; the files hold more than they may.
        ValueError: it is no archive, or a broken one.
        OSError: the disk has no room.
    """
    limit = min(max(floor, int(growth * file.stat().st_size)), shutil.disk_usage(file.parent).free)
    partial = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.unpack.lock")):
        if folder.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            _write_members(file, partial, limit)
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_members(file: Path, folder: Path, limit: int) -> None:
    written, seen = 0, set()
    try:
        for member in _members(file):
            name = PurePosixPath(member.name).as_posix()
            if name in seen or len(seen) >= MEMBERS:
                raise UnsafeArchive(f"{file.name} has {'too many members' if name not in seen else f'{name!r} twice'}; "
                                    "pack it anew")  # fmt: skip
            seen.add(name)
            if written + member.size > limit:
                raise UnsafeArchive(
                    f"{file.name} unpacks to more than {limit} bytes ({file.stat().st_size} packed): either it is made "
                    "to fill the disk, or there is no room; unpack it by hand and use folder:<path>"
                )
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            written += _copy(member, target, file)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, FileExistsError,
            NotADirectoryError, IsADirectoryError) as error:  # fmt: skip
        raise ValueError(f"{file.name} is broken ({type(error).__name__}: {error}); pack it anew") from error


def _copy(member: _Member, target: Path, file: Path) -> int:
    """Write a member, never more than it declared; returns its size in bytes."""
    left = member.size
    with member.content as source, open(target, "xb") as out:
        while block := source.read(min(BLOCK, left + 1)):
            left -= len(block)
            if left < 0:
                raise UnsafeArchive(f"{file.name}: {member.name!r} holds more than the {member.size} bytes it declares")
            out.write(block)
    if left:
        raise ValueError(f"{file.name}: {member.name!r} ends {left} bytes early; fetch or pack it anew")
    return member.size


def _members(file: Path) -> Iterator[_Member]:
    """The files of an archive in its order, each name and kind checked before it is given out."""
    if tarfile.is_tarfile(file):
        with tarfile.open(file) as archive:
            for info in archive:
                kind = "" if info.isreg() else "link" if info.issym() or info.islnk() else "device or the like"
                if not info.isdir():
                    _check_member(file, info.name, kind)
                    yield _Member(info.name, info.size, archive.extractfile(info))
                elif escapes(info.name) or _outside(info.name):
                    _check_member(file, info.name, kind="")
                archive.members = []  # tarfile remembers every member: gigabytes for an archive of millions
    elif zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                mode = info.external_attr >> 16
                kind = "link" if stat.S_ISLNK(mode) else ""
                kind = "encrypted file" if info.flag_bits & 1 else kind
                _check_member(file, info.filename, kind)
                if not info.is_dir():
                    yield _Member(info.filename, info.file_size, archive.open(info))
    else:
        raise ValueError(f"{file.name} is neither a .tar (plain, gzip, bzip2, xz) nor a .zip archive")


def _outside(name: str) -> bool:
    return ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute()


def _check_member(file: Path, name: str, kind: str) -> None:
    if escapes(name) or "\0" in name:
        raise UnsafeArchive(f"{file.name} holds {name!r}, a name that leaves the folder; do not use this archive")
    if kind:
        raise UnsafeArchive(f"{file.name} holds {name!r}, a {kind}; only files and folders are unpacked: pack it anew, "
                            "or unpack it by hand and use folder:<path>")  # fmt: skip
