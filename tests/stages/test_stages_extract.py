"""The stage that extracts: what it leaves, what it finds when it is run again, and Ray's workers when it is stopped."""

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
from trust_project import STAGES, Stages, make_project, results
from warm_ray import warm_ray

BEFORE = (("download", "home"), ("backbone", "tiny"), ("identify", "tiny"), ("compose", "cured"))
EXTRACT = ("extract", "cured", "home")
STORE = "features/cured/home.zarr"


@pytest.fixture(scope="module")
def stages():
    with Stages() as running:
        yield running


@pytest.fixture(scope="module")
def composed(stages, tmp_path_factory):
    """A project before `extract cured home`."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    for stage in BEFORE:
        stages.finish(folder, *stage)
    return folder


@pytest.fixture(scope="module")
def extracted(stages, composed):
    folder = shutil.copytree(composed, composed.with_name("extracted"))
    stages.finish(folder, *EXTRACT)
    return folder


@pytest.fixture
def project(extracted, tmp_path):
    return shutil.copytree(extracted, tmp_path / "project")


def attributes(folder):
    return json.loads((folder / STORE / "zarr.json").read_text())["attributes"]


def test_a_store_says_of_which_run_and_neurons_it_is(extracted):
    run = json.loads((extracted / "features/runs/cured.json").read_text())
    found = attributes(extracted)
    assert found["run"] == "cured" and found["num_registers"] == 1 and len(found["neurons_sha256"]) == 64
    assert found["weights_sha256"] == run["weights_sha256"] and found["rows"] == 42
    assert found["arrays"] == ["cls", "patch_mean", "registers"]
    assert not list((extracted / "work").glob("*.partial"))


def test_a_finished_store_is_left_as_it_is_and_one_of_other_settings_is_not_taken_for_it(stages, project):
    before = results(project)
    stages.finish(project, *EXTRACT)
    assert results(project) == before
    change(project, precision="bfloat16")
    ended = stages.run(project, *EXTRACT)
    assert ended.status == 1 and f"extract: {STORE} exists; delete it to extract it again" in ended.text
    assert results(project) == before


def test_other_resizing_makes_other_features_and_is_said(stages, project):
    before, chunk = attributes(project), (project / STORE / "cls/c.0.0").read_bytes()
    assert "resizing" not in before["transform"]
    shutil.rmtree(project / STORE)
    change(project, resizing="torch")
    stages.finish(project, *EXTRACT)
    assert attributes(project)["transform"] == before["transform"] | {"resizing": "torch"}
    assert (project / STORE / "cls/c.0.0").read_bytes() != chunk


def change(folder, **values):
    """Sets values of the block `extract` of params.yaml."""
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    params["extract"].update(values)
    yaml.dump(params, folder / "params.yaml")


# On Ray. As trust_project does: units of four images, of which there are eleven then; and time to stop the driver in between.
SMALL_UNITS = """
import runpy, signal, sys, time
from regvit.features import store
from regvit.features.store_writer import StoreWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore Ctrl-C
store.SMALLEST_UNIT = 4
record = StoreWriter.record
StoreWriter.record = lambda *arguments: (record(*arguments), time.sleep(0.3))
sys.path.insert(0, sys.argv.pop(1))
sys.argv = [sys.path[0] + "/extract.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(folder, engine):
    """`python stages/extract.py cured home` in a process of its own."""
    knobs = {"ENGINE": engine, "DEVICE": "cpu", "THREADS": "1", "BATCH_SIZE": "4"}
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    environment |= {f"REGVIT_{name}": value for name, value in knobs.items()} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SMALL_UNITS, str(STAGES), *EXTRACT[1:]]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def records(folder):
    return list(folder.glob("work/*.partial/done/*"))


def workers():
    """Processes in which Ray computes. (Its agents compute nothing and take a minute or two to see that they are alone.)"""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not zombie and b"MapWorker" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return found


def stop(driver, folder, how):
    """Sends it a signal once it has recorded two units more, waits for it and for all workers; what it said."""
    before, others = len(records(folder)), workers()
    while driver.poll() is None and len(records(folder)) < before + 2:
        time.sleep(0.02)
    begun = workers() - others
    assert begun
    driver.send_signal(how)
    _, said = driver.communicate()
    patience = time.monotonic() + 60
    while left := begun & workers():
        assert time.monotonic() < patience, f"workers {left} outlived their driver by a minute"
        time.sleep(0.1)
    assert before + 2 <= len(records(folder)) < 11
    return said


def test_a_driver_of_ray_that_is_stopped_leaves_no_worker_and_its_work_is_gone_on_with(composed, extracted, tmp_path):
    pytest.importorskip("ray", reason="the engine needs the extra `cluster`")
    folder = shutil.copytree(composed, tmp_path / "project")
    with warm_ray():
        driver = start(folder, "ray")
        said = stop(driver, folder, signal.SIGKILL)
        assert driver.returncode == -signal.SIGKILL, said
        driver = start(folder, "ray")
        said = stop(driver, folder, signal.SIGINT)
        assert driver.returncode == 130 and "resumed: " in said and "of 11 units are safe in" in said
    driver = start(folder, "local")
    _, said = driver.communicate()
    assert driver.returncode == 0 and "resumed: " in said
    assert results(folder) == results(extracted)
