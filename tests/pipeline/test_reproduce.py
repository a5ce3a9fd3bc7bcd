"""`make repro`: parameters are checked before DVC sees them, and Ctrl-C ends it in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from regvit.pipeline.checks import architectures, classes
from regvit.pipeline.params import load_params, read_values

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
SETS = {"twemoji": ["a", "b"], "openmoji": ["b", "a"], "digits": ["0"]}
PIPELINE = """
stages:
  download:
    matrix:
      dataset: ${datasets}
    cmd: python stage.py ${item.dataset}
"""


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Path:
    """A folder of DVC's whose only stages write one line each and last a minute; timm need not be asked."""
    folder = tmp_path_factory.mktemp("project")
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "stage.py").write_text(STAGE)
    shutil.copy(ROOT / "params.yaml", folder)
    known = {"vit_small_patch14_dinov2": {"depth": 12, "trained": 0}}
    (folder / "work").mkdir()
    (folder / architectures.KEPT).write_text(json.dumps(known))
    return folder


@pytest.fixture
def project(made_once, tmp_path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(made_once, tmp_path / "project")


def started(project: Path) -> subprocess.Popen:
    """`make repro` as the leader of a group, as a terminal starts it."""
    command = [sys.executable, "-m", "regvit.pipeline.reproduce"]
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


# Classes that do not meet.


def downloaded(project, monkeypatch, **classes):
    """The data sets of params.yaml, as if downloaded, with some classes changed."""
    monkeypatch.chdir(project)
    params = load_params()
    for name, names in (SETS | classes).items():
        (project / f"data/{name}").mkdir(parents=True, exist_ok=True)
        (project / f"data/{name}/dataset.json").write_text(json.dumps({"classes": names}))
    values = read_values("params.yaml")["datasets"]
    stages = {
        f"download@{name}": {"params": {"params.yaml": {f"datasets.{name}": values[name], "seed": 0}}}
        for name in values
    }
    YAML().dump({"schema": "2.0", "stages": stages}, project / "dvc.lock")
    return params


def test_data_sets_are_known_to_be_downloaded_until_their_parameters_change(project, monkeypatch):
    params = downloaded(project, monkeypatch)
    assert classes.downloaded(params) and list(classes.unmet_classes(params)) == []
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("{test: 200}", "{test: 100}", 1))
    assert not classes.downloaded(load_params())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"openmoji": ["a", "c", "d"]},
            "openmoji has the role ood, but 2 of its 3 classes are none of twemoji ('c', 'd')",
        ),
        ({"openmoji": ["a"]}, "openmoji has a single class"),
        ({"digits": ["b"]}, "digits has the role anomaly, but all its classes are of twemoji: make it role: ood"),
        ({"twemoji": ["a"], "openmoji": ["a", "b"]}, "twemoji has 1 class"),
    ],
)
def test_classes_that_do_not_meet_are_said_by_data_set(project, monkeypatch, changed, said):
    faults = list(classes.unmet_classes(downloaded(project, monkeypatch, **changed)))
    assert any(fault.startswith(f"datasets.{said}") for fault in faults), faults


def test_classes_that_do_not_meet_stop_it_before_the_first_stage(project, monkeypatch):
    downloaded(project, monkeypatch, openmoji=["a"])
    process = started(project)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and not (project / "made").exists()
    assert err.startswith("make repro: the data sets' classes do not meet\n  - datasets.openmoji has a single class")
