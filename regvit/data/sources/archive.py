"""Archives of images at an address: fetched, verified, unpacked with care, then read like a folder.

An archive is a stranger's: a name that leaves the folder, a link or a device is refused (`tarfile`'s data filter, and the
same for zip), and so is one that grows beyond what it may. It is unpacked beside its final place and renamed when all of
it is there.
"""

import errno
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.manifest import escapes
from regvit.data.sources.folder import read_tree

GROWTH = 100  # times its own size that an archive of images may unpack to; those of JPEGs do not grow at all
FLOOR = 1 << 30  # bytes that any archive may unpack to
FEW = 50_000  # members that any archive may have
MEMBER_BYTES = 32  # packed bytes to each member beyond FEW: of images the least take some hundred
LONGEST = 1024  # bytes of a member's name
HEADER_BYTES = 1 << 20  # of a long name, or of extended attributes, which tarfile reads as a whole
ANNOUNCING = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
              tarfile.SOLARIS_XHDTYPE)  # fmt: skip
BLOCK = 1 << 20  # bytes read to find the end
STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"PK\x03\x04")  # of gzip, bzip2, xz and zip; "ustar" stands within a .tar
# What the standard library raises on a damaged archive, besides OSError without a number (gzip's and bzip2's checks).
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError,
          OverflowError, MemoryError, FileExistsError, NotADirectoryError, IsADirectoryError)  # fmt: skip


class UnsafeArchive(ValueError):
    """An archive that would write where or what it must not; nothing of it is kept."""


class NoArchive(ValueError):
    """A file that is no archive of a known kind."""


def archive(builder: DatasetBuilder, rest: str) -> None:
    """`<address>#sha256=<digest>`: class folders (or split folders with class folders) in a .tar or .zip archive."""
    from regvit.data.downloads import fetch_file  # imports requests for a quarter of a second, for no other source

    address, _, fragment = rest.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment)
    if not match:
        raise ValueError(
            f"source 'url:{rest}' has no digest; write url:<address>#sha256=<64 hexadecimal digits, lower case>, which "
            "`sha256sum <archive>` prints, so that the data set is the same wherever it is made"
        )
    downloads = builder.work / "downloads"
    place = downloads / match[1][:16]
    if not place.is_dir():
        file = fetch_file(address, f"sha256:{match[1]}", downloads, builder.name)
        builder.say(f"unpacking {file.name}")
        unpack(file, place)
    builder.credit_to("images", address)
    read_tree(builder, place, wrapped=True)


def unpack(file: Path, folder: Path) -> None:
    """Unpack a .tar (plain, gzip, bzip2, xz) or .zip archive into `folder`, which is whole or absent.

    Raises:
        UnsafeArchive: a name is absolute, leaves the folder, occurs twice or is longer than any of a file; a member is a
            link or a device, or is encrypted; the files, or what stands before them, are more than they may.
        NoArchive: it is none.
        ValueError: it is a broken one.
        OSError: the disk has no room.
    """
    limit = min(max(FLOOR, GROWTH * file.stat().st_size), shutil.disk_usage(file.parent).free)
    partial = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.unpack.lock")):
        if folder.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            _write_members(file, partial, limit)
            os.rename(partial, folder)
        except (UnsafeArchive, NoArchive):
            raise
        except (tarfile.FilterError, _Announced) as error:
            raise UnsafeArchive(f"{file.name}: {error}; do not use this archive, or pack it anew") from error
        except (*BROKEN, OSError) as error:
            if (
                isinstance(error, OSError)
                and not isinstance(error, BROKEN)
                and error.errno not in (None, errno.ENAMETOOLONG)
            ):
                raise  # of the disk
            raise ValueError(f"{file.name} is broken ({type(error).__name__}: {error}); pack it anew") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_members(file: Path, folder: Path, limit: int) -> None:
    written, seen, most = 0, set(), max(FEW, file.stat().st_size // MEMBER_BYTES)
    for name, size, content in _members(file, folder):
        target = folder / PurePosixPath(name)
        written += size
        if target in seen:
            raise UnsafeArchive(f"{file.name} has {target.relative_to(folder).as_posix()!r} twice; pack it anew")
        if len(seen) >= most:
            raise UnsafeArchive(f"{file.name} has more than {most} files in {file.stat().st_size} bytes: too many to "
                                "be images; unpack it by hand and use folder:<path>")  # fmt: skip
        if written > limit:
            raise UnsafeArchive(
                f"{file.name} unpacks to more than {limit} bytes ({file.stat().st_size} packed): either it is made "
                "to fill the disk, or there is no room; unpack it by hand and use folder:<path>"
            )
        seen.add(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with content, open(target, "xb") as out:
            shutil.copyfileobj(content, out)  # both libraries give no more than the size that was declared
            if out.tell() < size:
                raise EOFError(f"{name!r} ends {size - out.tell()} bytes early")


class _Announced(Exception):
    """What a header announces is more than may be read into memory."""


class _Header(tarfile.TarInfo):
    """A member's header, which does not make tarfile read gigabytes into memory before the member's name is known."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        info = super().frombuf(buf, encoding, errors)
        if info.type in ANNOUNCING and info.size > HEADER_BYTES:
            raise _Announced(f"it announces {info.size} bytes of name or attributes, more than {HEADER_BYTES}")
        return info


def _members(file: Path, folder: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size in bytes and content of the files of an archive, in its order; each name and kind is checked before."""
    try:
        tar = tarfile.open(file, tarinfo=_Header)  # noqa: SIM115 (closed below)
    except tarfile.TarError:
        tar = None
    if tar is not None:
        with tar:
            for info in tar:
                kind = "" if info.isreg() or info.isdir() else "link" if info.issym() or info.islnk() else "device"
                _check_member(file, info.name, "file with holes" if info.issparse() else kind)
                tarfile.data_filter(info, str(folder))
                if info.isreg():
                    yield info.name, info.size, tar.extractfile(info)
                tar.members = []  # tarfile remembers every member: gigabytes for an archive of millions
            tar.fileobj.seek(tar.offset)  # tarfile takes any header that it cannot read for the end
            rest = tar.fileobj.read(BLOCK)  # and leaves the checksum at the end of gzip and bzip2 unread
            if any(rest[: tarfile.BLOCKSIZE]):
                raise tarfile.ReadError(f"what stands at byte {tar.offset} is neither a header nor the end")
    elif zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            for info in packed.infolist():
                kind = "link" if stat.S_ISLNK(info.external_attr >> 16) else ""
                _check_member(file, info.filename, "encrypted file" if info.flag_bits & 1 else kind)
                if not info.is_dir():
                    yield info.filename, info.file_size, packed.open(info)
    else:
        with open(file, "rb") as content:
            head = content.read(tarfile.BLOCKSIZE)
        if head.startswith(STARTS) or head[257:262] == b"ustar":
            raise tarfile.ReadError("it begins like an archive, and no file can be found in it")
        raise NoArchive(f"{file.name} is neither a .tar (plain, gzip, bzip2, xz) nor a .zip archive")


def _check_member(file: Path, name: str, kind: str) -> None:
    if escapes(name):
        raise UnsafeArchive(f"{file.name} holds {name[:60]!r}, a name that leaves the folder; do not use this archive")
    if len(os.fsencode(name)) > LONGEST:
        raise UnsafeArchive(f"{file.name} holds {name[:60]!r}…, a name of {len(name)} characters; {LONGEST} bytes are the "
                            "most: pack it anew")  # fmt: skip
    if kind:
        raise UnsafeArchive(f"{file.name} holds {name!r}, a {kind}; only files and folders are unpacked: pack it anew, "
                            "or unpack it by hand and use folder:<path>")  # fmt: skip
