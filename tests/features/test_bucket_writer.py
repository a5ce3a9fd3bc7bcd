import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from object_server import ObjectServer

from regvit.durable import FolderLocked
from regvit.features.bucket_writer import BucketWriter, store_writer
from regvit.features.storage import StorageError
from regvit.features.store import FeatureStore, InvalidStore
from regvit.features.store_layout import UnstorableFeature
from regvit.features.store_writer import OutOfReach, StoreWriter

SHAPES = {"cls": (8,), "registers": (2, 8), "patch_mean": (8,)}
MADE_BY = {"backbone": "tiny", "transform": {"size": 32, "crop_pct": 1.0}, "manifest_sha256": "m"}


@pytest.fixture(scope="module")
def server():
    with ObjectServer() as server:
        yield server


@pytest.fixture
def url(server, request):
    return f"{server.url}/{request.node.name.replace('[', '-').replace(']', '')}/made.zarr"


def features(writer, unit):
    start, stop = writer.unit_rows(unit)
    rng = np.random.default_rng(unit)
    return {name: rng.standard_normal((stop - start, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def fill(writer, units=None):
    for unit in writer.missing_units() if units is None else units:
        writer.write(unit, features(writer, unit))


def writer_of(url, server, rows=10, attributes=MADE_BY, lease=60.0, **more):
    return BucketWriter(url, None, rows, SHAPES, attributes, 4, storage_options=server.options, lease=lease, **more)


def interrupted(url, server, units=(0, 1)):
    with writer_of(url, server) as writer:
        fill(writer, units)


def key_of(url, key=""):
    return url.removeprefix("s3://features/") + (f"/{key}" if key else "")


def folder_store(folder, rows=10, attributes=MADE_BY):
    with StoreWriter(folder / "made.zarr", folder / "made.partial", rows, SHAPES, attributes, 4) as writer:
        fill(writer)
        writer.finish()
    return FeatureStore.open(folder / "made.zarr")


def same(url, server, folder):
    """The store in the bucket has the keys and the bytes of one in a folder, as S3 itself shows them."""
    folder_store(folder)
    files = {str(f.relative_to(folder / "made.zarr")): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    prefix = key_of(url)
    return {key.removeprefix(f"{prefix}/"): server.get(key) for key in server.keys(prefix)} == files


def test_a_store_in_a_bucket_has_the_bytes_of_one_in_a_folder_and_leaves_nothing_else(url, server, tmp_path):
    with writer_of(url, server) as writer:
        assert writer.missing_units() == [0, 1, 2] and writer.note == ""
        fill(writer)
        writer.finish()
    assert same(url, server, tmp_path)  # nothing under `made.zarr.partial` either
    store, local = (
        FeatureStore.open(url, "m", storage_options=server.options),
        FeatureStore.open(tmp_path / "made.zarr"),
    )
    assert (store.digest(), store.attributes, store.arrays, len(store)) == (
        local.digest(),
        local.attributes,
        local.arrays,
        10,
    )
    for name in SHAPES:
        np.testing.assert_array_equal(store.read(name), local.read(name))
    np.testing.assert_array_equal(store.read_rows("cls", 3, 9), local.read_rows("cls", 3, 9))


def test_what_was_done_is_not_done_again(url, server, tmp_path):
    interrupted(url, server, units=(2, 0))
    with writer_of(url, server) as writer:
        assert writer.missing_units() == [1]
        assert writer.note == "resumed: 2 of 3 units were done"
        fill(writer)
        writer.finish()
    assert same(url, server, tmp_path)


def test_an_unfinished_store_does_not_open(url, server):
    with writer_of(url, server) as writer:
        fill(writer)
        with pytest.raises(InvalidStore, match=r"made.zarr is unfinished: `complete` is not set"):
            FeatureStore.open(url, storage_options=server.options)


def test_a_change_of_settings_starts_anew_says_why_and_leaves_nothing_of_before(url, server, tmp_path):
    with writer_of(url, server, rows=20, attributes={"backbone": "large"}) as writer:
        fill(writer)
    with writer_of(url, server) as writer:
        assert writer.missing_units() == [0, 1, 2]
        assert "started anew" in writer.note and "attributes.backbone was 'large' and is 'tiny'" in writer.note
        fill(writer)
        writer.finish()
    assert same(url, server, tmp_path)


@pytest.mark.parametrize("key", ["resume.json", "zarr.json", "cls/zarr.json"])
def test_a_loss_of_what_describes_the_work_starts_anew(url, server, key, tmp_path):
    interrupted(url, server)
    prefix = key_of(url) + (".partial" if key == "resume.json" else "")
    if key == "zarr.json":  # nothing says any more that what lies there is ours to delete
        server.client.delete_object(Bucket="features", Key=f"{prefix}/{key}")
        with pytest.raises(FileExistsError, match="objects that are no feature store"), writer_of(url, server):
            pass
        return
    server.client.delete_object(Bucket="features", Key=f"{prefix}/{key}")
    with writer_of(url, server) as writer:
        assert writer.missing_units() == [0, 1, 2]
        fill(writer)
        writer.finish()
    assert same(url, server, tmp_path)


def test_a_chunk_without_a_record_is_deleted_and_a_record_without_its_chunk_does_not_count(url, server):
    interrupted(url, server)
    for key in ("cls/c.2.0", "nobody's"):
        server.put(key_of(url, key), b"half")
    server.client.delete_object(Bucket="features", Key=key_of(url, "registers/c.1.0.0"))
    with writer_of(url, server) as writer:
        assert writer.missing_units() == [1, 2]
        chunks = [key for key in server.keys(key_of(url) + "/") if not key.endswith("zarr.json")]
        assert chunks == [key_of(url, f"{name}.0") for name in ("cls/c.0", "patch_mean/c.0", "registers/c.0.0")]


def test_a_chunk_that_was_overwritten_after_its_record_is_noticed_and_done_again(url, server, tmp_path):
    """As by a worker that outlived its writer and was just sending."""
    with writer_of(url, server) as writer:
        fill(writer)
        server.put(key_of(url, "cls/c.1.0"), bytes(4 * 8 * 2 + 4))
        with pytest.raises(InvalidStore, match=r"the chunks of 1 units \(the first is 1\) are not those"):
            writer.finish()
    with writer_of(url, server) as writer:
        assert writer.missing_units() == [1]
        fill(writer)
        writer.finish()
    assert same(url, server, tmp_path)


def test_a_store_with_missing_units_is_not_finished(url, server):
    with writer_of(url, server) as writer:
        fill(writer, [0])
        with pytest.raises(ValueError, match=r"lacks 2 of 3 units \(the first is 1\)"):
            writer.finish()


def test_a_finished_store_and_objects_of_others_are_never_touched(url, server):
    with writer_of(url, server) as writer:
        fill(writer)
        writer.finish()
    with (
        pytest.raises(FileExistsError, match=r"made.zarr exists; delete it to extract it again"),
        writer_of(url, server),
    ):
        pass
    foreign = f"{server.url}/foreign"
    server.put("foreign/letters/a.txt", b"dear")
    with (
        pytest.raises(FileExistsError, match=r"objects that are no feature store \(letters/a.txt\); delete them or"),
        writer_of(foreign, server),
    ):
        pass
    assert server.keys("foreign") == ["foreign/letters/a.txt"]


def test_a_second_writer_is_refused_and_does_not_disturb_the_first(url, server, tmp_path):
    with writer_of(url, server) as first:
        fill(first, [0])
        with pytest.raises(FolderLocked, match=rf"by process {os.getpid()} on"), writer_of(url, server):
            pass
        fill(first)
        first.finish()
    assert same(url, server, tmp_path)


def test_a_writer_that_was_taken_over_records_nothing_more(url, server):
    with writer_of(url, server, lease=2.0) as writer:
        fill(writer, [0])
        server.put(key_of(url) + ".partial/owner", b"{}")
        time.sleep(1.5)
        with pytest.raises(FolderLocked, match="took it over"):
            fill(writer, [1])


def test_a_worker_of_an_earlier_writer_writes_nothing_into_a_store_begun_anew(url, server):
    with writer_of(url, server, attributes={"backbone": "large"}) as writer:
        old = pickle.loads(pickle.dumps(writer.unit_writer()))
        values = features(writer, 0)
    with writer_of(url, server) as writer:
        with pytest.raises(OutOfReach, match="was begun anew with other settings"):
            old.write(0, values)
        fill(writer)
        writer.finish()
    with pytest.raises(OutOfReach, match="is no unfinished store any more"):
        old.write(0, values)


def test_units_written_by_a_worker_count_when_they_are_recorded(url, server, tmp_path):
    with writer_of(url, server) as writer:
        worker = pickle.loads(pickle.dumps(writer.unit_writer()))
        receipts = {unit: worker.write(unit, features(writer, unit)) for unit in (2, 0, 1)}
        assert writer.missing_units() == [0, 1, 2]
        assert sorted(receipts[2]["chunks"]) == ["cls/c.2.0", "patch_mean/c.2.0", "registers/c.2.0.0"]
        for unit, receipt in receipts.items():
            writer.record(unit, receipt | {"device": "x"})
        writer.finish()
    assert same(url, server, tmp_path)


def test_a_value_that_float16_cannot_hold_is_refused_before_anything_of_its_unit_is_put(url, server):
    with writer_of(url, server) as writer:
        values = features(writer, 1)
        values["patch_mean"][2, 3] = np.inf
        with pytest.raises(UnstorableFeature, match=r"array 'patch_mean', row 6: inf"):
            writer.write(1, values)
        assert not [key for key in server.keys(key_of(url)) if "/c." in key]


KILLED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_bucket_writer import features, writer_of
from types import SimpleNamespace
server = SimpleNamespace(options=json.loads(sys.argv[2]))
with writer_of(sys.argv[3], server, rows=120, lease=2.0) as writer:
    for unit in writer.missing_units():
        writer.write(unit, features(writer, unit))
        print(unit, flush=True)
    writer.finish()
"""


def test_a_writer_killed_again_and_again_loses_only_the_unit_at_work_and_ends_in_the_same_bytes(url, server, tmp_path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), json.dumps(server.options), url]
    done: list[int] = []
    for kill in range(4):
        time.sleep(3.1 if kill else 0)  # until the lease of the one that was killed has run out
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        units = [int(line) for _, line in zip(range(6), process.stdout, strict=False)] if kill < 3 else None
        if units:
            time.sleep(0.01 * kill)
            process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        # One unit more may have been recorded than the killed process came to say.
        assert not kill or (units or [int(rest.split()[0])])[0] in (done[-1] + 1, done[-1] + 2)
        done += (units or []) + [int(line) for line in rest.split()]
        assert process.returncode == (-signal.SIGKILL if kill < 3 else 0)
    assert len(set(done)) == len(done) and done[-1] == 29
    store = FeatureStore.open(url, storage_options=server.options)
    assert store.digest() == folder_store(tmp_path, 120).digest()


def test_store_writer_takes_folders_and_urls_but_not_one_of_each(server, tmp_path):
    arguments = 10, SHAPES, MADE_BY, 4
    assert type(store_writer(tmp_path / "a.zarr", None, *arguments)) is StoreWriter
    assert store_writer(str(tmp_path / "a.zarr"), None, *arguments).partial == tmp_path / "a.zarr.partial"
    bucket = store_writer(f"{server.url}/a.zarr", None, *arguments, storage_options=server.options)
    assert isinstance(bucket, BucketWriter) and bucket.partial.url == "s3://features/a.zarr.partial"
    with pytest.raises(ValueError, match="must both be folders or both be URLs"):
        store_writer(f"{server.url}/a.zarr", "a.partial", *arguments)
    with pytest.raises(ValueError, match="is a folder, which has no storage options"):
        store_writer("a.zarr", None, *arguments, storage_options={"region": "x"})


def test_a_damaged_store_in_a_bucket_does_not_open_or_read(url, server):
    with pytest.raises(FileNotFoundError, match=r"made.zarr does not exist; run the extract stage"):
        FeatureStore.open(url, storage_options=server.options)
    with writer_of(url, server) as writer:
        fill(writer)
        writer.finish()
    whole = server.get(key_of(url, "cls/c.1.0"))
    server.put(key_of(url, "cls/c.1.0"), whole[:20] + bytes(10) + whole[30:])
    with pytest.raises(InvalidStore, match=r"array 'cls': .*a chunk is damaged"):
        FeatureStore.open(url, storage_options=server.options).read("cls")
    server.put(key_of(url, "cls/c.1.0"), whole[:20])
    with pytest.raises(InvalidStore, match=r"made.zarr/cls/c.1.0 has 20 bytes, expected 68"):
        FeatureStore.open(url, storage_options=server.options)
    server.client.delete_object(Bucket="features", Key=key_of(url, "cls/c.1.0"))
    with pytest.raises(InvalidStore, match=r"lacks 1 of 3 chunks of array 'cls' \(cls/c.1.0\)"):
        FeatureStore.open(url, storage_options=server.options)


def test_a_bucket_that_cannot_be_reached_is_named(server):
    with pytest.raises(StorageError, match=r"s3://nowhere/a.zarr"), writer_of("s3://nowhere/a.zarr", server):
        pass
