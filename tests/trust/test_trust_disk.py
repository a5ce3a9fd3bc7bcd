"""A disk that is full or may not be written to: a clear end, nothing half-written under a final name, and no harm done."""

import errno
import os
import shutil
import subprocess

import numpy as np
import pytest
from trust_project import ORDER, Stages, make_project, results

from regvit.features.store import ArraySpec, FeatureStore
from regvit.features.store_writer import StoreWriter

CHAIN = ORDER[:1] + ORDER[3:5] + ORDER[5:7] + (("extract", "cured", "home"), ("probe", "cured"))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(processes, folder, outputs and changes of each stage) of a project that ran undisturbed up to the probes."""
    with Stages() as stages:
        folder = make_project(tmp_path_factory.mktemp("disk"))
        made, before = {}, results(folder)
        for stage in CHAIN:
            ended = stages.finish(folder, *stage)
            after = results(folder)
            made[stage] = ({name: after[name] for name in after if before.get(name) != after[name]}, ended)
            before = after
        yield stages, folder, made


def before(stage, project, folder):
    _, done, made = project
    shutil.copytree(done, folder)
    for later in CHAIN[CHAIN.index(stage) :]:
        for name in made[later][0]:
            (folder / name).unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return folder


@pytest.mark.parametrize("part", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("stage", CHAIN, ids="-".join)
def test_a_disk_that_is_full_ends_a_stage_clearly_and_with_room_it_ends_in_the_same_bytes(
    stage, part, project, tmp_path
):
    stages, _, made = project
    outputs, ended = made[stage]
    folder = before(stage, project, tmp_path / "project")
    start = results(folder)
    stopped = stages.run(folder, *stage, full_at=int(part * ended.changes))
    if stopped.status == 0:  # what was left to do only renames and removes
        assert results(folder) == start | outputs
        return
    assert stopped.status == 1 and "No space left on device" in stopped.text
    for name, content in results(folder).items():
        # curves grow while the probe trains, and DVC takes them away before it trains again
        assert ".partial" in name or "/curves/" in name or content == (start | outputs)[name], f"{name} is half-written"
    stages.finish(folder, *stage)
    assert results(folder) == start | outputs


@pytest.mark.parametrize(
    "stage", [("backbone", "tiny"), ("extract", "cured", "home"), ("probe", "cured")], ids="-".join
)
def test_a_file_that_the_kernel_cuts_short_is_never_taken_for_a_whole_one(stage, project, tmp_path):
    """No file may have more than 600 bytes: writes fail in the middle, also those of libraries that are not Python's."""
    stages, _, made = project
    outputs, _ = made[stage]
    folder = before(stage, project, tmp_path / "project")
    start = results(folder)
    stopped = stages.run(folder, *stage, largest=600)
    assert stopped.status > 0  # what it prints is cut short too, which Python makes an error of its own
    later = CHAIN[CHAIN.index(stage) + 1 :]
    for follower in later[:1]:  # what the next stage would make of it
        assert stages.run(folder, *follower).status == 1
    stages.finish(folder, *stage)
    assert results(folder) == start | outputs


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
def test_a_folder_that_may_not_be_written_to_is_named_and_stays_as_it_is(stage, project, tmp_path_factory):
    stages, _, _ = project
    folder = before(stage, project, tmp_path_factory.mktemp("fixed") / "project")
    nobody = 65534 if os.geteuid() == 0 else None
    opened = []
    for above in (*folder.parents, folder):  # pytest's folders are private
        if above.stat().st_uid == os.geteuid() and above.is_relative_to(tmp_path_factory.getbasetemp().parent):
            opened.append((above, above.stat().st_mode))
            above.chmod(0o555)
    try:
        start = results(folder)
        stopped = stages.run(folder, *stage, user=nobody)
    finally:
        for above, mode in reversed(opened):
            above.chmod(mode)
    assert stopped.status == 1 and "Permission denied" in stopped.text
    assert results(folder) == start
