"""A sweep queues an experiment a setting, and its table shows what each measured, or a dash."""

import itertools
import shutil
import sys
from pathlib import Path

import pytest

from regvit.pipeline import sweeps
from regvit.stats.figures import Figure, figures_table, write_figures

ROOT = Path(__file__).parents[2]
VARIED = """
title: Registers
expect: one is best
vary: {runs.treated.num_registers: [1, 4], register.patches: [zero]}
set: {runs.treated: {backbone: b}}
stages:
  verify@treated: [cls_cosine, odd_one]
slow:
  evaluate@treated: ["top1:cls:home"]
"""
POINTS = """
title: Backbones
points: {planted: {backbones.b.plant: {seed_layer: 4}}, plain: {backbones.b.plant: null}}
stages:
  attention@treated-scenes: [on_outliers]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps/varied.yaml").write_text(VARIED)
    (tmp_path / "sweeps/points.yaml").write_text(POINTS)
    return tmp_path


def settings(command: list[str]) -> list[str]:
    return [after for word, after in itertools.pairwise(command) if word == "--set-param"]


def test_dvc_makes_the_combinations_of_what_is_varied(folder):
    (command,) = sweeps.read_sweep("varied").commands()
    assert command[command.index("--name") + 1] == "varied" and "--queue" in command
    assert settings(command) == [
        '++runs.treated.backbone="b"',
        "++runs.treated.num_registers=1,4",
        '++register.patches="zero"',
    ]
    assert command[-1:] == ["verify@treated"]


def test_each_point_is_an_experiment_of_its_own_name(folder):
    commands = list(sweeps.read_sweep("points").commands())
    assert [command[command.index("--name") + 1] for command in commands] == ["points-planted", "points-plain"]
    assert [settings(command) for command in commands] == [
        ["++backbones.b.plant.seed_layer=4"],
        ["++backbones.b.plant=null"],
    ]


def test_what_is_slow_has_experiments_of_its_own_so_that_no_old_figure_is_taken_for_measured(folder):
    slow = sweeps.read_sweep("varied", slow=True)
    assert slow.name == "varied_slow" and list(slow.stages) == ["verify@treated", "evaluate@treated"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title: a\nvaried: {}\n", "unknown key varied; known are expect, points"),
        ("title: a\nstages: {x: [y]}\n", "give either vary or points"),
        ("title: a\nvary: {seed: [0]}\n", "and the stages that are measured"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_in_a_line(folder, text, said):
    (folder / "sweeps/wrong.yaml").write_text(text)
    with pytest.raises(SystemExit, match=said):
        sweeps.read_sweep("wrong")
    with pytest.raises(SystemExit, match=r"there is no sweeps/none\.yaml; there are points, varied, wrong"):
        sweeps.read_sweep("none")


@pytest.fixture
def experiments(folder, monkeypatch):
    """Two experiments of `varied`, of which one left no figures, and some that are not of it."""
    write_figures(folder / "10/metrics/runs/treated/verify/figures.csv",
                  figures_table([Figure("cls_cosine", 0.95, 0.94, 0.96, 9), Figure("odd_one", None)], "treated", "home"))  # fmt: skip
    shown = [
        {
            "Experiment": name,
            "rev": rev,
            "runs.treated.num_registers": count,
            "params.yaml:register.patches": "zero",
            "State": "Failed" if name == "varied-1" else "Success",
        }
        for name, rev, count in (
            ("varied-2", "10", 4),
            ("varied-1", "9", 1),
            ("varied_slow-1", "8", 1),
            (None, "main", 1),
        )
    ]
    monkeypatch.setattr(sweeps.dvc.api, "exp_show", lambda: shown)
    monkeypatch.setattr(sweeps.dvc.api, "open", lambda path, rev: (folder / rev / path).open())


def test_the_table_has_a_row_an_experiment_in_the_order_of_the_values(experiments):
    sweep = sweeps.read_sweep("varied")
    rows = sweeps.table(sweep, sweeps.experiments(sweep)).frame.map(str).values.tolist()
    assert rows == [["1", "zero", "–", "–"], ["4", "zero", "0.950 [0.940–0.960]", "–"]]


def test_what_failed_is_named_under_the_table(experiments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweeps", "table", "varied"])
    sweeps.main()
    assert capsys.readouterr().out.endswith("failed: varied-1; `dvc queue logs <name>` says why\n")


def test_without_experiments_it_says_how_to_make_some(experiments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweeps", "table", "points"])
    sweeps.main()
    assert "no experiment of sweep points belongs to this commit: `queue` it first" in capsys.readouterr().out


def test_a_point_that_would_leave_a_fault_is_named_before_anything_is_queued(folder, monkeypatch):
    shutil.copy(ROOT / "params.yaml", folder)
    monkeypatch.setattr(sweeps.subprocess, "call", lambda *_, **__: pytest.fail("queued"))
    for name, said in {
        "points": "planted: backbones.b.",
        "varied": "{'runs.treated.num_registers': 1, .*}: runs.t",
    }.items():
        monkeypatch.setattr(sys, "argv", ["sweeps", "queue", name])
        with pytest.raises(SystemExit, match=f"nothing was queued, as params.yaml would have a fault at {said}"):
            sweeps.main()


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_of_the_repository_can_be_queued(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for slow in (False, True):
        sweep = sweeps.read_sweep(path.stem, slow)
        assert all(command[-len(sweep.stages) :] == list(sweep.stages) for command in sweep.commands())
