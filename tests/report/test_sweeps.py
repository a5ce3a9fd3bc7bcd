import csv
import json
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from PIL import Image
from ruamel.yaml import YAML

from regvit.report.sweeps import Point, Value, assignments, markdown, plot, read_kept, read_row, sweep_of, write_csv

ROOT = Path(__file__).parents[2]
FILE = "metrics/verify/run.json"
SIMPLE = {
    "title": "Sizes",
    "vary": {"a.b": [1, 2, None]},
    "measure": {"verify@run": {"file": FILE, "columns": ["x", "{point}.y"]}},
}


def test_vary_has_a_point_for_each_value_and_each_combination():
    assert sweep_of("s", SIMPLE).points == (
        Point("1", {"a.b": 1}), Point("2", {"a.b": 2}), Point("null", {"a.b": None})
    )  # fmt: skip
    both = sweep_of("s", SIMPLE | {"vary": {"a": [1, 2], "b": [["x", "y"], 0.5]}, "set": {"c": 3}})
    assert [point.label for point in both.points] == ["1_x+y", "1_0.5", "2_x+y", "2_0.5"]
    assert both.points[3].changes == {"c": 3, "a": 2, "b": 0.5}


def test_named_points_stand_in_their_order_and_may_change_nothing():
    points = {"b": {"x": 1}, "a": None}
    sweep = sweep_of("s", {"title": "t", "points": points, "measure": SIMPLE["measure"]})
    assert sweep.points == (Point("b", {"x": 1}), Point("a", {}))


def test_an_experiments_name_tells_sweep_and_point_and_changes_with_what_is_set_or_measured():
    """An experiment carries the metrics of stages that it did not run: another choice of stages is another experiment."""
    document = SIMPLE | {"slow": {"evaluate@run": {"file": "e.json", "columns": ["top1"]}}}
    sweep, slow = sweep_of("s", document), sweep_of("s", document, slow=True)
    other = sweep_of("s", document | {"set": {"c": 1}})
    names = {each.experiment(each.points[0]) for each in (sweep, slow, other)}
    assert len(names) == 3
    assert all(re.fullmatch(r"s-1-[0-9a-f]{6}", name) for name in names)
    assert re.fullmatch(r"s-0_5_x-[0-9a-f]{6}", sweep.experiment(Point("0.5+x", {})))


def test_what_is_slow_is_measured_only_where_asked_for():
    document = SIMPLE | {"slow": {"evaluate@run": {"file": "e.json", "columns": ["top1"]}}}
    assert sweep_of("s", document).stages == ("verify@run",)
    assert sweep_of("s", document, slow=True).stages == ("verify@run", "evaluate@run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vry": 1}, "sweep s: unknown key vry; known are title, "),
        ({"title": ""}, "title is missing or empty"),
        ({"points": {"a": {}}}, "give either points or vary, not both"),
        ({"vary": None}, "give either points or vary, not neither"),
        ({"vary": {"a": 3}}, "vary.a is 3; expected a list of at least one value"),
        ({"vary": {"a": [1, "1"]}}, "two points have the label 1; give each its own"),
        ({"measure": {"v": {"file": "f"}}}, "v is .*; expected a block with file and a list of columns"),
    ],
)
def test_a_sweep_that_cannot_be_used_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sweep_of("s", SIMPLE | change)


def test_a_name_that_no_experiment_can_have_is_refused():
    with pytest.raises(ValueError, match="the name 'a-b' is not made of letters"):
        sweep_of("a-b", SIMPLE)
    with pytest.raises(ValueError, match="measures nothing that is slow"):
        sweep_of("s", SIMPLE, slow=True)


def test_dvc_takes_the_assignments_as_they_are_meant(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: {b: 1}\nc: [1, 2]\n")
    changes = {
        "a.b": None,
        "a.d": "random",
        "c": ["x", "y"],
        "e": {"source": "timm:v.t", "deep": {"n": 0.5}},
        "f": True,
    }
    apply_overrides(path, assignments(Point("p", changes)))
    assert YAML(typ="safe", pure=True).load(path) == {
        "a": {"b": None, "d": "random"},
        "c": ["x", "y"],
        "e": {"source": "timm:v.t", "deep": {"n": 0.5}},
        "f": True,
    }


def measured():
    """A sweep with one full row, one without an interval, and one that has not been run."""
    sweep = sweep_of("s", SIMPLE)
    full = {FILE: {"x": 0.5, "x_lo": 0.25, "x_hi": 0.75, "1": {"y": 2}}}
    contents = [full, {FILE: {"x": 1, "2": {"y": None}}}, None]
    return sweep, [read_row(sweep, point, content) for point, content in zip(sweep.points, contents, strict=True)]


def test_values_are_read_with_their_intervals_where_there_are_any():
    _, rows = measured()
    assert rows[0].values == (Value(0.5, 0.25, 0.75), Value(2.0))
    assert rows[1].values == (Value(1.0), Value(None))
    assert rows[2].values is None


def test_a_table_that_was_written_is_read_again(tmp_path):
    sweep, rows = measured()
    write_csv(tmp_path / "s.csv", sweep, rows)
    (tmp_path / "s.md").write_text(markdown(sweep, rows))
    kept = read_kept(tmp_path / "s.csv")
    assert (kept.name, kept.caption, kept.points) == ("s", "Sizes.", ("1", "2"))
    assert kept.values == {
        "x (verify)": (Value(0.5, 0.25, 0.75), Value(1.0)),
        "{point}.y (verify)": (Value(2.0), None),
    }


def test_a_file_that_is_no_table_of_a_sweep_is_refused(tmp_path):
    (tmp_path / "s.csv").write_text("point,value\n1,2\n")
    with pytest.raises(ValueError, match=r"s\.csv has no column hi; write it again: python stages/sweep\.py table s"):
        read_kept(tmp_path / "s.csv")


def test_the_table_says_what_was_not_run_and_what_has_no_value():
    assert markdown(*measured()).splitlines() == [
        "Sizes.",
        "",
        "| point | x | {point}.y |",
        "| --- | --: | --: |",
        "| 1 | 0.5 [0.25, 0.75] | 2 |",
        "| 2 | 1 | – |",
        "| null | not run | not run |",
    ]


def test_the_csv_has_a_line_a_value(tmp_path):
    write_csv(tmp_path / "t.csv", *measured())
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["point", "stage", "key", "value", "lo", "hi"],
        ["1", "verify@run", "x", "0.5", "0.25", "0.75"],
        ["1", "verify@run", "{point}.y", "2.0", "", ""],
        ["2", "verify@run", "x", "1.0", "", ""],
    ]


def test_the_plot_has_a_panel_a_column_and_the_same_bytes_each_time(tmp_path):
    for name in ("a.png", "b.png"):
        plot(tmp_path / name, *measured())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 2 * 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    sweep, rows = measured()
    with pytest.raises(ValueError, match="no measured value to draw"):
        plot(tmp_path / "none.png", sweep, rows[2:])


def stage(monkeypatch, *arguments: str) -> dict:
    """The script's namespace after it ran."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    return runpy.run_path(str(ROOT / "regvit/pipeline/sweep_commands.py"), run_name="__main__")


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_sweeps_change_parameters_that_there_are_and_measure_files_that_the_stages_write(path):
    """Parameters must be in params.yaml, but for what a sweep adds itself and for the keys of controls."""
    load = YAML(typ="safe", pure=True).load
    document, params, stages = load(path), load(ROOT / "params.yaml"), load(ROOT / "dvc.yaml")["stages"]
    sweep = sweep_of(path.stem, document, slow="slow" in document)
    added = set(document.get("set") or {}) | {"runs.test_time_reg.neurons", "runs.test_time_reg.neurons_seed"}
    for point in sweep.points:
        for parameter in point.changes.keys() - added:
            block = params
            for key in parameter.split("."):
                assert key in block, f"{path.name} changes {parameter}, which params.yaml does not have"
                block = block[key]
    for column in sweep.columns:
        name, _, item = column.stage.partition("@")
        assert name in stages
        assert (
            column.file == f"metrics/{name}/{item.replace('-', '/')}.json"
        )  # names have no hyphens: DVC joins with them


@pytest.fixture
def dvc(monkeypatch, tmp_path):
    """The script with a `dvc` that only remembers what it was told, in a folder with one sweep."""
    told, known = [], [{"rev": "workspace"}, {"rev": "HEAD", "experiments": []}]

    def run(command, **options):
        told.append((command[3:], options.get("env", {}).get("PYTHONPATH")))
        return types.SimpleNamespace(stdout=json.dumps(known), returncode=0)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps/sizes.yaml").write_text(json.dumps(SIMPLE))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(subprocess, "call", lambda command, **options: run(command, **options).returncode)

    sweep = sweep_of("sizes", SIMPLE)
    names = {point.label: sweep.experiment(point) for point in sweep.points}

    def finish(label: str, content: dict, state: str | None = None) -> None:
        revision = {"rev": "0", "data": {"metrics": {FILE: {"data": content}, "broken.json": {"error": "gone"}}}}
        executor = {"state": state} if state else None
        known[1]["experiments"].append({"name": names[label], "revs": [revision], "executor": executor})

    return types.SimpleNamespace(told=told, finish=finish, names=names)


def test_queue_hands_over_every_point_that_is_not_done_with_the_measuring_stages_as_targets(dvc, monkeypatch, capsys):
    dvc.finish("2", {"x": 1})
    stage(monkeypatch, "queue", "sizes")
    assert dvc.told[1:] == [
        (["exp", "run", "--queue", "--name", dvc.names[label], "--set-param", f"++a.b={label}", "verify@run"], ".")
        for label in ("1", "null")
    ]
    assert f"{dvc.names['2']} is done; `dvc exp remove {dvc.names['2']}` lets it run" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["queued", "running", "failed"])
def test_what_is_queued_or_has_failed_is_not_queued_again_and_has_no_values(dvc, monkeypatch, capsys, state):
    dvc.finish("2", {"x": 1}, state)
    stage(monkeypatch, "queue", "sizes")
    assert len(dvc.told[1:]) == 2
    assert "is queued or has failed (`dvc queue status`)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no experiment of sweep sizes"):
        stage(monkeypatch, "table", "sizes")


def test_start_works_the_queue_off_with_the_library_of_the_experiments_own_folder(dvc, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        stage(monkeypatch, "start", "--jobs", "2")
    assert ended.value.code == 0
    assert dvc.told == [(["queue", "start", "--jobs", "2"], ".")]


def test_table_writes_markdown_csv_and_plot_of_the_finished_experiments(dvc, monkeypatch, capsys, tmp_path):
    dvc.finish("2", {"x": 0.25, "x_lo": 0.125, "x_hi": 0.5})
    stage(monkeypatch, "table", "sizes", "--out", "here")
    text = (tmp_path / "here/sizes.md").read_text()
    assert "| 2 | 0.25 [0.125, 0.5] | – |" in text
    assert "| 1 | not run | not run |" in text
    assert text in capsys.readouterr().out
    assert (tmp_path / "here/sizes.csv").read_text().splitlines()[1:] == ["2,verify@run,x,0.25,0.125,0.5"]
    assert (tmp_path / "here/sizes.png").stat().st_size > 1000


def test_a_table_of_nothing_and_an_unknown_sweep_end_with_the_cure(dvc, monkeypatch):
    with pytest.raises(SystemExit, match=r"no experiment of sweep sizes belongs to this commit: .* run sizes"):
        stage(monkeypatch, "table", "sizes")
    with pytest.raises(SystemExit, match=r"there is no sweeps/none.yaml; there are sizes"):
        stage(monkeypatch, "run", "none")
