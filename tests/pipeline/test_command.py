"""How stages end: usage, one line for what a user can mend, a traceback for what only we can."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stage_runner import run_stage

from regvit.data.manifest import write_dataset
from regvit.data.transform import Transform
from regvit.pipeline.command import command, noted
from regvit.pipeline.params import load_params

ROOT = Path(__file__).parents[2]
ENCODED = """
import sys
from regvit.pipeline.command import command
sys.argv = ["stages/tried.py", "a"]
command(lambda name: print(name, chr(0x732B)), "name", interrupted="")
"""


@pytest.fixture
def ended(monkeypatch):
    """What a stage with one argument exits with: its status, or the line that is said with status 1."""

    def ended(main: Callable[[str], object], *arguments: str) -> int | str:
        monkeypatch.setattr(sys, "argv", ["stages/tried.py", *arguments])
        with pytest.raises(SystemExit) as ending:
            command(main, "name", interrupted="work/{0} is not finished")
        return ending.value.code

    return ended


def test_a_wrong_number_of_arguments_gives_the_usage(ended):
    for arguments in ((), ("a", "b")):
        assert ended(print, *arguments) == "usage: python stages/tried.py <name>"


def test_ctrl_c_gives_one_line_and_the_status_of_shells(ended, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    assert ended(interrupt, "x") == 130
    assert capsys.readouterr().err == "tried: interrupted; work/x is not finished: run the same again\n"


def test_what_is_noted_ends_its_block_with_a_line_and_a_bug_keeps_its_traceback(capsys):
    with noted("x: not resized, as"):
        Transform(0, mean=(0, 0, 0), std=(1, 1, 1))
    assert capsys.readouterr().out.startswith("x: not resized, as ")
    with pytest.raises(ValueError, match="invalid literal"), noted("x:"):
        int("a")


def test_an_error_of_the_disk_gives_one_line_with_the_file(ended):
    def missing(name):
        raise FileNotFoundError(f"{name} is missing; make it")

    said = f"tried: /none/x: {os.strerror(errno.ENOENT)}; mend that and run the same again"
    assert ended(lambda name: Path(f"/none/{name}").read_text(), "x") == said
    assert ended(missing, "x") == "tried: x is missing; make it"


def test_an_error_that_we_raise_gives_our_line_and_a_bug_keeps_its_traceback(ended):
    said = ended(lambda _: write_dataset(".", "a", [], ["x", "x"], {}), "x")
    assert said.startswith("tried: the rows given for data set 'a': class 'x' is named twice")
    for bug in (  # of a library, of a call in a line of ours, and of no kind that is meant for anybody
        lambda _: np.zeros(3).reshape(2),
        lambda _: Transform(2, ("red",) * 3, (1.0,) * 3),
        lambda _: {}["missing"],
    ):
        with pytest.raises((ValueError, KeyError)):
            ended(bug, "x")


@pytest.mark.parametrize(
    ("stage", "names", "said"),
    [
        ("compose", ["orignal"], "compose: runs of params.yaml has no 'orignal': did you mean 'original'?"),
        ("download", ["openmojy"], "download: there is no data set 'openmojy' in params.yaml: did you mean 'openmoji'?"),
        ("compose", ["original"], "compose: data/backbones/focus_planted/backbone.json is missing; a backbone is a folder made by"),
        ("extract", ["curd", "openmoji"], "extract: features/runs/curd.json does not exist; run the compose stage of this run"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_wrong_name_and_a_missing_input_are_named_in_one_line(tmp_path, stage, names, said):
    with pytest.raises(SystemExit) as ending:
        run_stage(tmp_path, load_params(ROOT / "params.yaml"), stage, *names)
    assert ending.value.code.startswith(said)


def test_a_terminal_that_lacks_a_character_shows_another_one_and_ends_nothing():
    for encoding in ("latin-1", "ascii"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", ENCODED], capture_output=True, env=environment)
        assert (done.returncode, done.stdout) == (0, b"a ?\n")
    listed = [sys.executable, "-m", "regvit.pipeline.choose", "--list"]
    assert subprocess.run(listed, capture_output=True, env=environment, cwd=ROOT).returncode == 0


IMPORTED = """
import json, runpy, sys
for stages in sys.argv[1:]:
    for stage in stages.split():
        runpy.run_path(f"stages/{stage}.py")
    print(json.dumps(sorted({"torch", "timm"} & sys.modules.keys())))
"""


def test_a_stage_without_a_model_starts_without_timm_and_one_without_tensors_without_torch():
    without_tensors = "download compose compare summary report retrieve"
    without_a_model = (
        "probe baselines evaluate tokens token_classes attention discover segment depth hummingbird correspond"
    )
    command = [sys.executable, "-c", IMPORTED, without_tensors, without_a_model]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    assert [json.loads(line) for line in said.splitlines()] == [[], ["torch"]]
