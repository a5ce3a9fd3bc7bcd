"""Sudden death of every stage that writes, at moments chosen and at random, and disks that are full or may not be written
to: nothing is lost, nothing is left half-written, what stopped it is said.

By default some 150 kills; REGVIT_KILLS=1 in the environment asks for many more (before every single change that a stage
makes to the disk, and 150 at random in extraction), which takes a few minutes.
"""

import csv
import errno
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from trust_project import ORDER, Stages, Undisturbed, results, tree

from regvit.features.store import ArraySpec, FeatureStore
from regvit.features.store_writer import StoreWriter

MANY = bool(os.environ.get("REGVIT_KILLS"))
KILLS_IN_EXTRACTION = 150 if MANY else 30
# Each script once for each way of writing that it has: its other names only have it compute something else.
DISTINCT = [stage for stage in ORDER if "plain" not in stage and "alien" not in stage
            and (stage[0] != "extract_dense" or stage[2] == "rooms")]  # fmt: skip
TO_THE_PROBE = (("download", "home"), ("backbone", "tiny"), ("identify", "tiny"), ("compose", "plain"),
                ("compose", "cured"), ("extract", "cured", "home"), ("probe", "cured"))  # fmt: skip


@pytest.fixture(scope="module")
def stages():
    with Stages() as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(stages, tmp_path_factory):
    return Undisturbed(stages, tmp_path_factory.mktemp("undisturbed"))


def under_final_names(folder):
    """What the stages left, but for what is still in a hidden folder or said to be partial, and curves that grow."""
    return {name: content for name, content in results(folder).items() if "/probe/curves/" not in name
            and not any(part.startswith(".") or part.endswith(".partial") for part in name.split("/"))}  # fmt: skip


def forget(folder, there):
    """Deletes all but what was there, as DVC does before it runs a stage."""
    for path in sorted(set(folder.rglob("*")) - there, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def disturb(stages, project, stage, disturbances):
    """Runs the stage with one disturbance after another in the same folder, then undisturbed; returns how those ended.

    A run that goes on from the one before may be done before it is disturbed: it is run from nothing then. With
    REGVIT_KILLS every one of them is, and comes to its end after each disturbance.
    """
    folder, endings = project.folder, []
    for disturbance in disturbances:
        ended = stages.run(folder, *stage, **disturbance)
        if ended.status == 0:
            assert results(folder) == project.finished
            forget(folder, project.there)
            ended = stages.run(folder, *stage, **disturbance)
        endings.append(ended)
        for name, content in under_final_names(folder).items():
            assert content == project.finished[name], f"{name} is half-written after {disturbance}"
        if MANY or disturbance is disturbances[-1]:
            stages.finish(folder, *stage)
            assert results(folder) == project.finished
            assert not list(folder.glob("work/*.partial"))
            forget(folder, project.there)
    return endings


@pytest.mark.parametrize("stage", ORDER if MANY else DISTINCT, ids="-".join)
def test_a_stage_killed_before_a_change_to_the_disk_leaves_nothing_half_written_and_ends_in_the_same_bytes(
    stage, stages, undisturbed, tmp_path
):
    """A stage makes the same changes in the same order each time."""
    project = undisturbed.before(stage, tmp_path / "project")
    last = project.ended.changes - 1
    assert stages.run(project.folder, *stage, die_at=0).status == -signal.SIGKILL
    assert set(project.folder.rglob("*")) == project.there
    points = range(1, last + 1) if MANY else (last, last // 2)
    for point, killed in zip(points, disturb(stages, project, stage, [{"die_at": at} for at in points]), strict=True):
        assert killed.status == -signal.SIGKILL, f"change {point} of {last} was not reached:\n{killed.text}"


@pytest.mark.parametrize("stage", ORDER if MANY else DISTINCT, ids="-".join)
def test_a_stage_killed_in_the_middle_of_writing_a_file_leaves_no_torn_one_and_ends_in_the_same_bytes(
    stage, stages, undisturbed, tmp_path
):
    """The kernel kills it where a file grows beyond a size: half of that of its largest, middle or smallest output."""
    project = undisturbed.before(stage, tmp_path / "project")
    sizes = sorted((len(content) for content in undisturbed.outputs[stage].values() if len(content) > 16), reverse=True)
    sizes = sizes if MANY else (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    halves = [{"dies_beyond": size // 2} for size in dict.fromkeys(sizes)]
    for half, killed in zip(halves, disturb(stages, project, stage, halves), strict=True):
        assert killed.status == -signal.SIGXFSZ, f"no file grew beyond {half} bytes:\n{killed.text}"


def test_every_stage_from_nothing_killed_at_a_random_moment_ends_in_the_bytes_of_the_first_run(
    stages, undisturbed, tmp_path
):
    folder, moments = undisturbed.before(ORDER[0], tmp_path / "again").folder, random.Random(0)
    for stage in ORDER:
        there, seconds = set(folder.rglob("*")), undisturbed.ended[stage].seconds
        for _ in range(10 if MANY else 1):
            forget(folder, there)
            while stages.run(folder, *stage, die_after=moments.uniform(0, seconds)).status != -signal.SIGKILL:
                forget(folder, there)
                seconds /= 2  # the kill came too late
            stages.finish(folder, *stage)
            for name, content in undisturbed.outputs[stage].items():
                assert (folder / name).read_bytes() == content, f"{stage} left another {name}"
    assert results(folder) == results(undisturbed.folder)


def test_an_extraction_killed_again_and_again_at_random_goes_on_each_time_and_ends_in_the_same_bytes(
    stages, undisturbed, tmp_path
):
    """Every other kill falls at a random time, every other before a random change to the disk, a few units after the
    last; when the store is done it is begun anew, until there were enough kills."""
    stage = ("extract", "cured", "home")
    project = undisturbed.before(stage, tmp_path / "project")
    folder = project.folder
    moments, kills, finished, resumed = random.Random(0), 0, 0, 0
    done = 0  # units recorded so far
    while kills < KILLS_IN_EXTRACTION or not finished:
        at, after = moments.randint(0, project.ended.changes // 2), moments.uniform(0.2, 1.0) * project.ended.seconds
        moment = {"die_after": after} if kills % 2 else {"die_at": at}
        run = stages.run(folder, *stage, **moment)
        resumed += "resumed: " in run.text
        kills += run.status == -signal.SIGKILL
        if results(folder) == project.finished:  # also where it was killed when all was done, on its way out
            finished, done = finished + 1, 0
            shutil.rmtree(folder / "features/cured/home.zarr")
            shutil.rmtree(folder / "work", ignore_errors=True)
        else:
            assert run.status == -signal.SIGKILL, run.text
            before_it, done = done, recorded(folder)
            assert done >= before_it, f"of {before_it} units recorded {done} are left: {run.text}"
            assert all(content == project.finished[name] for name, content in under_final_names(folder).items())
    assert resumed >= KILLS_IN_EXTRACTION // 4
    stages.finish(folder, *stage)
    assert results(folder) == project.finished


def recorded(folder):
    """Units of the unfinished store that are done: records, where the store is there that they are of."""
    begun = list((folder / "work").glob("*.partial/resume.json"))
    return len(list((begun[0].parent / "done").iterdir())) if begun else 0


# Ctrl-C.


def test_ctrl_c_in_an_extraction_says_what_is_safe_and_the_next_run_goes_on_from_there(stages, undisturbed, tmp_path):
    stage = ("extract", "cured", "home")
    project = undisturbed.before(stage, tmp_path / "project")
    folder = project.folder
    stopped = stages.run(folder, *stage, die_at=project.ended.changes // 2, signal=int(signal.SIGINT))
    assert stopped.status == 130 and "Traceback" not in stopped.text
    assert (
        "units are safe in work/features-cured-home-" in stopped.text and "run the same again to go on" in stopped.text
    )
    assert results(folder) == project.start
    assert "resumed: " in stages.finish(folder, *stage).text
    assert results(folder) == project.finished


def test_ctrl_c_in_the_training_of_probes_says_what_is_safe_and_the_next_run_goes_on_from_there(
    stages, undisturbed, tmp_path
):
    stage = ("probe", "cured")
    project = undisturbed.before(stage, tmp_path / "project")
    folder = project.folder
    stopped = stages.run(folder, *stage, die_at=project.ended.changes // 2, signal=int(signal.SIGINT))
    assert stopped.status == 130 and "Traceback" not in stopped.text
    assert "steps are safe in work/probe-cured-" in stopped.text
    assert under_final_names(folder) == {
        name: each for name, each in project.start.items() if "/probe/curves/" not in name
    }
    assert "resumed: " in stages.finish(folder, *stage).text
    assert results(folder) == project.finished


@pytest.mark.parametrize("stage", [("download", "rooms"), ("backbone", "tiny"), ("identify", "tiny")], ids="-".join)
def test_ctrl_c_elsewhere_leaves_nothing_under_a_final_name_and_the_next_run_is_as_if_nothing_had_been(
    stage, stages, undisturbed, tmp_path
):
    project = undisturbed.before(stage, tmp_path / "project")
    folder = project.folder
    stopped = stages.run(folder, *stage, die_at=project.ended.changes // 2, signal=int(signal.SIGINT))
    assert stopped.status == 130 and "Traceback" not in stopped.text and "interrupted" in stopped.text
    assert all(content == project.finished[name] for name, content in under_final_names(folder).items())
    stages.finish(folder, *stage)
    assert results(folder) == project.finished


# Two at once.


def test_of_two_extractions_of_one_store_the_second_says_who_holds_it_and_the_first_is_not_disturbed(
    stages, undisturbed, tmp_path
):
    stage = ("extract", "cured", "home")
    project = undisturbed.before(stage, tmp_path / "project")
    folder = project.folder
    stages.run(folder, *stage, die_at=project.ended.changes // 3, signal=0, wait=1.5, go_on=True)
    while not list((folder / "work").glob("*.partial/resume.json")):
        time.sleep(0.01)
    second = stages.run(folder, *stage)  # also waits for the first, which must end well
    assert second.status == 1, second.text
    assert "is being written by process " in second.text and "wait for it, or end it and run again" in second.text
    assert results(folder) == project.finished


def test_of_two_downloads_of_one_data_set_the_second_says_who_holds_it_and_the_first_is_not_disturbed(
    stages, undisturbed, tmp_path
):
    stage = ("download", "rooms")
    project = undisturbed.before(stage, tmp_path / "project")
    folder = project.folder
    stages.run(folder, *stage, die_at=project.ended.changes // 2, signal=0, wait=1.5, go_on=True)
    while not list((folder / "data").glob(".rooms.partial")):
        time.sleep(0.01)
    second = stages.run(folder, *stage)  # also waits for the first, which must end well
    assert second.status == 1 and "Traceback" not in second.text
    assert ".rooms.lock is being written by process " in second.text
    assert results(folder) == project.finished


def test_a_data_set_replaced_by_a_download_that_was_killed_is_the_old_one_or_the_new_one(stages, undisturbed, tmp_path):
    """Killed before each of the last changes to the disk, and followed by a download that fails: one of them is there."""
    stage = ("download", "home")
    folder = undisturbed.before(("backbone", "tiny"), tmp_path / "project").folder
    old = tree(folder, "data/home")
    pixels = next(iter(sorted((folder / "photos/a").iterdir())))
    pixels.write_bytes(sorted((folder / "photos/b").iterdir())[0].read_bytes())
    shutil.copytree(folder, tmp_path / "twin")
    changes = stages.finish(tmp_path / "twin", *stage).changes
    new = tree(tmp_path / "twin", "data/home")
    assert new != old
    for point in range(changes - 8, changes):
        assert stages.run(folder, *stage, die_at=point).status == -signal.SIGKILL
        (folder / "photos").rename(folder / "away")
        failed = stages.run(folder, *stage)
        assert failed.status == 1 and "does not exist; give a folder or a list" in failed.text
        assert tree(folder, "data/home") in (old, new)
        (folder / "away").rename(folder / "photos")


# Another batch size, nearly the same figures.


def test_another_batch_size_changes_no_metric_by_more_than_rounding(stages, undisturbed, tmp_path):
    first, end = ORDER.index(("identify", "tiny")), ORDER.index(("verify", "cured"))
    folder = undisturbed.before(ORDER[first], tmp_path / "again").folder
    for stage in ORDER[first:end]:
        stages.finish(folder, *stage, batch_size=3)  # no divisor of the units of 4: images share batches with others
    found = 0
    for path in sorted((folder / "metrics").rglob("figures.csv")):
        texts = [(root / path.relative_to(folder)).read_text() for root in (folder, undisturbed.folder)]
        rows = [csv.DictReader(text.splitlines()) for text in texts]
        for mine, other in zip(*rows, strict=True):
            assert mine["metric"] == other["metric"]
            if mine["value"]:
                assert float(mine["value"]) == pytest.approx(float(other["value"]), rel=1e-3, abs=1e-3), (path, mine)
                found += 1
    assert found > 50


# A disk that is full or may not be written to.


@pytest.mark.parametrize("stage", TO_THE_PROBE, ids="-".join)
def test_a_disk_that_is_full_ends_a_stage_clearly_and_with_room_it_ends_in_the_same_bytes(
    stage, stages, undisturbed, tmp_path
):
    project = undisturbed.before(stage, tmp_path / "project")
    full = [{"full_at": int(part * project.ended.changes)} for part in (0.0, 0.9, 0.5)]
    first, *later = disturb(stages, project, stage, full)
    assert first.status == 1
    for stopped in (first, *later):  # it ends well where what was left to do only renames and removes
        assert stopped.status == 0 or (stopped.status == 1 and "No space left on device" in stopped.text)


@pytest.mark.parametrize(
    "stage", [("backbone", "tiny"), ("extract", "cured", "home"), ("probe", "cured")], ids="-".join
)
def test_a_file_that_the_kernel_cuts_short_is_never_taken_for_a_whole_one(stage, stages, undisturbed, tmp_path):
    """No file may have more than 600 bytes: writes fail in the middle, also those of libraries that are not Python's."""
    project = undisturbed.before(stage, tmp_path / "project")
    stopped = stages.run(project.folder, *stage, largest=600)
    assert stopped.status > 0  # what it prints is cut short too, which Python makes an error of its own
    for follower in TO_THE_PROBE[TO_THE_PROBE.index(stage) + 1 :][:1]:  # what the next stage would make of it
        assert stages.run(project.folder, *follower).status == 1
    stages.finish(project.folder, *stage)
    assert results(project.folder) == project.finished


def test_a_store_on_a_small_disk_keeps_its_finished_units_and_goes_on_when_there_is_room(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    rows, values = 40, np.random.default_rng(0).normal(size=(40, 2000)).astype(np.float32)

    def fill(folder):
        with StoreWriter(small / "x.zarr", folder, rows, {"cls": ArraySpec((2000,))}, {}, 4) as writer:
            note, first = writer.note, writer.missing_units()[0]
            for unit in writer.missing_units():
                writer.write(unit, {"cls": values[slice(*writer.layout.unit_rows(unit))]})
            writer.finish()
        return note, first

    try:
        with pytest.raises(OSError, match="No space left on device") as caught:
            fill(small / "partial")
        assert caught.value.errno == errno.ENOSPC and not (small / "x.zarr").exists()
        subprocess.run(["mount", "-o", "remount,size=10m", small], check=True)
        note, first = fill(small / "partial")
        assert 1 <= first < 10 and note == f"resumed: {first} of 10 units were done"
        np.testing.assert_array_equal(FeatureStore.open(small / "x.zarr").read("cls"), values.astype(np.float16))
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("stage", [("download", "home"), ("extract", "cured", "home")], ids="-".join)
def test_a_folder_that_may_not_be_written_to_is_named_and_stays_as_it_is(stage, stages, undisturbed, tmp_path_factory):
    project = undisturbed.before(stage, tmp_path_factory.mktemp("fixed") / "project")
    nobody = 65534 if os.geteuid() == 0 else None
    opened = []
    for above in (*project.folder.parents, project.folder):  # pytest's folders are private
        if above.stat().st_uid == os.geteuid() and above.is_relative_to(tmp_path_factory.getbasetemp().parent):
            opened.append((above, above.stat().st_mode))
            above.chmod(0o555)
    try:
        stopped = stages.run(project.folder, *stage, user=nobody)
    finally:
        for above, mode in reversed(opened):
            above.chmod(mode)
    assert stopped.status == 1 and "Permission denied" in stopped.text
    assert results(project.folder) == project.start
