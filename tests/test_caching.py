"""What reruns: the real `dvc repro` with this repository's dvc.yaml and stage scripts, on drawings and timm's `test_vit`.

One pipeline is built once (folders of images and a weights file as sources, so that nothing is fetched), and every test
starts from it: it changes one thing, reads from DVC's output which stages ran, and the fixture puts the change back.
Importing torch and timm takes a stage longer than its work here; so `python`, as dvc.yaml calls it, is a few lines that
hand the script to a process which has imported them and forks (`warm_python`).
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
YAML_FILE = YAML(typ="safe", pure=True)
CLASSES = ("one", "other")  # drawn alike, so that a probe's errors change with its settings
SERVER = """
import json, os, runpy, signal, socket, sys, traceback
import matplotlib.figure, scipy.ndimage, sklearn.datasets, sklearn.linear_model, timm, torch, zarr

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("ready", flush=True)
while True:
    caller, _ = server.accept()
    message, (out, err), _, _ = socket.recv_fds(caller, 1 << 20, 2)
    if os.fork():
        for each in (caller, out, err):
            each.close() if each is caller else os.close(each)
        continue
    os.dup2(out, 1)
    os.dup2(err, 2)
    folder, environment, sys.argv = json.loads(message)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:1] = [os.path.join(folder, os.path.dirname(sys.argv[0])), environment["PYTHONPATH"]]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        print(error.code if isinstance(error.code, str) else "", file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    caller.sendall(bytes([code]))
    os._exit(code)
"""
CALLER = """
import json, os, socket, sys
caller = socket.socket(socket.AF_UNIX)
caller.connect(os.environ["WARM_PYTHON"])
socket.send_fds(caller, [json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]).encode()], [1, 2])
sys.exit(int.from_bytes(caller.recv(1) or bytes([1])))
"""


@dataclass
class Pipeline:
    """A repository of its own: this one's pipeline with small parameters."""

    folder: Path
    python: Path  # a folder with the `python` that stages run with

    def repro(self, **environment: str) -> tuple[set[str], set[str]]:
        """Names of the stages that ran, and of those restored from the run cache."""
        path = f"{self.python}{os.pathsep}{os.environ['PATH']}"
        small = {"PYTHONPATH": str(self.folder), "PATH": path, "WARM_PYTHON": str(self.python / "socket")}
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro"],
            cwd=self.folder,
            env=os.environ | small | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        ran = set(re.findall(r"Running stage '(.+)':", done.stdout))
        return ran, set(re.findall(r"Stage '(.+)' is cached", done.stdout))

    def change(self, *path: str | int, to: object) -> None:
        """Sets the parameter at a path of keys."""
        file = self.folder / "params.yaml"
        params = YAML_FILE.load(file)
        block = params
        for key in path[:-1]:
            block = block[key]
        block[path[-1]] = to
        YAML_FILE.dump(params, file)


def draw(folder: Path, seed: int, each: int = 6) -> None:
    """Squares of any colour on noise: `<folder>/{train,val,test}/<class>/<i>.png`."""
    rng = np.random.default_rng(seed)
    for split in ("train", "val", "test"):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(90, 160, size=(48, 48, 3), dtype=np.uint8)
                row, column = rng.integers(4, 20, size=2)
                pixels[row : row + 20, column : column + 20] = rng.integers(0, 255, size=3)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


@pytest.fixture(scope="module")
def warm_python(tmp_path_factory) -> Iterator[Path]:
    """A folder with a `python` that forks a process in which the large packages are imported already."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "call.py").write_text(CALLER)
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{folder}/call.py" "$@"\n')
    (folder / "python").chmod(0o755)
    command = [sys.executable, "-c", SERVER, str(folder / "socket")]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=alone, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        yield folder
        server.terminate()


@pytest.fixture(scope="module")
def built(tmp_path_factory, warm_python) -> Iterator[Pipeline]:
    """The pipeline, run once."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("stages", "regvit"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("attention", "depth", "discover", "segment", "tokens", "zeroshot"):
        (folder / "metrics" / name).mkdir(parents=True)
        (folder / "metrics" / name / ".gitkeep").touch()
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    relief = folder / "regvit/relief.py"  # fewer and smaller rooms
    text, fewer = re.subn(
        r"^COUNTS = .*$", 'COUNTS = {"train": 4, "val": 2, "test": 3}', relief.read_text(), flags=re.M
    )
    text, smaller = re.subn(r"^SIZE = .*$", "SIZE = 48", text, flags=re.M)
    assert fewer == smaller == 1
    relief.write_text(text)
    for seed, name in enumerate(("plain", "shifted", "later")):
        draw(folder / "images" / name, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), folder / "weights.safetensors")
    params = YAML_FILE.load(ROOT / "params.yaml")
    params |= {
        "in_distribution": "plain",
        "datasets": {
            "plain": {"source": "folder:images/plain", "role": "id"},
            "shifted": {"source": "folder:images/shifted", "role": "ood"},
        },
        "scenes": {"rooms": {"source": "relief"}},
        "backbones": {"tiny": {"source": "file:weights.safetensors", "architecture": "test_vit", "img_size": 48}},
        "runs": {
            "original": {"backbone": "tiny", "registers": "none", "num_registers": 0},
            "cured": {"backbone": "tiny", "registers": "test_time", "num_registers": 1},
        },
        "verify": {"pictures": "rooms"},
    }
    for stage in ("tokens", "attention", "patches", "segment", "depth"):
        params[stage] |= {"datasets": ["rooms"]} | ({"img_size": 48} if "img_size" in params[stage] else {})
    for stage in ("segment", "depth"):
        params[stage] |= {"learning_rates": [0.01], "steps": 2, "batch_size": 2}
    params["depth"]["bins"] = 8
    params["discover"]["datasets"] = []  # rooms have no boxes; tests/test_stages_discover.py runs that stage
    params["identify"]["images"] = 8
    params["probe"] |= {"readouts": ["cls"], "learning_rates": [0.1], "steps": 4, "batch_size": 8, "neighbours": [2]}
    params["evaluate"] |= {"detectors": ["msp"], "bootstrap": 10}
    YAML_FILE.dump(params, folder / "params.yaml")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    pipeline = Pipeline(folder, warm_python)
    ran, restored = pipeline.repro()
    stages = set(YAML_FILE.load(folder / "dvc.yaml")["stages"]) - {"discover", "zeroshot"}
    assert {name.partition("@")[0] for name in ran} == stages
    assert not restored
    yield pipeline


@pytest.fixture
def pipeline(built) -> Iterator[Pipeline]:
    """The pipeline as built; afterwards its parameters, code and outputs are put back."""
    kept = {
        path: path.read_bytes()
        for name in ("params.yaml", "dvc.lock", "regvit/*.py")
        for path in built.folder.glob(name)
    }
    metrics = built.folder.with_name("metrics-kept")
    shutil.copytree(built.folder / "metrics", metrics)
    yield built
    for path, content in kept.items():
        path.write_bytes(content)
    (built.folder / "runtime.yaml").unlink(missing_ok=True)
    shutil.rmtree(built.folder / "metrics")
    shutil.move(metrics, built.folder / "metrics")
    subprocess.run(
        [sys.executable, "-m", "dvc", "checkout", "--quiet", "--force"],
        cwd=built.folder,
        check=True,
        capture_output=True,
    )


def test_nothing_reruns_where_nothing_changed_but_batch_size_workers_and_device(pipeline):
    (pipeline.folder / "runtime.yaml").write_text("batch_size: 3\n")
    assert pipeline.repro(REGVIT_WORKERS="1", REGVIT_DEVICE="cpu") == (set(), set())


def test_a_probe_learning_rate_reruns_probe_evaluate_and_report_and_going_back_restores(pipeline):
    pipeline.change("probe", "learning_rates", to=[0.5])
    ran, _ = pipeline.repro()
    assert ran == {"probe@original", "probe@cured", "evaluate@original", "evaluate@cured", "differences", "report"}
    pipeline.change("probe", "learning_rates", to=[0.1])
    ran, restored = pipeline.repro()
    assert ran <= {"report"}
    assert restored == {"probe@original", "probe@cured", "evaluate@original", "evaluate@cured", "differences"}


def test_a_new_ood_set_runs_its_own_download_and_extract_then_evaluate_and_report(pipeline):
    datasets = YAML_FILE.load(pipeline.folder / "params.yaml")["datasets"]
    pipeline.change("datasets", to={"later": {"source": "folder:images/later", "role": "ood"}} | datasets)
    ran, restored = pipeline.repro()
    assert ran == {
        "download@later", "extract@original-later", "extract@cured-later", "evaluate@original", "evaluate@cured",
        "differences", "report",
    }  # fmt: skip
    assert not restored


def test_the_number_of_registers_reruns_only_what_test_time_runs_make_and_going_back_restores(pipeline):
    pipeline.change("runs", "cured", "num_registers", to=2)
    ran, _ = pipeline.repro()
    following = {f"{stage}@cured" for stage in ("probe", "evaluate", "verify")} | {"differences", "report"}
    following |= {f"{stage}@cured-rooms" for stage in ("tokens", "attention", "segment", "depth")}
    extracted = {"extract@cured-plain", "extract@cured-shifted", "extract_patches@cured-rooms"}
    assert {"compose@cured"} | extracted | {"probe@cured", "evaluate@cured", "verify@cured"} <= ran
    assert ran <= {"compose@cured"} | extracted | following
    pipeline.change("runs", "cured", "num_registers", to=1)
    ran, restored = pipeline.repro()
    assert ran <= {"report"}
    assert {"compose@cured"} | extracted <= restored


def test_editing_the_metrics_extracts_nothing(pipeline):
    with open(pipeline.folder / "regvit/metrics.py", "a") as file:
        file.write("\nCHANGED = True\n")
    ran, _ = pipeline.repro()
    using = {name for name, stage in YAML_FILE.load(pipeline.folder / "dvc.yaml")["stages"].items()
             if "regvit/metrics.py" in stage.get("do", stage)["deps"]}  # fmt: skip
    assert {"probe", "evaluate"} <= using and not using & {"extract", "extract_patches", "identify", "compose"}
    assert {name.partition("@")[0] for name in ran} == using - {"discover", "zeroshot"}  # same bytes: no report


def test_a_data_set_taken_out_is_not_reported_though_its_files_still_lie_there(pipeline):
    datasets = YAML_FILE.load(pipeline.folder / "params.yaml")["datasets"]
    pipeline.change("datasets", to={"plain": datasets["plain"]})
    ran, _ = pipeline.repro()
    assert ran == {"evaluate@original", "evaluate@cured", "differences", "report"}
    assert (pipeline.folder / "metrics/extract/cured/shifted.json").exists()
    assert "shifted" not in (pipeline.folder / "metrics/evaluate/cured.json").read_text()


def test_a_clone_without_cache_can_be_checked_for_staleness(pipeline, tmp_path):
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns("data", "features", "cache", "tmp", "__pycache__")
    shutil.copytree(pipeline.folder, clone, ignore=ignored)
    dry = [sys.executable, "-m", "dvc", "repro", "--dry", "--allow-missing"]
    done = subprocess.run(dry, cwd=clone, capture_output=True, text=True, check=False)
    assert (done.returncode, re.findall("Running stage.*", done.stdout)) == (0, []), done.stderr


def test_a_clone_with_a_remote_gets_every_result_without_computing(pipeline, tmp_path):
    def dvc(*arguments: str, folder: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    git = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    dvc("remote", "add", "--default", "shared", str(tmp_path / "remote"), folder=pipeline.folder)
    dvc("push", "--quiet", folder=pipeline.folder)
    subprocess.run([*git, "add", "--all"], cwd=pipeline.folder, check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "results"], cwd=pipeline.folder, check=True)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(pipeline.folder), str(clone)], check=True)
    dvc("pull", "--quiet", folder=clone)
    assert "Running stage" not in dvc("repro", folder=clone)
    assert (clone / "features/cured/plain.zarr/zarr.json").is_file()
    assert (clone / "metrics/report.html").read_bytes() == (pipeline.folder / "metrics/report.html").read_bytes()
