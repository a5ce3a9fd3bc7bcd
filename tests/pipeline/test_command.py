"""How stages end: usage, one line for what a user can mend, a traceback for what only we can."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENDS = """
import sys
from regvit.pipeline.command import command
def main(name):
    {body}
sys.argv = ["stages/tried.py", *{arguments!r}]
command(main, "name", interrupted="work/{{0}} is not finished")
"""


def ended(body, *arguments):
    program = ENDS.format(body=body, arguments=arguments)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_a_wrong_number_of_arguments_gives_the_usage():
    for arguments in ((), ("a", "b")):
        done = ended("pass", *arguments)
        assert (done.returncode, done.stderr) == (1, "usage: python stages/tried.py <name>\n")


def test_ctrl_c_gives_one_line_and_the_status_of_shells():
    done = ended("raise KeyboardInterrupt", "x")
    assert (done.returncode, done.stderr) == (130, "tried: interrupted; work/x is not finished: run the same again\n")


def test_an_error_of_the_disk_gives_one_line_with_the_file():
    done = ended("open('/none/' + name)", "x")
    said = f"tried: /none/x: {os.strerror(errno.ENOENT)}; mend that and run the same again\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert ended("raise FileNotFoundError('x is missing; make it')", "x").stderr == "tried: x is missing; make it\n"


def test_an_error_that_we_raise_gives_our_line_and_one_of_a_library_keeps_its_traceback():
    ours = ended(
        "from regvit.data.manifest import Row, write_dataset; write_dataset('.', 'a', [], ['x', 'x'], {})", "x"
    )
    assert ours.returncode == 1 and "Traceback" not in ours.stderr
    assert ours.stderr.startswith("tried: the rows given for data set 'a': class 'x' is named twice")
    theirs = ended("import numpy; numpy.zeros(3).reshape(2)", "x")
    assert theirs.returncode == 1 and "Traceback" in theirs.stderr and "cannot reshape" in theirs.stderr
    assert "Traceback" in ended("assert False", "x").stderr


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
    shutil.copy(ROOT / "params.yaml", tmp_path)
    command = [sys.executable, str(ROOT / f"stages/{stage}.py"), *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(said), done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_a_terminal_that_lacks_a_character_shows_another_one_and_ends_nothing(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    program = ENDS.format(body="print(name, chr(0x732B))", arguments=("a",))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"a ?\n")
    listed = [sys.executable, "-m", "regvit.pipeline.choose", "--list"]
    assert subprocess.run(listed, capture_output=True, env=environment, cwd=ROOT).returncode == 0


IMPORTED = """
import json, runpy, sys
for stage in sys.argv[1:]:
    runpy.run_path(f"stages/{stage}.py")
print(json.dumps(sorted({"torch", "timm"} & sys.modules.keys())))
"""


@pytest.mark.parametrize(
    ("stages", "imported"),
    [
        (["download", "compose", "compare", "summary", "report", "retrieve"], []),
        (
            ["probe", "baselines", "evaluate", "tokens", "token_classes", "attention", "discover", "segment", "depth"],
            ["torch"],
        ),
        (["hummingbird", "correspond"], ["torch"]),
    ],
)
def test_a_stage_without_a_model_starts_without_timm_and_one_without_tensors_without_torch(stages, imported):
    command = [sys.executable, "-c", IMPORTED, *stages]
    assert json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout) == imported
