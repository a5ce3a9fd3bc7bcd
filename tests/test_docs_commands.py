"""Every command of README.md and docs/ is run, on a small project, or stands in a table with the reason why it cannot be.

The project is this repository with small parameters and drawings (small_pipeline.py), built by the README's own first
command. A command that is new in the text fails `test_every_command_is_run_or_has_a_reason` until it has an entry here.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import timm
from documented import DRAWN, ROOT, blocks, calls, commands, iterate, pages, read
from PIL import Image
from ruamel.yaml import YAML
from small_pipeline import WARM, lay_out, small_parameters

import regvit

sys.path.insert(0, str(ROOT / "stages"))

from regvit.pipeline.params import faults_of
from regvit.pipeline.runtime import Runtime
from regvit.pipeline.warm_python import warm_python

YAML_FILE = YAML(typ="safe", pure=True)


@dataclass(frozen=True)
class Run:
    """How a command is run.

    Args:
        says: pattern in what it prints.
        leaves: files that it makes or changes.
        instead: what stands in for a part of it that needs a network, other images, or hours.
        copy: the copy of the project that it works in, because it changes it; commands of one copy follow each other.
    """

    says: str = ""
    leaves: tuple[str, ...] = ()
    instead: dict[str, str] = field(default_factory=dict)
    copy: str = ""


HUB = {"timm:vit_large_patch14_dinov2.lvd142m": "file:weights.safetensors --architecture test_vit"}
SWEEP = """\
python -m regvit.pipeline.sweeps list
python -m regvit.pipeline.sweeps queue patches
python -m regvit.pipeline.sweeps start
python -m regvit.pipeline.sweeps table patches"""
EXPERIMENT = """\
dvc exp run -S probe.steps=2000
dvc exp show --only-changed
dvc metrics diff"""
RUN = {
    "make repro": Run(says="nothing reran: everything is up to date"),
    "source .venv/bin/activate": Run(),
    "regvit COMMAND --help": Run(says="examples:\n    regvit neurons", instead={"COMMAND": "neurons"}),
    "regvit look cat.jpg": Run(says="patches", leaves=("look.png",)),
    "regvit neurons timm:vit_large_patch14_dinov2.lvd142m photos/": Run(leaves=("neurons.json",), instead=HUB),
    "regvit export focus_planted --neurons features/neurons/focus_planted.json --out cured --onnx": Run(
        says=r"onnx +differs from the hooked model by \d", leaves=("cured/weights.safetensors", "cured/model.onnx")
    ),
    "regvit export focus_planted --run features/runs/<run>.json --out cured": Run(
        leaves=("cured/registers.json",), instead={"<run>": "test_time_reg"}
    ),
    "dvc repro": Run(says="Data and pipelines are up to date"),
    "dvc status": Run(says="Data and pipelines are up to date"),
    "dvc metrics show": Run(says=r"metrics/original\.json"),
    "dvc plots show": Run(leaves=("dvc_plots/index.html",)),
    "make check": Run(says="no fault found"),
    'make compare EXPS="main my-experiment"': Run(instead={"my-experiment": "workspace"}),
    "python -m regvit.pipeline.gate --against main": Run(says="No guarded figure fell"),
    "make choose": Run(says="(?s)cifar10 .*imagenet "),
    "make choose NAME=mine IMAGES=/data/photos": Run(
        says="params.yaml: mine", copy="chosen", instead={"/data/photos": "{folder}/project/photos"}
    ),
    "make choose NAME=emoji": Run(says="params.yaml: emoji", copy="chosen"),
    "make choose NAME=emoji_large": Run(copy="chosen"),
    SWEEP: Run(
        says=r"(?s)patches +Treatment.*register\.patches",
        copy="swept",
        instead={"regvit.pipeline.sweeps start": "dvc exp run --run-all"},  # which waits for the last one
    ),
    "dvc repro -f download@mine": Run(says="Running stage 'download@mine'", copy="changed"),
    EXPERIMENT: Run(says=r"(?s)Ran experiment.*metrics/\w+\.json", instead={"2000": "5"}, copy="changed"),
    "dvc plots diff main": Run(leaves=("dvc_plots/index.html",), copy="changed"),
    "dvc params diff": Run(says=r"probe\.steps +4 +5", copy="changed"),
}
# Commands that cannot be run here, by their first line, and why.
CANNOT = {
    "make test": "this is a part of it",
    "make choose NAME=cifar10 IMAGES=/data/images": "needs the published files; tests/test_every_choice.py runs it in small",
    "make choose NAME=imagenet IMAGES=/data/images && source .venv/bin/activate": "needs ImageNet and 8 GPUs",
    "make choose NAME=finetune && make repro": "takes 20 minutes; tests/test_every_choice.py runs it in small",
    "make choose NAME=registers": "needs the published files; tests/test_every_choice.py runs it in small",
    "make choose NAME=cures && make repro": "takes half an hour; tests/test_every_choice.py runs it in small",
    "regvit census focus focus_planted --images photos/": "tests/cli/test_cli.py does so",
    "dvc push": "tests/stages/test_caching.py does so",
    "dvc remote add --default shared s3://bucket/regvit": "tests/stages/test_caching.py does so with a folder",
    "REGVIT_SIMULATIONS=2000 pytest tests/stats/test_coverage.py": "takes minutes; the suite runs it with 300",
    "pip install .": "tests/test_wheel.py installs the library",
    "pip install '.[pipeline]'": "fetches packages",
    "python -m benchmarks.discovery": "takes minutes; tests/test_benchmarks.py runs the others small",
    "python -m benchmarks.extraction": "takes minutes; tests/test_benchmarks.py runs it at tiny sizes",
    "pip install 'regvit[cluster]'": "fetches packages; the tests of the Ray engine run extraction on Ray",
    "cd /shared/regvit && source .venv/bin/activate": "needs SLURM and GPUs; the tests of the Ray engine run it on two nodes",
}
# Text of the docs that calls a library, and what stands in for its names.
CALLS = {
    'regvit.load("cured")': {},
    "regvit.load(folder)": {"folder": "'cured'"},
    'zarr.open_group("s3://…")': {"s3://…": "features/test_time_reg/plain.zarr"},
    'zarr.open_group("….zarr", mode="r")["cls"][:]': {"….zarr": "features/test_time_reg/plain.zarr"},
}
# One short experiment.
PATCHES = """\
title: Treatment of the patches
vary: {register.patches: [mean]}
stages:
  verify@test_time_reg: [outlier_fraction]
"""


@dataclass(frozen=True)
class Project:
    """A built project, and the copies in which commands change something."""

    folder: Path

    def copied(self, name: str) -> Path:
        """The copy of that name; the project itself where there is no name."""
        folder = self.folder.with_name(name) if name else self.folder
        if not folder.exists():
            shutil.copytree(self.folder, folder, symlinks=True)
        return folder

    def shell(self, script: str, copy: str = "") -> str:
        """What a script says; it must end well."""
        folder = self.copied(copy)
        environment = os.environ | {
            "PATH": f"{folder}/.venv/bin{os.pathsep}{os.environ['PATH']}",
            "MAKEFLAGS": "",
            "GIT_CONFIG_GLOBAL": os.devnull,
            **{f"GIT_{role}_NAME": "tester" for role in ("AUTHOR", "COMMITTER")},
            **{f"GIT_{role}_EMAIL": "tester@example.org" for role in ("AUTHOR", "COMMITTER")},
        }
        done = subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", script], cwd=folder, env=environment, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        assert done.returncode == 0, f"{script}\nended with {done.returncode}:\n{done.stdout[-4000:]}"
        assert "Traceback" not in done.stdout, done.stdout[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Project]:
    """The small project, after `make repro`; the names are those of the default run."""
    folder = tmp_path_factory.mktemp("docs") / "project"
    small = small_parameters()
    tiny = small["backbones"]["tiny"]
    lay_out(folder, {
        "datasets": {"plain": small["datasets"]["plain"], "mine": {"source": "folder:images/later", "role": "ood"}},
        "backbones": {"focus_planted": tiny},
        "runs": {"original": {"backbone": "focus_planted", "registers": "none", "num_registers": 0},
                 "test_time_reg": {"backbone": "focus_planted", "registers": "test_time", "num_registers": 1}},
        "identify": small["identify"] | {"layer": 3, "top_k": 5},
        **{stage: small[stage] | {"datasets": []} for stage in ("tokens", "token_classes", "segment", "depth", "hummingbird", "correspond", "retrieve")},
    })  # fmt: skip
    shutil.copytree(folder / "images/plain/test", folder / "photos")
    Image.open(folder / "photos/one/0.png").save(folder / "cat.jpg")
    (folder / "sweeps/patches.yaml").write_text(PATCHES)
    rules = read(folder / "guard.yaml").splitlines(keepends=True)  # the others guard what only planted backbones have
    (folder / "guard.yaml").write_text(
        "".join(line for line in rules if "metric: top1" in line or line.startswith("#"))
    )
    with warm_python(**WARM) as programs:
        environment(folder, programs)
        built = Project(folder)
        built.shell("git add --all && git commit --quiet --message parameters && make repro")
        built.shell("git add --all && git commit --quiet --message results")
        yield built


def environment(folder: Path, programs: Path) -> None:
    """What `make env` leaves, with the programs of this environment."""
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("python", "dvc", "regvit"):
        (folder / ".venv/bin" / name).symlink_to(programs / name)
    (folder / ".venv/bin/activate").write_text('export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"\n')
    subprocess.run([programs / "python", "regvit/pipeline/plots_template.py"], cwd=folder, check=True)
    (folder / ".venv/.complete").touch()


def test_every_command_is_run_or_has_a_reason():
    unknown = {command: page for command, page in commands().items() if not is_run(command) and not cannot(command)}
    assert unknown == {}, "a command of the docs is neither run nor has a reason: give it an entry in RUN or CANNOT"


def test_no_entry_is_left_of_a_command_that_the_docs_do_not_have_any_more():
    assert RUN.keys() - commands().keys() == set()
    assert CANNOT.keys() - {command.splitlines()[0] for command in commands()} == set()
    assert not [command for command in RUN if cannot(command)]
    assert all(len(reason) > 10 for reason in CANNOT.values())


@pytest.mark.parametrize("command", RUN)
def test_a_command_does_what_its_text_says(project, command):
    run, script = RUN[command], command
    for text, other in run.instead.items():
        assert text in script
        script = script.replace(text, other.format(folder=project.folder.parent))
    before = {name: stamp(project.copied(run.copy) / name) for name in run.leaves}
    said = project.shell(script, run.copy)
    assert re.search(run.says, said), said[-3000:]
    for name, was in before.items():
        assert stamp(project.copied(run.copy) / name) not in (None, was), f"{name} was not written:\n{said[-3000:]}"


@pytest.mark.parametrize("call", CALLS)
def test_a_call_in_the_text_works(project, call):
    code = call
    for name, value in CALLS[call].items():
        assert name in code
        code = code.replace(name, value)
    export = "regvit export focus_planted --neurons features/neurons/focus_planted.json --out cured"
    if "cured" in code and not (project.folder / "cured").exists():
        project.shell(export)
    library = re.match("[a-z]+", code)[0]
    (project.folder / "call.py").write_text(f"import {library}\nassert {code} is not None\n")
    project.shell("python call.py")


@pytest.mark.parametrize(
    "block", list(iterate("python")), ids=lambda block: f"{block.page}:{block.text.splitlines()[0]}"
)
def test_python_of_the_pages_in_docs_runs_as_it_stands(project, block, monkeypatch):
    if block.page in ("README.md", "docs/python.md"):
        pytest.skip("tests/test_readme.py runs it and looks at what comes out")
    monkeypatch.chdir(project.folder)
    exec(block.text.replace("twemoji", "plain"), {})


def test_every_call_in_the_text_is_run():
    assert calls().keys() == CALLS.keys()


@pytest.mark.parametrize("block", list(iterate("yaml")), ids=lambda block: block.text.splitlines()[1].strip()[:40])
def test_parameters_in_the_text_make_a_whole_experiment_and_name_weights_that_timm_has(block):
    shown = YAML_FILE.load(block.text)
    params = YAML_FILE.load(read(ROOT / "params.yaml"))
    if "apiVersion" in shown:  # for Kubernetes
        assert {"kind", "metadata", "spec"} <= shown.keys()
        return
    if "zeroshot" in shown:  # its data set is the reader's
        params["datasets"]["imagenet"] = {"source": "folder:/data/imagenet", "role": "anomaly"}
    for key, value in shown.items():
        params[key] = params[key] | value if isinstance(value, dict) else value
    assert list(faults_of(params)) == []
    sources = [backbone["source"] for backbone in shown.get("backbones", {}).values()]
    for source in (source for source in sources if source != params["backbones"]["focus"]["source"]):
        assert source.removeprefix("timm:") in timm.list_pretrained()


def test_what_the_docs_say_of_the_machine_can_be_put_into_runtime_yaml(tmp_path, monkeypatch):
    text = read(ROOT / "docs/data.md")
    (example,) = re.findall(r"`runtime\.yaml` \(`(\{.*?\})`\)", text)
    (tmp_path / "runtime.yaml").write_text(example.replace("cuda", "cpu"))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    loaded = Runtime.load()
    assert (loaded.batch_size, loaded.workers) == (256, 8)
    for name in re.findall(r"`(REGVIT_[A-Z_]+)`", text):
        assert hasattr(loaded, name.removeprefix("REGVIT_").lower())


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_files_that_a_page_links_to_and_modules_that_it_names_are_there(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", read(page)) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:regvit|stages|benchmarks|tests)(?:[./]\w+)+)`", read(page))
    assert [name for name in named if not is_there(name)] == []


@pytest.mark.parametrize(
    "block", [one for one in blocks() if not one.language and not one.is_shell], ids=lambda b: b.page
)
def test_a_block_that_is_neither_code_nor_commands_is_a_drawing(block):
    assert DRAWN.search(block.text), "say its language, or begin its lines with the programs that documented.py knows"


def is_there(name: str) -> bool:
    """Whether `regvit.room.module`, a name of the package's, or a path is there."""
    if name.rpartition(".")[2].isupper():  # a constant of a module
        name = name.rpartition(".")[0]
    path = name if "/" in name else name.replace(".", "/")
    return any((ROOT / place).exists() for place in (path, f"{path}.py")) or hasattr(regvit, name.partition(".")[2])


def is_run(command: str) -> bool:
    """Whether a command is run: by itself, or, where the text only names it, as a line that goes on with arguments."""
    return command in RUN or any(line.startswith(f"{command} ") or line == command
                                 for script in RUN for line in re.split(r"\n| && ", script))  # fmt: skip


def cannot(command: str) -> str | None:
    """Why a command cannot be run here; None where it can."""
    return CANNOT.get(command.splitlines()[0])


def stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None
