import pickle

import pytest
from object_server import ObjectServer

from regvit.features.storage import AlreadyThere, Bucket, Changed, Folder, StorageError, is_url, place_of


@pytest.fixture(scope="module")
def server():
    with ObjectServer() as server:
        yield server


def test_a_path_is_a_folder_and_a_url_is_a_bucket(tmp_path):
    assert place_of(tmp_path) == Folder(tmp_path)
    assert place_of("s3://bucket/a.zarr/", {"region": "x"}) == Bucket("s3://bucket/a.zarr", {"region": "x"})
    assert is_url("gs://bucket/a") and not is_url("features/s3:/a") and not is_url(tmp_path)


def test_an_unknown_scheme_and_options_for_a_folder_are_refused():
    with pytest.raises(
        ValueError, match=r"http://host/a has the scheme 'http'; expected one of s3, gs, az, or a folder"
    ):
        place_of("http://host/a")
    with pytest.raises(ValueError, match=r"features is a folder, which has no storage options \(given: region\)"):
        place_of("features", {"region": "x"})


def test_files_and_objects_are_listed_in_the_same_order_with_the_same_sizes_and_digests(server, tmp_path):
    bucket = Bucket(f"{server.url}/order", server.options)
    assert not bucket.exists()
    for key in ("cls/c.0.0", "cls/zarr.json", "cls.b/c.0", "zarr.json", "cls-a"):
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(key.encode() * 3)
        server.put(f"order/{key}", key.encode() * 3)
    server.put("orders", b"of another prefix")
    folder = Folder(tmp_path)
    assert bucket.exists()
    assert list(bucket.sizes().items()) == list(folder.sizes().items())
    assert len(bucket.sizes()) == 5
    assert [bucket.digest(key) for key in bucket.sizes()] == [folder.digest(key) for key in folder.sizes()]


def test_an_object_is_made_once_and_replaced_only_by_who_knows_it(server):
    bucket = Bucket(f"{server.url}/conditional", server.options)
    first = bucket.create("a", b"1")
    with pytest.raises(AlreadyThere):
        bucket.create("a", b"2")
    second = bucket.replace("a", b"3", first)
    with pytest.raises(Changed):
        bucket.replace("a", b"4", first)
    assert (bucket.get("a").content, bucket.get("a").tag) == (b"3", second)
    bucket.delete(["a"])
    bucket.delete(["a"])  # what is not there is deleted already
    with pytest.raises(FileNotFoundError):
        bucket.get("a")
    with pytest.raises(Changed):
        bucket.replace("a", b"5", second)


def test_a_bucket_can_be_sent_to_another_process_after_it_was_used(server):
    bucket = Bucket(f"{server.url}/sent", server.options)
    bucket.put("a", b"1")
    assert pickle.loads(pickle.dumps(bucket)).get("a").content == b"1"


def test_a_secret_is_not_shown(server):
    bucket = Bucket(f"{server.url}/secret", server.options | {"secret_access_key": "hush"})
    assert "hush" not in repr(bucket)
    with pytest.raises(StorageError) as caught:
        Bucket(f"{server.url}/secret", {"secret_access_key": "hush", "endpont": "x"}).put("a", b"")
    assert "options that obstore knows" in str(caught.value) and "endpont" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_bucket_that_there_is_not_and_a_server_that_there_is_not_are_named(server):
    with pytest.raises(StorageError, match=r"s3://nowhere/a: .*bucket"):
        Bucket("s3://nowhere/a", server.options).put("a", b"")
    options = server.options | {"endpoint": "http://127.0.0.1:9", "retry_config": {"max_retries": 0}}
    with pytest.raises(StorageError, match=r"s3://features/a: .*; look at the URL, the credentials"):
        Bucket("s3://features/a", options).put("a", b"")


def test_without_obstore_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(StorageError, match=r"needs obstore, which is not installed; pip install 'regvit\[cluster\]'"):
        Bucket("s3://features/a").exists()
