import dataclasses
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from extracting import tree
from made_stores import ARRAYS, MADE_BY, features, fill, interrupted, make, writer_of

from regvit.features import store_writer
from regvit.features.store import ArraySpec, FeatureStore
from regvit.features.store_writer import OutOfReach, UnstorableFeature, write_store
from regvit.files import sync

# Interruptions


def recorded(folder):
    return len(list((folder / "made.partial/done").glob("*")))


def kill_writers(folder):
    """Starts writers of 100 units and kills each at a random moment, fourteen times; then lets one come to its end.

    Every other one is given time to finish a unit first, so that there is work done also where disks are slow.

    Runs in a process of its own that never calls zarr itself, so that it can fork and pay for imports once.
    """
    moments = random.Random(0)
    for kill in range(15):
        writer = os.fork()
        if writer == 0:
            with writer_of(folder, 400, 4) as store:
                (folder / "at work").touch()
                fill(store)
                store.finish()
            os._exit(0)
        while kill < 14 and not (folder / "at work").exists():
            time.sleep(0.001)
        if kill < 14:
            before = recorded(folder)
            while kill % 2 and recorded(folder) == before:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.006))
            os.kill(writer, signal.SIGKILL)
            (folder / "at work").unlink()
        _, status = os.waitpid(writer, 0)
        assert status == (signal.SIGKILL if kill < 14 else 0), f"writer {kill} ended with status {status}"
        print(recorded(folder), end=" ")


def test_a_store_killed_at_random_moments_ends_in_the_same_bytes(tmp_path):
    undisturbed = make(tmp_path / "undisturbed", 400, 4)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the helpers of the tests
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], check=True, capture_output=True, text=True, env=environment
    )
    units_done = [int(count) for count in done.stdout.split()[:-1]]
    assert len(units_done) == 14 and units_done == sorted(units_done)  # what is recorded is never lost
    assert units_done[7] > 0 and units_done[-1] < 100  # half of them at least were killed with work done, all with more
    assert tree(tmp_path / "made.zarr") == tree(undisturbed)
    assert not (tmp_path / "made.partial").exists()


@pytest.mark.parametrize("after", (0, 2, 4, 8))
def test_a_kill_after_any_chunk_loses_only_the_unit_it_was_in(tmp_path, after, monkeypatch):
    """The process stops dead after a given number of chunk writes; nothing is cleaned up."""
    written = []

    def sync_or_stop(path):
        sync(path)
        if path.name.startswith("c."):
            written.append(path)
            if len(written) == after + 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(store_writer, "sync", sync_or_stop)
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, units=(0, 1, 2))
    monkeypatch.undo()
    with writer_of(tmp_path) as writer:
        assert writer.missing_units() == list(range(after // 3, 3))
        assert writer.note == f"resumed: {after // 3} of 3 units were done"
        chunks = [f.name for f in (tmp_path / "made.partial/store").rglob("c.*")]
        assert len(chunks) == 3 * (after // 3)  # nothing is left of units that are not done
        fill(writer)
        writer.finish()
    assert tree(tmp_path / "made.zarr") == tree(make(tmp_path / "undisturbed"))


@pytest.mark.parametrize("record", ["7", "-1", "zero"])
def test_records_of_units_that_there_are_not_do_not_pass_for_work_that_is_done(tmp_path, record):
    interrupted(tmp_path, units=[0])
    (tmp_path / "made.partial/done" / record).touch()
    (tmp_path / "made.partial/done/2").touch()  # nor does one without chunks
    with writer_of(tmp_path) as writer:
        assert writer.missing_units() == [1, 2]


@pytest.mark.parametrize("lost", ["store/zarr.json", "store/cls", "store/cls/c.0.0", "done"])
def test_a_store_that_lost_a_part_is_never_completed_without_it(tmp_path, lost):
    interrupted(tmp_path)
    (tmp_path / "made.partial/store/cls/c.2.0123.partial").write_bytes(b"half a chunk of a killed writer")
    path = tmp_path / "made.partial" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert tree(make(tmp_path)) == tree(make(tmp_path / "undisturbed"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": 11}, "rows"),
        ({"per_unit": 5}, "rows_per_unit"),
        ({"arrays": ARRAYS | {"cls": ArraySpec((9,))}}, "cls"),
        ({"arrays": ARRAYS | {"cls": ArraySpec((8,), "float32")}}, "cls"),
    ],
)
def test_a_change_of_shape_starts_anew_and_says_why(tmp_path, change, reason):
    same = {"rows": 10, "per_unit": 4, "arrays": ARRAYS, "attributes": MADE_BY, "resume_key": {"torch": "2.6"}}
    interrupted(tmp_path, **same)
    with writer_of(tmp_path, **(same | change)) as writer:
        assert writer.missing_units() == list(range(writer.layout.units))
        assert writer.note.startswith("started anew, as the unfinished store differs: ")
        assert set(reason.split(", ")) <= set(writer.note.partition(": ")[2].split(", "))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff"])
def test_a_damaged_description_starts_anew(tmp_path, content):
    interrupted(tmp_path)
    (tmp_path / "made.partial/resume.json").write_bytes(content)
    with writer_of(tmp_path) as writer:
        assert writer.note == f"started anew: {tmp_path / 'made.partial/resume.json'} is damaged"
        assert writer.missing_units() == [0, 1, 2]


def test_what_must_agree_for_a_resume_only_is_not_stored(tmp_path):
    stores = []
    for torch in ("2.6", "2.7"):
        with writer_of(tmp_path / torch, resume_key={"torch": torch}) as writer:
            fill(writer)
            writer.finish()
        stores.append(tree(tmp_path / torch / "made.zarr"))
    assert stores[0] == stores[1]


# What is refused when writing


@pytest.mark.parametrize("value", [np.nan, -np.inf, 65520.0])
def test_a_value_that_float16_cannot_hold_is_refused_with_its_array_and_row(tmp_path, value):
    with writer_of(tmp_path) as writer:
        unit = features(10, *writer.layout.unit_rows(1))
        unit["registers"][2, 1, 3] = value
        with pytest.raises(
            UnstorableFeature, match=rf"array 'registers', row 6: {re.escape(f'{value:g}')} is"
        ) as caught:
            writer.write(1, unit)
        again = pickle.loads(pickle.dumps(caught.value))  # it comes from other processes too
        assert (again.array, again.row, str(again)) == ("registers", 6, str(caught.value))
        assert writer.missing_units() == [0, 1, 2]
        assert not list((tmp_path / "made.partial/store").rglob("c.1.*"))  # no array of the unit was written


def test_the_largest_float16_is_stored(tmp_path):
    write_store(tmp_path / "made.zarr", {"cls": np.array([[65504.0, -65519.0]])}, {})  # 65519 rounds down to 65504
    assert FeatureStore.open(tmp_path / "made.zarr").read("cls").tolist() == [[65504.0, -65504.0]]


def test_arrays_of_the_wrong_name_shape_or_kind_are_refused(tmp_path):
    with writer_of(tmp_path) as writer:
        unit = features(10, 0, 4)
        with pytest.raises(
            ValueError, match=r"unit 0 has the arrays \['cls'\], expected \['cls', 'far', 'registers'\]"
        ):
            writer.write(0, {"cls": unit["cls"]})
        with pytest.raises(ValueError, match=r"rows 8 to 10, array 'cls' has shape \(4, 8\), expected \(2, 8\)"):
            writer.write(2, unit)
        with pytest.raises(ValueError, match="array 'cls' is to hold float16 and was given int64"):
            writer.write(0, unit | {"cls": np.zeros((4, 8), int)})
        with pytest.raises(IndexError, match=r"unit 3 is out of range \(0 to 2\)"):
            writer.write(3, unit)


def test_an_unfinished_store_gets_no_final_name_and_a_finished_one_is_never_overwritten(tmp_path):
    with writer_of(tmp_path) as writer:
        fill(writer, [0])
        with pytest.raises(ValueError, match=r"lacks 2 of 3 units \(the first is 1\)"):
            writer.finish()
    assert not (tmp_path / "made.zarr").exists()
    before = tree(make(tmp_path))
    with pytest.raises(FileExistsError, match=r"made.zarr exists; delete it"):
        make(tmp_path)
    assert tree(tmp_path / "made.zarr") == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"attributes": {"complete": True}}, r"attribute 'complete' is the store's own"),
        ({"attributes": {"x": float("nan")}}, "not JSON compliant"),
        ({"rows": 0}, "rows 0 and rows_per_unit 4 must be at least 1"),
        ({"arrays": {}}, r"there must be an array \(given: none\)"),
        ({"arrays": {"a": ArraySpec((1,), "bfloat16")}}, "type bfloat16 cannot be stored; expected one of float16"),
    ],
)
def test_what_cannot_be_a_store_is_refused_before_anything_is_written(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        writer_of(tmp_path, **bad)
    assert not list(tmp_path.iterdir())


def test_threads_that_write_different_units_leave_the_bytes_of_one_and_are_told_each_of_its_own_bad_unit(tmp_path):
    def write(unit):
        arrays = features(90, *writer.layout.unit_rows(unit))
        if unit == 5:
            arrays["cls"][2, 3] = np.nan
        writer.write(unit, arrays)

    with writer_of(tmp_path / "a", 90) as writer:
        with ThreadPoolExecutor(6) as pool:
            ends = [pool.submit(write, unit) for unit in range(23)]
        with pytest.raises(UnstorableFeature, match=r"array 'cls', row 22: nan is"):
            ends[5].result()
        assert writer.missing_units() == [5]
        fill(writer)
        writer.finish()
    assert tree(tmp_path / "a/made.zarr") == tree(make(tmp_path, 90, 4))


# Units written by other processes


def test_a_unit_that_another_process_wrote_counts_when_it_is_recorded(tmp_path):
    with writer_of(tmp_path) as writer:
        worker = pickle.loads(pickle.dumps(writer.unit_writer()))
        assert worker.partial.is_absolute()
        for unit in (1, 2, 0):
            worker.write(unit, features(10, *writer.layout.unit_rows(unit)))
            assert unit in writer.missing_units()
            writer.record(unit, "some GPU")
            assert unit not in writer.missing_units()
        worker.write(1, features(10, 4, 8))  # once more, as one that was believed dead
    with writer_of(tmp_path) as writer:  # known again after an interruption
        assert writer.done == dict.fromkeys(range(3), "some GPU")
        writer.finish()
    assert tree(tmp_path / "made.zarr") == tree(make(tmp_path / "undisturbed"))


def test_a_worker_that_does_not_see_the_folder_or_sees_one_begun_anew_writes_nothing(tmp_path):
    with writer_of(tmp_path) as writer:
        old = writer.unit_writer()
        away = dataclasses.replace(old, partial=tmp_path / "elsewhere")
        with pytest.raises(OutOfReach, match=r"elsewhere is no unfinished store as process \d+ on .* sees it; it must"):
            away.write(0, features(10, 0, 4))
        assert not (tmp_path / "elsewhere").exists()
    with writer_of(tmp_path, attributes={"precision": "bfloat16"}):
        with pytest.raises(OutOfReach, match=r"was begun anew with other settings; process .* gives up its unit"):
            old.write(0, features(10, 0, 4))
        assert not list((tmp_path / "made.partial/store").rglob("c.*"))


if __name__ == "__main__":
    kill_writers(Path(sys.argv[1]))
