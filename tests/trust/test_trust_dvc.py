"""DVC around the stages: two at once, and DVC killed while its stage goes on."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("dvc")

STAGE = """
import json, os, sys, time
from regvit.files import FolderLocked, locked, write_json
from pathlib import Path
held = locked(Path(os.environ["DVC_ROOT"]) / "work/made.partial")
try:
    held.__enter__()
except FolderLocked as error:
    sys.exit(f"made: {error}")
Path("started").write_text(str(os.getpid()))
while not Path("go").exists():
    time.sleep(0.02)
write_json("made.json", {"x": 1})
"""
PIPELINE = "stages:\n  made:\n    cmd: {python} stage.py\n    outs: [made.json]\n"
REPRO = [sys.executable, "-m", "dvc", "repro"]


@pytest.fixture
def project(tmp_path):
    """One stage that takes the lock of its work, says that it began, and waits for a file named `go`."""
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(PIPELINE.format(python=sys.executable))
    return tmp_path


def repro(folder):
    return subprocess.Popen(REPRO, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.02)


def test_of_two_dvc_repro_at_once_the_second_is_refused_and_the_first_is_not_disturbed(project):
    first = repro(project)
    wait_for(project / "started")
    second = repro(project)
    said = second.communicate(timeout=120)[0]
    assert second.returncode != 0 and "is busy" in said and str(first.pid) in said, said
    (project / "go").touch()
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 0, said
    assert json.loads((project / "made.json").read_text()) == {"x": 1}


def test_a_stage_that_outlived_a_killed_dvc_is_named_by_the_next_one_and_not_disturbed(project):
    """DVC killed with SIGKILL leaves its stage running; a second writer would spoil its work."""
    first = repro(project)
    wait_for(project / "started")
    orphan = int((project / "started").read_text())
    os.kill(first.pid, signal.SIGKILL)
    first.wait()  # not `communicate`: the stage holds the pipe
    second = repro(project)
    said = second.communicate(timeout=120)[0]
    assert second.returncode != 0 and f"made.partial is being written by process {orphan} on " in said, said
    (project / "go").touch()
    wait_for(project / "made.json")
    lock = open(project / "work/made.partial/lock")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)  # until the orphan has ended
    lock.close()
    third = repro(project)
    assert third.communicate(timeout=120)[0] and third.returncode == 0
    assert json.loads((project / "made.json").read_text()) == {"x": 1}
