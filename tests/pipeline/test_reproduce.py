"""`make repro`: parameters are checked before DVC sees them, and Ctrl-C ends it in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One program, as the stages are, and not two in a row: a shell may lose a Ctrl-C that comes while it starts the second.
STAGE = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "stages")!r})
from regvit.pipeline.command import command

def main(name):
    with open("made", "a") as file:
        file.write(name + chr(10))
    time.sleep(60)

command(main, "name", interrupted="nothing of {{0}} is kept")
"""
PIPELINE = f"""
stages:
  download:
    matrix:
      dataset: ${{datasets}}
    cmd: {sys.executable} stage.py ${{item.dataset}}
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder of DVC's whose only stages write one line each and last a minute; timm need not be asked."""
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "stage.py").write_text(STAGE)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    known = {"vit_small_patch14_dinov2": {"depth": 12, "trained": 0}}
    (tmp_path / "work").mkdir()
    (tmp_path / "work/architectures.json").write_text(json.dumps({"timm": version("timm"), "architectures": known}))
    return tmp_path


def started(project: Path) -> subprocess.Popen:
    """`make repro` as the leader of a group, as a terminal starts it."""
    command = [sys.executable, str(ROOT / "regvit/pipeline/reproduce.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=project, start_new_session=True, **pipes)


def test_ctrl_c_ends_dvc_and_its_stage_in_one_line_without_a_traceback(project):
    process = started(project)
    try:
        deadline = time.monotonic() + 60
        while not (project / "made").is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in out + err, err
    assert "stage: interrupted; nothing of twemoji is kept: run the same again" in err.splitlines()
    assert err.splitlines()[-1] == "make repro: interrupted; stages that were done are kept: run the same again"
    assert len((project / "made").read_text().splitlines()) == 1  # DVC began no other stage
    with pytest.raises(ProcessLookupError):  # nothing of the group is left
        os.killpg(process.pid, 0)


def test_a_name_that_a_shell_would_run_is_refused_before_dvc_makes_a_command_of_it(project):
    err = refused(project, "  digits:\n", '  "x; touch pwned":\n')
    assert err.startswith("make repro: params.yaml has 1 fault(s):") and "x; touch pwned is a name that is not" in err
    assert not (project / "pwned").exists()


def test_a_layer_that_the_backbone_lacks_stops_it_before_the_first_stage(project):
    err = refused(project, "layer: null # where", "layer: 99 # where")
    assert "identify.layer is 99, expected at most 11: backbone focus has 12 blocks (0 to 11)" in err


def refused(project, old, new):
    """What `make repro` says of params.yaml with one text replaced, which must keep every stage from starting."""
    text = (project / "params.yaml").read_text()
    assert old in text
    (project / "params.yaml").write_text(text.replace(old, new))
    process = started(project)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and not (project / "made").exists()
    return err
