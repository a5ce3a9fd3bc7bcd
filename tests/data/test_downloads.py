import hashlib
import os

import pytest

from regvit.data import downloads
from regvit.data.downloads import fetch_file
from regvit.data.packages import DownloadFailed


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fetch(site, cache):
    return fetch_file(site.url, f"sha256:{sha256(site.content)}", cache)


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Pauses that would have been made, seconds."""
    made = []
    monkeypatch.setattr(downloads.time, "sleep", made.append)
    return made


def test_a_file_comes_once_and_from_the_cache_afterwards(site, tmp_path):
    site.content = os.urandom(100_000)
    for _ in range(2):
        assert fetch(site, tmp_path).read_bytes() == site.content
    assert site.asked == [None]


def test_a_broken_connection_is_taken_up_where_it_broke(site, tmp_path):
    site.content, site.breaks = os.urandom(300_000), [131_072, 65_536]
    assert fetch(site, tmp_path).read_bytes() == site.content
    assert site.asked == [None, "bytes=131072-", "bytes=196608-"]


def test_a_download_that_was_given_up_goes_on_in_the_next_run(site, tmp_path, monkeypatch):
    site.content, site.breaks = os.urandom(300_000), [131_072]
    with monkeypatch.context() as patch:
        patch.setattr(downloads, "ATTEMPTS", 1)
        with pytest.raises(DownloadFailed, match=r"168928 more expected.* is kept, and the next attempt goes on"):
            fetch(site, tmp_path)
    assert fetch(site, tmp_path).read_bytes() == site.content
    assert site.asked[-1] == "bytes=131072-"


def test_a_server_that_cannot_send_parts_is_asked_for_the_whole(site, tmp_path):
    site.content, site.breaks, site.ranges = os.urandom(300_000), [100_000], False
    assert fetch(site, tmp_path).read_bytes() == site.content


@pytest.mark.parametrize("more", [b"", b"x"])
def test_a_part_that_is_the_whole_or_longer_needs_nothing_more_than_that(site, tmp_path, more):
    site.content = os.urandom(1000)
    (tmp_path / f".{sha256(site.content)[:16]}-a.bin.part").write_bytes(site.content + more)
    assert fetch(site, tmp_path).read_bytes() == site.content


def test_a_part_of_another_file_is_thrown_away(site, tmp_path):
    site.content = os.urandom(1000)
    (tmp_path / f".{sha256(site.content)[:16]}-a.bin.part").write_bytes(b"\0" * 500)
    assert fetch(site, tmp_path).read_bytes() == site.content
    assert site.asked == ["bytes=500-", None]


def test_another_file_than_was_expected_is_refused_and_not_kept(site, tmp_path):
    site.content = b"not what was published"
    with pytest.raises(DownloadFailed, match=f"(?s)expected sha256:{'0' * 64} but got {sha256(site.content)}"):
        fetch_file(site.url, f"sha256:{'0' * 64}", tmp_path)
    assert [path for path in tmp_path.iterdir() if path.stat().st_size] == []


def test_an_answer_that_will_not_change_is_not_asked_for_again(site, tmp_path):
    site.status = 404
    with pytest.raises(DownloadFailed, match=r"404 Client Error: Not Found .*; check address, digest and network"):
        fetch(site, tmp_path)
    assert len(site.asked) == 1


def test_a_busy_server_is_asked_again_after_longer_and_longer_pauses(site, tmp_path, pauses):
    site.status = 503
    with pytest.raises(DownloadFailed, match="503 Server Error"):
        fetch_file(site.url, f"md5:{'0' * 32}", tmp_path)
    assert pauses == [1, 2, 4, 8]


def test_a_file_put_into_the_cache_by_hand_is_taken(site, tmp_path):
    site.content = b"abc"
    (tmp_path / "a.bin").write_bytes(b"abc")
    assert fetch(site, tmp_path) == tmp_path / "a.bin"
    assert site.asked == []


@pytest.mark.parametrize(
    ("url", "digest", "said"),
    [
        ("ftp://x/a.tar", "sha256:" + "0" * 64, "is not an http or https address; for files on disk use folder:<path>"),
        ("https://x/a.tar", "sha256:00", "is not sha256:<64 hexadecimal digits>"),
    ],
)
def test_an_address_or_digest_of_another_form_is_refused(tmp_path, url, digest, said):
    with pytest.raises(ValueError, match=said):
        fetch_file(url, digest, tmp_path)
