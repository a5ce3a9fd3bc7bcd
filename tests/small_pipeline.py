"""A repository of its own, with this one's pipeline and small parameters: what tests of the real `dvc repro` are made on.

Folders of drawings and a weights file are its sources, so that nothing is fetched. Importing torch and timm takes a stage
longer than its work here; so `python`, `dvc` and `regvit` are those of `warm_python(**WARM)`.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from regvit.pipeline.warm_python import LARGE

ROOT = Path(__file__).parent.parent
YAML_FILE = YAML(typ="safe", pure=True)
YAML_FILE.default_flow_style = False  # a key a line, as regvit/pipeline/choose.py wants it
CLASSES = ("one", "other")  # drawn alike, so that a probe's errors change with its settings
TRACKED = (
    "Makefile",
    "dvc.yaml",
    "guard.yaml",
    ".dvcignore",
    ".gitignore",
    "requirements.txt",
    "requirements-test.txt",
    "pyproject.toml",
)
# What tests run in forks, beside stages.
WARM = {"modules": (*LARGE, "dvc.cli", "dvc.repo", "sklearn.datasets"), "programs": ("dvc", "regvit")}


@dataclass
class Pipeline:
    """A repository with this one's pipeline and small parameters."""

    folder: Path
    python: Path  # a folder with the `python` that stages run with

    def run(self, *command: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """A command in the repository, or in `folder`, that must end well; its output as text."""
        done = subprocess.run(
            command,
            cwd=folder or self.folder,
            env=os.environ | {"PATH": f"{self.python}{os.pathsep}{os.environ['PATH']}"} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def repro(self, **environment: str) -> tuple[set[str], set[str]]:
        """Names of the stages that ran, and of those restored from the run cache."""
        said = self.run("python", "-m", "regvit.pipeline.quick_dvc", "repro", **environment).stdout
        return set(re.findall(r"Running stage '(.+)':", said)), set(re.findall(r"Stage '(.+)' is cached", said))

    def would_run(self, *options: str) -> set[str]:
        """Names of the stages of which something changed; those that only follow are not among them."""
        return set(re.findall(r"Running stage '(.+)':", self.run("dvc", "repro", "--dry", *options).stdout))

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


def lay_out(folder: Path, changes: Mapping[str, object]) -> None:
    """The repository before anything has run: its code, images, weights and params.yaml with `changes`, committed.

    Args:
        changes: top-level blocks of params.yaml that take the place of the small ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TRACKED:
        shutil.copy(ROOT / name, folder / name)
    for name in ("stages", "regvit", "choices", "sweeps"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)
    for seed, name in enumerate(("plain", "shifted", "later")):
        draw(folder / "images" / name, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), folder / "weights.safetensors")
    YAML_FILE.dump(small_parameters() | changes, folder / "params.yaml")
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main"], cwd=folder, check=True)
    commit(folder, "code")


def commit(folder: Path, message: str) -> None:
    """Everything that git does not ignore, by a tester."""
    git = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    subprocess.run([*git, "add", "--all"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", message], cwd=folder, check=True)


def small_parameters() -> dict:
    """Those of this repository with two sets of drawings, one tiny backbone and little work in every stage."""
    params = YAML_FILE.load(ROOT / "params.yaml")
    params |= {
        "in_distribution": "plain",
        "datasets": {
            "plain": {"source": "folder:images/plain", "role": "id"},
            "shifted": {"source": "folder:images/shifted", "role": "ood"},
        },
        "scenes": {"rooms": {"source": "relief", "images": {"train": 4, "val": 2, "test": 3}}},
        "backbones": {"tiny": {"source": "file:weights.safetensors", "architecture": "test_vit", "img_size": 48}},
        "runs": {
            "original": {"backbone": "tiny", "registers": "none", "num_registers": 0},
            "cured": {"backbone": "tiny", "registers": "test_time", "num_registers": 1},
        },
        "verify": {"images": 4, "pictures": "rooms"},
        "extract_dense": {
            "layers": 1,
            "datasets": {
                "rooms": {"img_size": 48, "arrays": ["patches", "norms", "attention"]},
                "plain": {"img_size": None, "arrays": ["patches"]},
            },
        },
        "evaluate": {"detectors": ["msp"], "bootstrap": 10, "shrinkage": None},
    }
    params["identify"]["images"] = 8
    params["probe"] |= {"readouts": ["cls"], "learning_rates": [0.1], "steps": 4, "batch_size": 8}
    params["baselines"] |= {"neighbours": [2], "logistic": [0.1]}
    for stage in ("tokens", "attention", "segment", "depth", "hummingbird", "correspond"):
        params[stage]["datasets"] = ["rooms"]
    params["retrieve"]["datasets"] = ["shifted"]
    params["token_classes"] |= {"datasets": ["plain"], "learning_rates": [0.1], "steps": 2, "batch_size": 4}
    params["discover"]["datasets"] = []  # rooms have no boxes
    for stage in ("segment", "depth"):
        params[stage] |= {"learning_rates": [0.01], "steps": 2, "batch_size": 2}
    params["depth"]["bins"] = 8
    return params
