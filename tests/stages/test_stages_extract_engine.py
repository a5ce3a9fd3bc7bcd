"""Extraction by Ray through the stage: the same bytes and record as in this process, also after a kill -9 of the driver."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trust_project import STAGES, Stages, make_project, results

pytest.importorskip("ray", reason="the engine needs the extra `cluster`")

# As trust_project does: units of four images, of which there are eleven then; and time to stop the driver in between.
SMALL_UNITS = """
import runpy, signal, sys, time
from regvit.features import store_layout
from regvit.features.store_writer import StoreWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore Ctrl-C
store_layout.SMALLEST_UNIT = 4
record = StoreWriter.record
StoreWriter.record = lambda *arguments: (record(*arguments), time.sleep(0.3))
sys.path.insert(0, sys.argv.pop(1))
sys.argv = [sys.path[0] + "/extract.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project before and after `extract cured home`, in this process."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    with Stages() as stages:
        for stage in (("download", "home"), ("backbone", "tiny"), ("identify", "tiny"), ("compose", "cured")):
            stages.finish(folder, *stage)
        before = folder.with_name("before")
        shutil.copytree(folder, before)
        stages.finish(folder, "extract", "cured", "home")
    return before, results(folder)


def start(folder, **knobs):
    """`python stages/extract.py cured home` in a process of its own."""
    knobs = {"REGVIT_DEVICE": "cpu", "REGVIT_THREADS": "1", "REGVIT_BATCH_SIZE": "4", "OMP_NUM_THREADS": "1"} | knobs
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"} | knobs
    command = [sys.executable, "-c", SMALL_UNITS, str(STAGES), "cured", "home"]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def records(folder):
    return [line for log in folder.glob("work/*/done.jsonl") for line in log.read_text().splitlines()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def workers_of(pid):
    """Every worker among the processes that this one has started, directly or not. (Ray has agents besides, which
    compute nothing and take a minute or two to see that they are alone.)"""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return [pid for pid in found if alive(pid) and b"ray::_Worker" in title(pid)]


def title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return b""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_driver_that_is_stopped_leaves_no_worker_and_its_work_is_gone_on_with(project, tmp_path, how):
    before, expected = project
    folder = shutil.copytree(before, tmp_path / "project")
    first = start(folder, REGVIT_ENGINE="ray")
    while first.poll() is None and len(records(folder)) < 2:
        time.sleep(0.02)
    workers = workers_of(first.pid)
    assert workers
    first.send_signal(how)
    _, said = first.communicate()
    assert first.returncode == (-how if how == signal.SIGKILL else 130), said
    assert 2 <= len(records(folder)) < 11
    if how == signal.SIGINT:
        assert "of 11 units are safe in" in said
    patience = time.monotonic() + 60
    while left := [pid for pid in workers if alive(pid)]:
        assert time.monotonic() < patience, f"workers {left} outlived their driver by a minute"
        time.sleep(0.1)
    again = start(folder, REGVIT_ENGINE="ray")
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert "resumed: " in said
    assert results(folder) == expected
