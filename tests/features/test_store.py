import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from regvit.durable import FolderLocked, append_record, move_folder, sync
from regvit.features.store import FeatureStore, InvalidStore, fingerprint, image_ids_digest
from regvit.features.store_layout import UnstorableFeature, default_rows_per_unit
from regvit.features.store_writer import OutOfReach, StoreWriter

SHAPES = {"cls": (8,), "registers": (2, 8), "patch_mean": (8,)}
MADE_BY = {
    "backbone": "tiny",
    "weights_sha256": "ab",
    "precision": "float32",
    "transform": {"size": 32, "crop_pct": 1.0},
}


def features(rows, start=0, stop=None, shapes=SHAPES):
    """Values that tell row, array and place apart and that float16 holds exactly enough to compare."""
    whole = {}
    for salt, (name, shape) in enumerate(sorted(shapes.items())):
        rng = np.random.default_rng(salt)
        whole[name] = rng.standard_normal((rows, *shape)).astype(np.float32)[start:stop]
    return whole


def fill(writer, units=None):
    for unit in writer.missing_units() if units is None else units:
        writer.write(unit, features(writer.rows, *writer.unit_rows(unit)))


def make(folder, rows=10, per_unit=4, **changes):
    final = folder / "made.zarr"
    with StoreWriter(final, folder / "made.partial", rows, SHAPES, MADE_BY | changes, per_unit) as writer:
        fill(writer)
        writer.finish()
    return final


def tree(folder):
    """Every file of a folder with its bytes."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def interrupted(folder, units=(0, 1), rows=10, per_unit=4, attributes=MADE_BY, shapes=SHAPES, **more):
    """A store of three units of which some are done."""
    with StoreWriter(
        folder / "made.zarr", folder / "made.partial", rows, shapes, attributes, per_unit, **more
    ) as writer:
        fill(writer, units)


# Reading back


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), per_unit=st.integers(1, 45))
def test_what_was_written_is_read_back_for_any_number_of_rows_and_size_of_unit(rows, per_unit):
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore.open(make(Path(folder), rows, per_unit))
        assert len(store) == rows
        for name, written in features(rows).items():
            read = store.read(name)
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, written.astype(np.float16).astype(np.float32))


@given(rows=st.integers(1, 10_000), per_unit=st.integers(1, 12_000))
def test_units_part_the_rows_without_gap_or_overlap(rows, per_unit):
    writer = StoreWriter("a.zarr", "a.partial", rows, SHAPES, {}, per_unit)
    ends = [writer.unit_rows(unit) for unit in range(writer.units)]
    assert ends[0][0] == 0 and ends[-1][1] == rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))
    assert all(0 < stop - start <= per_unit for start, stop in ends)


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, 256), (16_384, 256), (16_385, 512), (50_000, 1024), (200_000, 4096), (1_281_167, 4096)]
)
def test_units_are_small_for_small_sets_and_few_for_large_ones(rows, expected):
    assert default_rows_per_unit(rows) == expected


def test_units_of_patches_are_small_whatever_the_size_of_the_set(tmp_path):
    assert default_rows_per_unit(40, ["cls"]) == 256
    assert default_rows_per_unit(40, ["cls", "patches"]) == default_rows_per_unit(10**6, ["patches"]) == 32
    with StoreWriter(tmp_path / "a.zarr", tmp_path / "a.partial", 40, {"patches": (4, 2)}, MADE_BY) as writer:
        assert [writer.unit_rows(unit) for unit in range(writer.units)] == [(0, 32), (32, 40)]


def test_some_rows_are_read_as_they_are_stored(tmp_path):
    store = FeatureStore.open(make(tmp_path))
    rows = store.read_rows("registers", 3, 9)  # of three units
    assert rows.dtype == np.float16 and rows.shape == (6, 2, 8)
    np.testing.assert_array_equal(rows, features(10)["registers"][3:9].astype(np.float16))
    assert store.read_rows("cls", 4, 4).shape == (0, 8)
    with pytest.raises(IndexError, match=r"rows 8 to 11 are out of range: .* has rows 0 to 10"):
        store.read_rows("cls", 8, 11)
    with pytest.raises(KeyError, match="has no array 'patches'"):
        store.read_rows("patches", 0, 1)


def test_a_store_opens_with_its_attributes_and_shapes(tmp_path):
    store = FeatureStore.open(make(tmp_path))
    assert store.arrays == {"cls": (8,), "patch_mean": (8,), "registers": (2, 8)}
    assert store.attributes == MADE_BY | {
        "format": "regvit features",
        "format_version": 1,
        "rows": 10,
        "rows_per_unit": 4,
        "units": 3,
        "arrays": ["cls", "patch_mean", "registers"],
        "complete": True,
    }


def test_plain_zarr_reads_a_store_and_finds_its_axes_named(tmp_path):
    array = zarr.open_group(make(tmp_path), mode="r")["registers"]
    assert array.metadata.dimension_names == ("image", "register", "channel")
    assert array.dtype == np.float16 and array.chunks == (4, 2, 8)
    np.testing.assert_array_equal(array[:], features(10)["registers"].astype(np.float16))


def test_the_bytes_do_not_depend_on_the_order_of_attributes_or_arrays_or_units(tmp_path):
    plain = make(tmp_path / "a")
    final, partial = tmp_path / "b/made.zarr", tmp_path / "b/made.partial"
    backwards = dict(reversed(MADE_BY.items()))
    with StoreWriter(final, partial, 10, dict(reversed(SHAPES.items())), backwards, 4) as writer:
        fill(writer, [2, 0, 1])
        writer.finish()
    assert tree(plain) == tree(final)


def test_a_finished_store_leaves_nothing_else_and_names_no_place_or_time(tmp_path):
    final = make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["made.zarr"]
    everything = b"".join(tree(final).values())
    assert str(tmp_path).encode() not in everything and str(os.getpid()).encode() not in everything
    assert not list(final.rglob("*.partial"))


def test_the_digest_of_a_store_changes_with_any_byte_or_name_and_with_nothing_else(tmp_path):
    final = make(tmp_path)
    digest = FeatureStore.open(final).digest()
    assert FeatureStore.open(make(tmp_path / "again")).digest() == digest
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in tree(final).items()]
    assert digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    opened = FeatureStore.open(final)
    (final / "cls/c.1.0").write_bytes(bytes(len((final / "cls/c.1.0").read_bytes())))
    assert opened.digest() != digest


# Interruptions


def read_lines(log):
    return log.read_bytes().splitlines() if log.exists() else []


def kill_writers(folder):
    """Starts writers of 150 units and kills each at a random moment, fourteen times; then lets one come to its end.

    Every other one is given time to finish a unit first, so that there is work done also where disks are slow.

    Runs in a process of its own that never calls zarr itself, so that it can fork and pay for imports once.
    """
    moments, log = random.Random(0), folder / "made.partial/done.jsonl"
    for kill in range(15):
        writer = os.fork()
        if writer == 0:
            with StoreWriter(folder / "made.zarr", folder / "made.partial", 600, SHAPES, MADE_BY, 4) as store:
                (folder / "at work").touch()
                fill(store)
                store.finish()
            os._exit(0)
        while kill < 14 and not (folder / "at work").exists():
            time.sleep(0.001)
        if kill < 14:
            before = len(read_lines(log))
            while kill % 2 and len(read_lines(log)) == before:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.01))
            os.kill(writer, signal.SIGKILL)
            (folder / "at work").unlink()
        _, status = os.waitpid(writer, 0)
        assert status == (signal.SIGKILL if kill < 14 else 0), f"writer {kill} ended with status {status}"
        print(len(read_lines(log)), end=" ")


def test_a_store_killed_at_random_moments_ends_in_the_same_bytes(tmp_path):
    undisturbed = make(tmp_path / "undisturbed", 600, 4)
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], check=True, capture_output=True, text=True
    ).stdout.split()
    units_done = [int(count) for count in done[:-1]]
    assert len(units_done) == 14 and units_done == sorted(units_done)  # what is recorded is never lost
    assert units_done[7] > 0 and units_done[-1] < 150  # half of them at least were killed with work done, all with more
    assert tree(tmp_path / "made.zarr") == tree(undisturbed)
    assert not (tmp_path / "made.partial").exists()


@pytest.mark.parametrize("after", range(9))
def test_a_kill_after_any_chunk_loses_only_the_unit_it_was_in(tmp_path, after, monkeypatch):
    """The process stops dead after a given number of chunk writes; nothing is cleaned up."""
    undisturbed = make(tmp_path / "undisturbed")
    written = []

    def sync_or_stop(path):
        sync(path)
        if path.name.startswith("c."):
            written.append(path)
            if len(written) == after + 1:
                raise KeyboardInterrupt

    monkeypatch.setattr("regvit.features.store_writer.sync", sync_or_stop)
    with contextlib.suppress(KeyboardInterrupt):
        interrupted(tmp_path, units=(0, 1, 2))
    monkeypatch.undo()
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4) as writer:
        assert writer.missing_units() == list(range(after // 3, 3))
        assert writer.note == f"resumed: {after // 3} of 3 units were done"
        chunks = [f.name for f in (tmp_path / "made.partial/store").rglob("c.*")]
        assert len(chunks) == 3 * (after // 3)  # nothing is left of units that are not done
        fill(writer)
        writer.finish()
    assert tree(tmp_path / "made.zarr") == tree(undisturbed)


@pytest.mark.parametrize("tail", [b'{"un', b'{"unit": 1', b"\0\0\0\0\n", b'{"unit": 2}\xff\n', b"7\n"])
def test_a_torn_record_is_cut_off_and_its_unit_done_again(tmp_path, tail):
    interrupted(tmp_path, units=[0])
    log = tmp_path / "made.partial/done.jsonl"
    log.write_bytes(log.read_bytes() + tail)
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4) as writer:
        assert writer.missing_units() == [1, 2]
        fill(writer)
        assert log.read_text() == '{"unit": 0}\n{"unit": 1}\n{"unit": 2}\n'
        writer.finish()
    FeatureStore.open(tmp_path / "made.zarr")


def test_temporary_files_of_a_killed_writer_are_swept(tmp_path):
    interrupted(tmp_path)
    stray = tmp_path / "made.partial/store/cls/c.2.0123.partial"
    stray.write_bytes(b"half a chunk")
    make(tmp_path)
    assert tree(tmp_path / "made.zarr") == tree(make(tmp_path / "undisturbed"))


def test_a_stop_between_marking_complete_and_renaming_is_resumed(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("regvit.features.store_writer.move_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "made.zarr").exists()
    assert tree(make(tmp_path)) == tree(make(tmp_path / "undisturbed"))


@pytest.mark.parametrize("key", sorted(MADE_BY))
def test_a_change_of_any_attribute_starts_anew_and_says_why(tmp_path, key):
    interrupted(tmp_path)
    new = {"size": 64, "crop_pct": 1.0} if key == "transform" else "other"
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY | {key: new}, 4) as writer:
        assert writer.missing_units() == [0, 1, 2]
        where, old, now = (f"{key}.size", 32, 64) if key == "transform" else (key, repr(MADE_BY[key]), "'other'")
        expected = f"started anew, as the unfinished store differs: attributes.{where} was {old} and is {now}"
        assert writer.note == expected
        fill(writer)
        writer.finish()
    assert tree(tmp_path / "made.zarr") == tree(make(tmp_path / "undisturbed", **{key: new}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": 11}, "attributes.rows was 10 and is 11"),
        ({"per_unit": 5}, "attributes.rows_per_unit was 4 and is 5"),
        ({"shapes": {"cls": (8,)}}, "attributes.arrays was"),
        ({"shapes": SHAPES | {"cls": (9,)}}, "shapes.cls was [8] and is [9]"),
        ({"attributes": MADE_BY | {"neurons_sha256": "cd"}}, "attributes.neurons_sha256 was None and is 'cd'"),
        ({"resume_key": {"torch": "2.7"}}, "resume_key.torch was '2.6' and is '2.7'"),
    ],
)
def test_a_change_of_format_or_code_starts_anew_and_says_why(tmp_path, change, reason):
    same = {"rows": 10, "per_unit": 4, "shapes": SHAPES, "attributes": MADE_BY, "resume_key": {"torch": "2.6"}}
    interrupted(tmp_path, **same)
    rows, per_unit, shapes, attributes, key = (same | change).values()
    final, partial = tmp_path / "made.zarr", tmp_path / "made.partial"
    with StoreWriter(final, partial, rows, shapes, attributes, per_unit, key) as writer:
        assert writer.missing_units() == list(range(writer.units))
        assert reason in writer.note


def test_what_must_agree_for_a_resume_only_is_not_stored(tmp_path):
    stores = []
    for torch in ("2.6", "2.7"):
        final, partial = tmp_path / torch / "made.zarr", tmp_path / torch / "made.partial"
        with StoreWriter(final, partial, 10, SHAPES, MADE_BY, 4, {"torch": torch}) as writer:
            fill(writer)
            writer.finish()
        stores.append(tree(final))
    assert stores[0] == stores[1]


def test_a_working_folder_that_lost_its_store_starts_anew(tmp_path):
    interrupted(tmp_path)
    shutil.rmtree(tmp_path / "made.partial/store")
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4) as writer:
        assert writer.note.endswith("has lost its store") and writer.missing_units() == [0, 1, 2]


def test_a_second_writer_is_told_who_holds_the_store(tmp_path):
    arguments = tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4
    with StoreWriter(*arguments) as first:
        fill(first, [0])
        with (
            pytest.raises(FolderLocked, match=rf"is being written by process {os.getpid()} on .*; wait for it"),
            StoreWriter(*arguments),
        ):
            pass
        fill(first)  # the first one is not disturbed
        first.finish()
    FeatureStore.open(tmp_path / "made.zarr")


# What is refused when writing


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.nan, "nan is not a finite number"),
        (-np.inf, "-inf is not a finite number"),
        (65520.0, r"65520 is beyond float16 \(±65504\)"),
        (-1e30, r"-1e\+30 is beyond float16"),
    ],
)
def test_a_value_that_float16_cannot_hold_is_refused_with_its_array_and_row(tmp_path, value, text):
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4) as writer:
        unit = features(10, *writer.unit_rows(1))
        unit["registers"][2, 1, 3] = value
        with pytest.raises(UnstorableFeature, match=rf"array 'registers', row 6: {text}") as caught:
            writer.write(1, unit)
        assert (caught.value.array, caught.value.row) == ("registers", 6)
        assert writer.missing_units() == [0, 1, 2]
        assert not list((tmp_path / "made.partial/store").rglob("c.1.*"))  # no array of the unit was written


def test_the_largest_float16_is_stored(tmp_path):
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 1, {"cls": (2,)}, {}) as writer:
        writer.write(0, {"cls": np.array([[65504.0, -65519.0]])})  # 65519 rounds down to 65504
        writer.finish()
    assert FeatureStore.open(tmp_path / "made.zarr").read("cls").tolist() == [[65504.0, -65504.0]]


def test_arrays_of_the_wrong_name_or_shape_are_refused(tmp_path):
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4) as writer:
        unit = features(10, 0, 4)
        with pytest.raises(ValueError, match=r"unit 0 has the arrays \['cls'\], expected \['cls', 'patch_mean', 'reg"):
            writer.write(0, {"cls": unit["cls"]})
        with pytest.raises(ValueError, match=r"unit 2, array 'cls' has shape \(4, 8\), expected \(2, 8\)"):
            writer.write(2, unit)
        with pytest.raises(IndexError, match=r"unit 3 is out of range \(0 to 2\)"):
            writer.write(3, unit)


def test_an_unfinished_store_is_not_given_its_final_name(tmp_path):
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4) as writer:
        fill(writer, [0])
        with pytest.raises(ValueError, match=r"lacks 2 of 3 units \(the first is 1\)"):
            writer.finish()
    assert not (tmp_path / "made.zarr").exists()


def test_an_existing_store_is_never_overwritten(tmp_path):
    final = make(tmp_path)
    before = tree(final)
    with pytest.raises(FileExistsError, match=r"made.zarr exists; delete it"):
        make(tmp_path)
    assert tree(final) == before


@pytest.mark.parametrize("bad", [{"rows": 3}, {"complete": True}])
def test_attributes_may_not_pass_for_the_stores_own(bad):
    with pytest.raises(ValueError, match=r"attribute '\w+' is the store's own"):
        StoreWriter("a.zarr", "a.partial", 10, SHAPES, bad)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match=r"rows 0 and rows_per_unit 256 must be at least 1"):
        StoreWriter("a.zarr", "a.partial", 0, SHAPES, {})


def test_writing_needs_an_open_writer(tmp_path):
    writer = StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4)
    with pytest.raises(RuntimeError, match=r"not open; use it in a `with` block"):
        writer.write(0, features(10, 0, 4))


def test_a_store_can_move_to_another_file_system(tmp_path):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_text("x")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        move_folder(tmp_path / "a", Path(folder, "new/a"))
        assert tree(Path(folder)) == {"new/a/b/c": b"x"}
    assert not (tmp_path / "a").exists()


# Threads


def test_threads_that_write_different_units_leave_the_bytes_of_one_alone(tmp_path, monkeypatch):
    inside, most, started = threading.Lock(), [], []

    def append_alone(path, record):
        assert inside.acquire(blocking=False), "two records are appended at the same time"
        time.sleep(0.002)
        append_record(path, record)
        most.append(record["unit"])
        inside.release()

    plain = StoreWriter.unit_writer

    def unit_writer(self):
        started.append(self)
        time.sleep(0.01)
        return plain(self)

    monkeypatch.setattr("regvit.features.store_writer.append_record", append_alone)
    monkeypatch.setattr(StoreWriter, "unit_writer", unit_writer)
    with StoreWriter(tmp_path / "a/made.zarr", tmp_path / "a/made.partial", 90, SHAPES, MADE_BY, 4) as writer:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda unit: fill(writer, [unit]), range(writer.units)))
        assert sorted(most) == list(range(23)) and len(started) == 1 and writer.missing_units() == []
        writer.finish()
    monkeypatch.undo()
    assert tree(tmp_path / "a/made.zarr") == tree(make(tmp_path, 90, 4))


def test_threads_that_write_together_are_told_each_of_its_own_bad_unit(tmp_path):
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4) as writer:
        arrays = [features(10, *writer.unit_rows(unit)) for unit in range(3)]
        arrays[1]["cls"][2, 3] = np.nan
        with ThreadPoolExecutor(3) as pool:
            ends = [pool.submit(writer.write, unit, arrays[unit]) for unit in range(3)]
        with pytest.raises(UnstorableFeature, match=r"array 'cls', row 6: nan is not a finite number"):
            ends[1].result()
        assert writer.missing_units() == [1]


# What is refused when opening


def change_attributes(final, **values):
    file = final / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"].update(values)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "cls/c.1.0").unlink(),
            r"lacks 1 of 3 chunks of array 'cls' \(cls/c.1.0\); `dvc pull` all of it",
        ),
        (lambda f: os.truncate(f / "registers/c.0.0.0", 100), r"c.0.0.0 has 100 bytes, expected 132"),
        (
            lambda f: shutil.rmtree(f / "registers"),
            r"has the arrays cls, patch_mean, expected cls, patch_mean, registers",
        ),
        (lambda f: (f / "zarr.json").unlink(), r"is not a zarr v3 group"),
        (lambda f: (f / "zarr.json").write_text("{"), r"is not a zarr v3 group"),
        (lambda f: change_attributes(f, complete=False), r"is unfinished: `complete` is not set"),
        (lambda f: change_attributes(f, format="x"), r"has format 'x', expected 'regvit features'"),
        (lambda f: change_attributes(f, format_version=2), r"has format version 2 and this code reads 1"),
        (lambda f: change_attributes(f, rows=9), r"has shape \(10, 8\), .* expected 9 rows"),
    ],
)
def test_a_damaged_store_does_not_open(tmp_path, damage, message):
    final = make(tmp_path)
    damage(final)
    with pytest.raises(InvalidStore, match=message):
        FeatureStore.open(final)


def test_an_unfinished_store_does_not_open_wherever_it_lies(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(InvalidStore, match=r"is unfinished"):
        FeatureStore.open(tmp_path / "made.partial/store")
    with pytest.raises(InvalidStore, match=r"is not a zarr v3 group"):
        FeatureStore.open(tmp_path / "made.partial")
    with pytest.raises(FileNotFoundError, match=r"made.zarr does not exist; run the extract stage"):
        FeatureStore.open(tmp_path / "made.zarr")


def test_zeroed_bytes_inside_a_chunk_are_noticed_when_read(tmp_path):
    final = make(tmp_path)
    chunk = final / "cls/c.1.0"
    content = bytearray(chunk.read_bytes())
    content[16:32] = bytes(16)
    chunk.write_bytes(content)
    store = FeatureStore.open(final)
    with pytest.raises(InvalidStore, match=r"array 'cls': .*checksum.* a chunk is damaged"):
        store.read("cls")
    store.read("registers")


def test_an_unknown_array_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(KeyError, match=r"has no array 'patches'; it has cls, patch_mean, registers"):
        FeatureStore.open(make(tmp_path)).read("patches")


def test_a_store_of_another_manifest_or_other_images_is_refused(tmp_path):
    ids = [f"image {i}" for i in range(10)]
    final = make(tmp_path, manifest_sha256="m1", image_ids_sha256=image_ids_digest(ids))
    FeatureStore.open(final, "m1", ids)
    with pytest.raises(
        InvalidStore, match=r"was made from a manifest with SHA-256 m1, and the data set at hand has m2"
    ):
        FeatureStore.open(final, "m2")
    with pytest.raises(InvalidStore, match=r"has 10 rows, and the data set 9 images"):
        FeatureStore.open(final, image_ids=ids[:9])
    with pytest.raises(InvalidStore, match=r"has other images, or another order"):
        FeatureStore.open(final, image_ids=ids[::-1])


def test_the_digest_of_image_ids_is_that_of_their_lines():
    # printf 'a\nb' | sha256sum
    assert image_ids_digest(["a", "b"]) == "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"


def test_a_fingerprint_does_not_depend_on_the_order_of_keys_and_refuses_what_is_not_json():
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    with pytest.raises(TypeError):
        fingerprint({"a": Path("x")})
    with pytest.raises(ValueError, match="Out of range float"):
        fingerprint({"a": float("nan")})


# Units written by other processes


def test_a_unit_that_another_process_wrote_counts_when_it_is_recorded(tmp_path):
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4) as writer:
        worker = pickle.loads(pickle.dumps(writer.unit_writer()))
        assert worker.partial.is_absolute()
        for unit in (1, 2, 0):
            receipt = worker.write(unit, features(10, *writer.unit_rows(unit)))
            assert unit in writer.missing_units()
            writer.record(unit, receipt | {"device": "x"})
            assert unit not in writer.missing_units()
        worker.write(1, features(10, 4, 8))  # once more, as one that was believed dead
        assert writer.records[2] == {"unit": 2, "device": "x"}
        writer.finish()
    assert tree(tmp_path / "made.zarr") == tree(make(tmp_path / "undisturbed"))


def test_records_are_known_again_after_an_interruption(tmp_path):
    arguments = tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4
    with StoreWriter(*arguments) as writer:
        writer.record(1, writer.unit_writer().write(1, features(10, 4, 8)) | {"device": "x"})
    with StoreWriter(*arguments) as writer:
        assert writer.records == {1: {"unit": 1, "device": "x"}}


def test_a_worker_that_does_not_see_the_folder_or_sees_one_begun_anew_writes_nothing(tmp_path):
    arguments = tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES
    with StoreWriter(*arguments, MADE_BY, 4) as writer:
        old = writer.unit_writer()
        away = dataclasses.replace(old, partial=tmp_path / "elsewhere")
        with pytest.raises(
            OutOfReach, match=r"elsewhere is no unfinished store as process \d+ on .* sees it; it must lie"
        ):
            away.write(0, features(10, 0, 4))
        assert not (tmp_path / "elsewhere").exists()
    with StoreWriter(*arguments, MADE_BY | {"precision": "bfloat16"}, 4) as writer:
        with pytest.raises(OutOfReach, match=r"was begun anew with other settings; process .* gives up its unit"):
            old.write(0, features(10, 0, 4))
        assert not list((tmp_path / "made.partial/store").rglob("c.*"))


def test_a_unit_whose_chunks_are_not_to_be_seen_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("regvit.features.store_writer.SEEN_WITHIN", 0.3)
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4) as writer:
        with pytest.raises(OutOfReach, match=r"made.partial shows no chunks of unit 1, which another process wrote"):
            writer.record(1, {})
        assert writer.missing_units() == [0, 1, 2]


def test_chunks_that_a_network_file_system_shows_late_are_waited_for(tmp_path):
    with StoreWriter(tmp_path / "made.zarr", tmp_path / "made.partial", 10, SHAPES, MADE_BY, 4) as writer:
        late = threading.Timer(0.5, writer.unit_writer().write, (0, features(10, 0, 4)))
        late.start()
        writer.record(0, {})
        late.join()
        assert writer.missing_units() == [1, 2]


def test_an_unstorable_feature_is_the_same_in_another_process():
    error = pickle.loads(pickle.dumps(UnstorableFeature("cls", 7, float("inf"))))
    assert (error.array, error.row, error.value) == ("cls", 7, float("inf"))
    assert str(error) == "array 'cls', row 7: inf is not a finite number"


if __name__ == "__main__":
    kill_writers(Path(sys.argv[1]))
