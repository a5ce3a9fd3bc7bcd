"""What long stages show while they work: a bar with rate and time left on a terminal, plain lines in a log."""

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from trust_project import make_project

ROOT = Path(__file__).parents[2]
RATE = r"\d+/\d+ {unit}  \d+\.\d {unit}/s  (in )?\d+:\d\d"
# Stages in the order of the pipeline, with what each counts; those that take no time (compose) show nothing.
STAGES = (
    (("download", "home"), "images"),
    (("download", "rooms"), "images"),
    (("backbone", "tiny"), None),
    (("identify", "tiny"), "images"),
    (("compose", "cured"), None),
    (("extract", "cured", "home"), "images"),
    (("probe", "cured"), "steps"),
    (("tokens", "cured", "rooms"), "images"),
    (("attention", "cured", "rooms"), "images"),
    (("discover", "cured", "boxed"), "images"),
    (("extract_patches", "cured", "rooms"), "images"),
    (("segment", "cured", "rooms"), "steps"),
    (("depth", "cured", "rooms"), "steps"),
)
SCRIPT = """
import runpy, sys
sys.path.insert(0, {stages!r})
import torch
torch.set_num_threads(1)
from regvit.data.synthetic import rooms as relief
relief.COUNTS = {{"train": 8, "val": 4, "test": 4}}
draw = relief.render
relief.render = lambda generator: draw(generator, 48)
for words in {commands!r}:
    sys.argv = words
    print("STAGE", words[0], flush=True)
    try:
        runpy.run_path({stages!r} + "/" + words[0] + ".py", run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, ended.code
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, dict[str, str]]:
    """`{"terminal" | "log": {stage: what it wrote}}` of every stage, run once on a terminal of 100 columns, once in a pipe."""
    found = {}
    for where in ("terminal", "log"):
        folder = make_project(tmp_path_factory.mktemp(where))
        code = SCRIPT.format(stages=str(ROOT / "stages"), commands=[list(words) for words, _ in STAGES])
        written = run(code, folder, on_terminal=where == "terminal")
        parts = re.split(r"STAGE (\w+)\r?\n", written)
        found[where] = {}
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            found[where][name] = found[where].get(name, "") + text
    return found


def run(code: str, folder: Path, on_terminal: bool) -> str:
    """What a program writes to stdout and stderr, a terminal or a pipe; it must end well."""
    environment = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1", "REGVIT_DEVICE": "cpu", "MPLBACKEND": "agg",
                                "REGVIT_BATCH_SIZE": "4"}  # fmt: skip
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                          stdout=theirs, stderr=theirs) as process:  # fmt: skip
        os.close(theirs)
        written = b""
        while True:
            select.select([ours], [], [])
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the terminal's other side is closed
                break
            if not part:
                break
            written += part
    os.close(ours)
    text = written.decode()
    assert process.returncode == 0, text[-3000:]
    return text


@pytest.mark.parametrize(("stage", "unit"), [(words[0], unit) for words, unit in STAGES if unit])
def test_a_stage_shows_a_bar_with_rate_and_time_on_a_terminal_and_plain_lines_in_a_log(shown, stage, unit):
    drawn, logged = shown["terminal"][stage], shown["log"][stage]
    assert re.search(r"\r\x1b\[K[^\n]*\[#+-*\] " + RATE.format(unit=unit), drawn), drawn[-500:]
    lines = logged.splitlines()
    assert any(re.fullmatch("[^:]+: " + RATE.format(unit=unit), line) for line in lines), logged
    assert not re.search(r"[\r\x1b]", logged)


def test_no_line_of_a_bar_is_wider_than_the_terminal(shown):
    for text in shown["terminal"].values():
        for line in re.findall(r"\r\x1b\[K([^\r\n]*)", text):
            assert len(line) < 100
