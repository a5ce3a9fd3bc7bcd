"""A disk that is full or may not be written to: a clear end, nothing half-written under a final name, and no harm done."""

import errno
import os
import subprocess

import numpy as np
import pytest
from trust_project import ORDER, Stages, Undisturbed, results

from regvit.features.store import ArraySpec, FeatureStore
from regvit.features.store_writer import StoreWriter

CHAIN = ORDER[:1] + ORDER[3:5] + ORDER[5:7] + (("extract", "cured", "home"), ("probe", "cured"))


@pytest.fixture(scope="module")
def stages():
    with Stages() as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(stages, tmp_path_factory):
    return Undisturbed(stages, tmp_path_factory.mktemp("disk"), CHAIN)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("stage", CHAIN, ids="-".join)
def test_a_disk_that_is_full_ends_a_stage_clearly_and_with_room_it_ends_in_the_same_bytes(
    stage, part, stages, undisturbed, tmp_path
):
    project = undisturbed.before(stage, tmp_path / "project")
    stopped = stages.run(project.folder, *stage, full_at=int(part * project.ended.changes))
    if stopped.status == 0:  # what was left to do only renames and removes
        assert results(project.folder) == project.finished
        return
    assert stopped.status == 1 and "No space left on device" in stopped.text
    for name, content in results(project.folder).items():
        # curves grow while the probe trains, and DVC takes them away before it trains again
        assert ".partial" in name or "/curves/" in name or content == project.finished[name], f"{name} is half-written"
    stages.finish(project.folder, *stage)
    assert results(project.folder) == project.finished


@pytest.mark.parametrize(
    "stage", [("backbone", "tiny"), ("extract", "cured", "home"), ("probe", "cured")], ids="-".join
)
def test_a_file_that_the_kernel_cuts_short_is_never_taken_for_a_whole_one(stage, stages, undisturbed, tmp_path):
    """No file may have more than 600 bytes: writes fail in the middle, also those of libraries that are not Python's."""
    project = undisturbed.before(stage, tmp_path / "project")
    stopped = stages.run(project.folder, *stage, largest=600)
    assert stopped.status > 0  # what it prints is cut short too, which Python makes an error of its own
    later = CHAIN[CHAIN.index(stage) + 1 :]
    for follower in later[:1]:  # what the next stage would make of it
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
