"""Archives of images at an address: fetched, verified, unpacked with care, then read like a folder.

An archive is a stranger's: every name in it is checked before its file is written, links and devices are refused, and
so is one that grows beyond what it may, on the disk or in memory. It is unpacked beside its final place and renamed
when all of it is there.
"""

import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from regvit.data.dataset_builder import Workbench
from regvit.data.downloads import fetch_file, locked
from regvit.data.manifest import escapes
from regvit.data.sources.folder import add_in_place, find_images, list_tree

GROWTH = 100  # times its own size that an archive of images may unpack to; those of JPEGs do not grow at all
FLOOR = 1 << 30  # bytes that any archive may unpack to
MEMBERS = 20_000_000
FEW = 50_000  # members that any archive may have
MEMBER_BYTES = 32  # packed bytes to each member beyond FEW: of images the least take some hundred
NAME_BYTES, PART_BYTES, DEPTH = 1024, 255, 32  # longest name of a member, longest part of it, and its folders
HEADER_BYTES = 1 << 20  # of a long name, or of extended attributes, which tarfile reads as a whole
ANNOUNCING = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
              tarfile.SOLARIS_XHDTYPE)  # fmt: skip
BLOCK = 1 << 20  # bytes copied at once
# What the standard library raises on a damaged archive, besides OSError without a number (gzip's and bzip2's checks).
BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # a compression that zipfile does not have
    struct.error,
    ValueError,  # numbers and texts of headers
    OverflowError,
    MemoryError,  # sizes that are nonsense
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)


class UnsafeArchive(ValueError):
    """An archive that would write where or what it must not; nothing of it is kept."""


class NoArchive(ValueError):
    """A file that is no archive of a known kind."""


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
            encrypted; a name is longer or deeper than any of a file; the files, or what stands before them, are more
            than they may.
        NoArchive: it is none.
        ValueError: it is a broken one.
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
    written, seen, most = 0, set(), min(MEMBERS, max(FEW, file.stat().st_size // MEMBER_BYTES))
    try:
        for member in _members(file):
            name = PurePosixPath(member.name).as_posix()
            if name in seen:
                raise UnsafeArchive(f"{file.name} has {name!r} twice; pack it anew")
            if len(seen) >= most:
                raise UnsafeArchive(f"{file.name} has more than {most} files in {file.stat().st_size} bytes: too many to "
                                    "be images; unpack it by hand and use folder:<path>")  # fmt: skip
            seen.add(name)
            if written + member.size > limit:
                raise UnsafeArchive(
                    f"{file.name} unpacks to more than {limit} bytes ({file.stat().st_size} packed): either it is made "
                    "to fill the disk, or there is no room; unpack it by hand and use folder:<path>"
                )
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            written += _copy(member, target, file)
    except (UnsafeArchive, NoArchive):
        raise
    except _Announced as error:
        raise UnsafeArchive(f"{file.name} {error}; do not use this archive, or pack it anew") from error
    except BROKEN as error:
        raise _broken(file, error) from error
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise _broken(file, error) from error


def _broken(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file.name} is broken ({type(error).__name__}: {error}); pack it anew")


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
        raise EOFError(f"{member.name!r} ends {left} bytes early")
    return member.size


class _Announced(Exception):
    """What a header announces is more than may be read into memory; the archive's name is missing in the message."""


class _Header(tarfile.TarInfo):
    """A member's header, which does not make tarfile read gigabytes into memory before the member's name is known."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        """
        Raises:
            _Announced: it announces a name or attributes of more than HEADER_BYTES, or a map of a file's holes.
        """
        info = super().frombuf(buf, encoding, errors)
        if info.type in ANNOUNCING and info.size > HEADER_BYTES:
            raise _Announced(f"announces {info.size} bytes of name or attributes, more than {HEADER_BYTES}")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise _Announced(f"holds {info.name[:NAME_BYTES]!r}, a file with holes")
        return info

    def _proc_gnusparse_10(self, next: tarfile.TarInfo, *_: object) -> None:
        """The map of holes that GNU tar writes today, of any length; a tarfile without this method reads no such map."""
        raise _Announced(f"holds {next.name[:NAME_BYTES]!r}, a file with holes")


def _open_tar(file: Path) -> tarfile.TarFile | None:
    """The archive, if it is a .tar of any kind."""
    try:
        return tarfile.open(file, tarinfo=_Header)
    except tarfile.TarError:
        return None


def _members(file: Path) -> Iterator[_Member]:
    """The files of an archive in its order, each name and kind checked before it is given out."""
    if (tar := _open_tar(file)) is not None:
        with tar as archive:
            for info in archive:
                kind = "" if info.isreg() else "link" if info.issym() or info.islnk() else "device or the like"
                kind = "file with holes" if info.issparse() else kind
                if not info.isdir():
                    _check_member(file, info.name, kind)
                    yield _Member(info.name, info.size, archive.extractfile(info))
                elif escapes(info.name) or _outside(info.name):
                    _check_member(file, info.name, kind="")
                archive.members = []  # tarfile remembers every member: gigabytes for an archive of millions
            archive.fileobj.seek(archive.offset)  # tarfile takes any header that it cannot read for the end
            rest = archive.fileobj.read(BLOCK)  # and leaves the checksum at the end of gzip and bzip2 unread
            if any(rest[: tarfile.BLOCKSIZE]):
                raise tarfile.ReadError(f"what stands at byte {archive.offset} is neither a header nor the end")
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
        raise NoArchive(f"{file.name} is neither a .tar (plain, gzip, bzip2, xz) nor a .zip archive")


def _outside(name: str) -> bool:
    return ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute()


def _check_member(file: Path, name: str, kind: str) -> None:
    if escapes(name):
        raise UnsafeArchive(f"{file.name} holds {name[:NAME_BYTES]!r}, a name that leaves the folder; do not use this "
                            "archive")  # fmt: skip
    parts = [os.fsencode(part) for part in name.split("/")]
    if sum(map(len, parts)) + len(parts) > NAME_BYTES or max(map(len, parts)) > PART_BYTES or len(parts) > DEPTH:
        raise UnsafeArchive(f"{file.name} holds {name[:60]!r}…, a name of {len(name)} characters in {len(parts)} parts; "
                            f"{NAME_BYTES} bytes in {DEPTH} parts of {PART_BYTES} are the most: pack it anew")  # fmt: skip
    if kind:
        raise UnsafeArchive(f"{file.name} holds {name!r}, a {kind}; only files and folders are unpacked: pack it anew, "
                            "or unpack it by hand and use folder:<path>")  # fmt: skip
