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
from trust_project import ORDER, Stages, Undisturbed, make_project, tree

MANY = bool(os.environ.get("REGVIT_KILLS"))
KILLS_IN_EXTRACTION = 150 if MANY else 30
POINTS = 10_000 if MANY else 2  # changes to the disk before which a stage is killed
SLOW = 0.5  # seconds: a stage that takes longer (it draws) is killed once in each test unless many kills are asked for
DISTINCT = [
    stage for stage in ORDER if stage[1:2] != ("plain",) and stage[1:] != ("alien",) and stage[2:] != ("alien",)
]
STORES = ("extract", "extract_dense")
LONG = (*STORES, "download", "probe", "identify", "evaluate")
EXTRACT = ("extract", "cured", "home")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with Stages() as stages:
        yield Undisturbed.of(stages, tmp_path_factory.mktemp("undisturbed") / "project", ORDER)


@pytest.fixture
def case(request, undisturbed, tmp_path):
    """The project as it was before the stage that the test is of."""
    return undisturbed.before(request.param, tmp_path / "project")


def of_stages(*stages):
    return pytest.mark.parametrize("case", stages, indirect=True, ids="-".join)


every_stage = of_stages(*(ORDER if MANY else DISTINCT))
long_ones = of_stages(*(stage for stage in DISTINCT if MANY or stage[0] in LONG))


@every_stage
def test_a_stage_killed_before_a_change_to_the_disk_leaves_nothing_half_written_and_ends_in_the_same_bytes(case):
    changes = case.ended.changes
    # The last one, and others evenly before it: a stage makes the same changes in the same order each time.
    points = sorted({round((i + 1) * (changes - 1) / POINTS) for i in range(POINTS)})
    for point in points[:1] if case.ended.seconds > SLOW and not MANY and case.stage[0] not in STORES else points:
        killed = case.run(die_at=point)
        assert killed.status == -signal.SIGKILL, f"change {point} of {changes} was not reached:\n{killed.text}"
        case.must_be_whole()
        case.must_end_in_the_same_bytes()
        assert not list(case.folder.glob("work/*.partial"))
        case.forget()


@every_stage
def test_a_stage_killed_in_the_middle_of_writing_a_file_leaves_no_torn_one_and_ends_in_the_same_bytes(case):
    """The kernel kills it where a file grows beyond a size: half of that of its smallest or largest output."""
    sizes = sorted({len(content) for content in case.outputs.values() if len(content) > 16})
    for size in sizes if MANY else {sizes[0], sizes[-1]}:
        killed = case.run(dies_beyond=size // 2)
        assert killed.status == -signal.SIGXFSZ, f"no file grew beyond {size // 2} bytes:\n{killed.text}"
        case.must_be_whole()
        case.must_end_in_the_same_bytes()
        case.forget()


@long_ones
def test_a_stage_killed_at_a_random_moment_ends_in_the_same_bytes(case):
    moments = random.Random(str(case.stage))
    for _ in range(10 if MANY else 1):
        longest = case.ended.seconds
        while case.run(die_after=moments.uniform(0, longest)).status != -signal.SIGKILL:
            assert case.is_done()  # the kill came too late
            case.forget()
            longest /= 2
        case.must_end_in_the_same_bytes()
        case.forget()


@of_stages(EXTRACT)
def test_an_extraction_killed_again_and_again_at_random_goes_on_each_time_and_ends_in_the_same_bytes(case):
    """Every other kill falls at a random time, every other before a random change to the disk, a few units after the
    last; when the store is done it is begun anew, until there were enough kills."""
    moments, kills, finished, resumed = random.Random(0), 0, 0, 0
    done = 0  # units recorded so far
    while kills < KILLS_IN_EXTRACTION or not finished:
        at, after = moments.randint(0, case.ended.changes // 2), moments.uniform(0.2, 1.0) * case.ended.seconds
        run = case.run(**({"die_after": after} if kills % 2 else {"die_at": at}))
        resumed += "resumed: " in run.text
        kills += run.status == -signal.SIGKILL
        if case.is_done():  # also where it was killed when all was done, on its way out
            finished, done = finished + 1, 0
            case.forget()
        else:
            assert run.status == -signal.SIGKILL, run.text
            before_it, done = done, recorded(case.folder)
            assert done >= before_it, f"of {before_it} units recorded {done} are left: {run.text}"
            case.must_be_whole()
    assert resumed >= KILLS_IN_EXTRACTION // 4
    case.must_end_in_the_same_bytes()


def recorded(folder):
    """Units of the unfinished store that are done: records, where the store is there that they are of."""
    begun = list((folder / "work").glob("*.partial/resume.json"))
    return len(list((begun[0].parent / "done").iterdir())) if begun else 0


# Ctrl-C.


def interrupted(case):
    """What the stage says when it meets Ctrl-C in its middle."""
    stopped = case.run(die_at=case.ended.changes // 2, signal=int(signal.SIGINT))
    assert stopped.status == 130 and "Traceback" not in stopped.text
    case.must_be_whole()
    return stopped.text


@of_stages(EXTRACT)
def test_ctrl_c_in_an_extraction_says_what_is_safe_and_the_next_run_goes_on_from_there(case):
    said = interrupted(case)
    assert "units are safe in work/features-cured-home-" in said and "run the same again to go on" in said
    assert "resumed: " in case.must_end_in_the_same_bytes().text


@of_stages(("probe", "cured"))
def test_ctrl_c_in_the_training_of_probes_says_what_is_safe_and_the_next_run_goes_on_from_there(case):
    assert "steps are safe in work/probe-cured-" in interrupted(case)
    assert "resumed: " in case.must_end_in_the_same_bytes().text


@of_stages(("download", "rooms"), ("backbone", "tiny"), ("identify", "tiny"))
def test_ctrl_c_elsewhere_leaves_nothing_under_a_final_name_and_the_next_run_is_as_if_nothing_had_been(case):
    assert "interrupted" in interrupted(case)
    case.must_end_in_the_same_bytes()


# Two at once.


@of_stages(EXTRACT, ("download", "rooms"))
def test_of_two_at_one_store_or_data_set_the_second_says_who_holds_it_and_the_first_is_not_disturbed(case):
    begun = "work/*.partial/resume.json" if case.stage == EXTRACT else "data/.rooms.partial"
    case.run(die_at=case.ended.changes // 3, signal=0, wait=1.5, go_on=True)
    while not list(case.folder.glob(begun)):
        time.sleep(0.01)
    second = case.run()  # also waits for the first, which must end well
    assert second.status == 1 and "Traceback" not in second.text
    assert "is being written by process " in second.text and "wait for it, or end it and run again" in second.text
    assert case.is_done()


@of_stages(("backbone", "tiny"))
def test_a_data_set_replaced_by_a_download_that_was_killed_is_the_old_one_or_the_new_one(case, tmp_path):
    """Killed before each of the last changes to the disk, and followed by a download that fails: one of them is there."""
    folder, stages, stage = case.folder, case.stages, ("download", "home")
    old = tree(folder, "data/home")
    pixels = next(iter(sorted((folder / "photos/a").iterdir())))
    pixels.write_bytes(sorted((folder / "photos/b").iterdir())[0].read_bytes())
    (folder / "work").mkdir()  # where sizes and times of the photographs are kept, the last changes of all
    shutil.copytree(folder, tmp_path / "twin")
    changes = stages.finish(tmp_path / "twin", *stage).changes
    new = tree(tmp_path / "twin", "data/home")
    assert new != old
    for point in range(changes - 12, changes):
        assert stages.run(folder, *stage, die_at=point).status == -signal.SIGKILL
        (folder / "photos").rename(folder / "away")
        failed = stages.run(folder, *stage)
        assert failed.status == 1 and "does not exist; give a folder or a list" in failed.text
        assert tree(folder, "data/home") in (old, new)
        (folder / "away").rename(folder / "photos")


def test_another_batch_size_changes_no_metric_by_more_than_rounding(undisturbed, tmp_path):
    folder = make_project(tmp_path / "again")
    for stage in ORDER[: ORDER.index(("verify", "cured"))]:  # no divisor of the units of 4: images share batches
        undisturbed.stages.finish(folder, *stage, batch_size=3)
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
