"""Sudden death of every stage that writes, at moments chosen and at random: nothing is lost, nothing is left half-written.

By default some 100 kills; REGVIT_KILLS=1 in the environment asks for many more (before every single change that a stage
makes to the disk, and 150 at random in extraction), which takes a few minutes.
"""

import csv
import os
import random
import shutil
import signal
import time

import pytest
from trust_project import ORDER, Stages, Undisturbed, make_project, results, tree

MANY = bool(os.environ.get("REGVIT_KILLS"))
KILLS_IN_EXTRACTION = 150 if MANY else 30
POINTS = 10_000 if MANY else 3  # changes to the disk before which a stage is killed
SLOW = 0.5  # seconds: a stage that takes longer (it draws) is killed once in each test unless many kills are asked for
DISTINCT = [
    stage for stage in ORDER if stage[1:2] != ("plain",) and stage[1:] != ("alien",) and stage[2:] != ("alien",)
]
STORES = ("extract", "extract_dense")


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


@pytest.mark.parametrize("stage", ORDER if MANY else DISTINCT, ids="-".join)
def test_a_stage_killed_before_a_change_to_the_disk_leaves_nothing_half_written_and_ends_in_the_same_bytes(
    stage, stages, undisturbed, tmp_path
):
    project = undisturbed.before(stage, tmp_path / "project")
    folder = project.folder
    changes, there = project.ended.changes, set(folder.rglob("*"))
    # First, last, and others evenly between them: a stage makes the same changes in the same order each time.
    points = sorted({round(i * (changes - 1) / (POINTS - 1)) for i in range(POINTS)})
    points = points[1:2] if project.ended.seconds > SLOW and not MANY and stage[0] not in STORES else points
    for point in points:
        killed = stages.run(folder, *stage, die_at=point)
        assert killed.status == -signal.SIGKILL, f"change {point} of {changes} was not reached:\n{killed.text}"
        for name, content in under_final_names(folder).items():
            assert content == project.finished[name], f"{name} is half-written after a kill at change {point}"
        stages.finish(folder, *stage)
        assert results(folder) == project.finished
        assert not (folder / "work").exists() or not list((folder / "work").glob("*.partial"))
        forget(folder, there)


@pytest.mark.parametrize("stage", ORDER if MANY else DISTINCT, ids="-".join)
def test_a_stage_killed_in_the_middle_of_writing_a_file_leaves_no_torn_one_and_ends_in_the_same_bytes(
    stage, stages, undisturbed, tmp_path
):
    """The kernel kills it where a file grows beyond a size: half of that of its smallest, middle or largest output."""
    project = undisturbed.before(stage, tmp_path / "project")
    folder = project.folder
    there = set(folder.rglob("*"))
    sizes = sorted(len(project.finished[name]) for name in undisturbed.outputs[stage])
    sizes = [size for size in sizes if size > 16]
    if not MANY:
        sizes = [sizes[0], *([] if project.ended.seconds > SLOW else [sizes[len(sizes) // 2]]), sizes[-1]]
    for size in sorted(set(sizes)):
        killed = stages.run(folder, *stage, dies_beyond=size // 2)
        assert killed.status == -signal.SIGXFSZ, f"no file grew beyond {size // 2} bytes:\n{killed.text}"
        for name, content in under_final_names(folder).items():
            assert content == project.finished[name], f"{name} is torn"
        stages.finish(folder, *stage)
        assert results(folder) == project.finished
        forget(folder, there)


@pytest.mark.parametrize("stage", ORDER if MANY else DISTINCT, ids="-".join)
def test_a_stage_killed_at_a_random_moment_ends_in_the_same_bytes(stage, stages, undisturbed, tmp_path):
    project = undisturbed.before(stage, tmp_path / "project")
    folder = project.folder
    moments, there = random.Random(str(stage)), set(folder.rglob("*"))
    for _ in range(10 if MANY else 1):
        longest = project.ended.seconds
        while stages.run(folder, *stage, die_after=moments.uniform(0, longest)).status != -signal.SIGKILL:
            assert results(folder) == project.finished  # the kill came too late
            forget(folder, there)
            longest /= 2
        stages.finish(folder, *stage)
        assert results(folder) == project.finished
        forget(folder, there)


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


# Same inputs, same bytes.


def test_a_second_run_of_every_stage_from_nothing_gives_the_same_bytes(stages, undisturbed, tmp_path):
    folder = make_project(tmp_path / "again")
    for stage in ORDER:
        stages.finish(folder, *stage)
    assert results(folder) == results(undisturbed.folder)


def test_another_batch_size_changes_no_metric_by_more_than_rounding(stages, undisturbed, tmp_path):
    folder = make_project(tmp_path / "again")
    for stage in ORDER[: ORDER.index(("verify", "cured"))]:
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
