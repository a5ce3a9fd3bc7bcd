"""The library, built as a wheel and installed where there is nothing but what it declares to need."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
USE = """
import sys
import timm, torch
from regvit import *
from regvit import add_test_time_registers, find_register_neurons, load, remove_test_time_registers
model = timm.create_model("test_vit", pretrained=False).eval()
assert not find_register_neurons(model, torch.randn(8, 3, 160, 160)).selected
add_test_time_registers(model, {4: [10, 20]})
assert model.num_prefix_tokens == 2
remove_test_time_registers(model)
print(sys.modules["regvit"].__file__)
"""


def closure(requirements: list[str]) -> set[str]:
    """Names of the installed distributions that these requirements bring, without extras."""
    wanted, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in wanted and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            try:
                waiting += map(Requirement, metadata.requires(name) or ())
            except metadata.PackageNotFoundError:  # of another platform or build of torch
                continue
            wanted.add(name)
    return wanted


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel and links to the packages that it needs, and no other."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "regvit", folder / "regvit", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", folder, folder], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in closure(needs):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    (wheel,) = folder.glob("*.whl")
    shutil.unpack_archive(wheel, packages, "zip")
    return folder / "venv" / "bin" / "python"


def run(python: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([python, "-I", *words], capture_output=True, text=True, cwd=python.parent)


def test_the_wheel_works_with_what_it_declares_to_need_alone(python):
    done = run(python, "-c", USE)
    assert done.returncode == 0, done.stderr
    assert str(python.parents[1]) in done.stdout


def test_what_only_the_pipeline_needs_is_not_there(python):
    for name in ("pandas", "zarr", "sklearn", "matplotlib", "pydantic", "typer", "dvc"):
        assert run(python, "-c", f"import {name}").returncode == 1, f"{name} is there: the test above shows nothing"


def test_the_command_says_what_to_install(python):
    done = run(python, "-m", "regvit", "look", "a.png")
    assert done.returncode == 2
    assert done.stderr == "regvit: the commands need more than the library; say pip install 'regvit[pipeline]'\n"


def test_the_wheel_holds_every_room_and_no_tests(python):
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    rooms = {path.name for path in (ROOT / "regvit").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {path.name for path in (packages / "regvit").iterdir() if path.is_dir()} - {"__pycache__"} == rooms
    assert not (packages / "tests").exists()
