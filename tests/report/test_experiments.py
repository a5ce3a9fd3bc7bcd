"""Experiments are held against the first one: paired where images pair, and told apart from those that are not."""

import csv
import dataclasses
import math

import numpy as np
import pytest
from PIL import Image
from report_example import estimate, measured

from regvit.measures.evaluation import Plan, draw, evaluate, rounded
from regvit.probing.predictions import Predictions
from regvit.report.comparisons import Value
from regvit.report.experiments import (
    Change,
    Experiment,
    Row,
    compare_experiments,
    experiment_table,
    plot_experiments,
    unpaired_difference,
    write_rows,
)
from regvit.stats.accuracy import paired_accuracy_difference

PLAN = Plan("home", ("lines",), ("flags",), ("msp",), bootstrap=50)


def predictions(seed: int, digest: str = "d", shift: float = 0.0) -> Predictions:
    """Of one readout on 60 images a set, with two seeds; `shift` makes the right class likelier."""
    rng = np.random.default_rng(seed)
    labels = np.arange(60) % 3
    right = shift * np.eye(3, dtype=np.float32)[labels]
    logits = {("cls", name): rng.normal(size=(2, 60, 3)).astype(np.float32) + right for name in ("home", "lines")}
    scores = {("msp", "cls", name): rng.normal(size=(2, 60)) + (name == "flags") for name in ("home", "lines", "flags")}
    every = {"home": labels, "lines": labels, "flags": np.full(60, -1)}
    images = {name: np.arange(60) for name in every}
    allowed = dict.fromkeys(("home", "lines"), (0, 1, 2))
    return Predictions(logits, every, allowed, ("a", "b", "c"), dict.fromkeys(every, digest), images, scores=scores)


def with_accuracies(name: str, found: Predictions | None = None, shift: float = 0.0, **known) -> Experiment:
    """An experiment with one run `cured`, its probes' metrics from the predictions where there are some."""
    run = measured("cured", "test_time", shift=shift)
    drawn = None if found is None else draw(found, PLAN)
    evaluated = {} if drawn is None else rounded(evaluate(drawn, PLAN))
    run = dataclasses.replace(run, run=dataclasses.replace(run.run, evaluate=evaluated))
    return Experiment(name, {"cured": run}, predictions={"cured": drawn} if drawn else {}, **known)


def row(rows: list[Row], label: str, dataset: str) -> Row:
    (found,) = [each for each in rows if (each.label, each.dataset) == (label, dataset)]
    return found


def test_accuracies_are_paired_by_image_and_seed():
    first, second = predictions(0), predictions(1, shift=1.0)
    rows = compare_experiments([with_accuracies("a", first), with_accuracies("b", second)], PLAN)
    found = row(rows, "top-1 from cls, %", "home")
    expected = paired_accuracy_difference(second.correct("cls", "home"), first.correct("cls", "home"))
    assert found.changes[0].paired
    assert found.changes[0].value.value == pytest.approx(expected.value, abs=1e-5)
    assert found.changes[0].value.lo == pytest.approx(expected.lo, abs=1e-5)
    assert found.values[0].value == pytest.approx(first.correct("cls", "home").mean(), abs=1e-5)
    anomalies = row(rows, "mean FPR95, msp, from cls, %", "anomalies")
    assert anomalies.better == -1 and anomalies.changes[0].paired


def test_one_detector_is_shown_and_predictions_need_no_other():
    several = dataclasses.replace(PLAN, detectors=("msp", "energy"))
    pair = [with_accuracies("a", predictions(0)), with_accuracies("b", predictions(1))]
    assert compare_experiments(pair, several) == compare_experiments(pair, PLAN)


def test_predictions_of_other_images_do_not_pair():
    first, other = with_accuracies("a", predictions(0)), with_accuracies("b", predictions(1, digest="e"))
    found = row(compare_experiments([first, other], PLAN), "top-1 from cls, %", "home")
    assert not found.changes[0].paired
    assert found.changes[0].value == unpaired_difference(found.values[1], found.values[0])


def test_without_predictions_the_difference_is_that_of_two_figures():
    with_some = [with_accuracies("a", predictions(0)), with_accuracies("b", predictions(1))]
    bare = [dataclasses.replace(each, predictions={}) for each in with_some]
    assert not row(compare_experiments(bare, PLAN), "top-1 from cls, %", "home").changes[0].paired


def test_the_tables_of_images_pair_where_the_data_set_is_the_same():
    same, other = {"scenes": "x"}, {"scenes": "y"}
    a, b, c = (with_accuracies(name, data=data) for name, data in (("a", same), ("b", same), ("c", other)))
    rmse = {"rmse": ["0.4", "0.5", "0.6", "0.5"], "image_id": ["a", "b", "c", "d"]}
    runs = {}
    for each in (b, c):
        run = each.runs["cured"]
        run = dataclasses.replace(run, tables=run.tables | {("depth", "scenes", "images"): rmse})
        found = run.found | {"depth": {"scenes": {"n": 4, **estimate("rmse", 0.5)}}}
        runs[each.name] = dataclasses.replace(run, found=found)
    b, c = (dataclasses.replace(each, runs={"cured": runs[each.name]}) for each in (b, c))
    found = row(compare_experiments([a, b, c], PLAN), "depth RMSE, m", "scenes")
    paired, unpaired = found.changes
    assert paired.paired and not unpaired.paired
    assert paired.value.value == pytest.approx(-0.1)  # each image is 0.1 m nearer
    assert (paired.value.lo, paired.value.hi) == (pytest.approx(-0.1), pytest.approx(-0.1))


def test_equal_metrics_differ_by_nothing():
    rows = compare_experiments([with_accuracies("a"), with_accuracies("b")], PLAN)
    assert {change for each in rows for change in each.changes} <= {
        Change(Value(0.0, 0.0, 0.0, n), True) for n in {each.values[0].n for each in rows}
    }
    assert not any(each.differs for each in rows)


def test_the_interval_of_two_figures_is_put_together_from_theirs():
    found = unpaired_difference(Value(0.6, 0.5, 0.8), Value(0.3, 0.2, 0.5))
    assert found.value == pytest.approx(0.3)
    assert found.lo == pytest.approx(0.3 - math.sqrt(0.1**2 + 0.2**2))
    assert found.hi == pytest.approx(0.3 + math.sqrt(0.2**2 + 0.1**2))
    assert unpaired_difference(Value(0.6), Value(0.3, 0.2, 0.5)) == Value(pytest.approx(0.3))


def test_a_run_that_only_one_experiment_has_is_left_out():
    both = with_accuracies("a")
    more = Experiment("b", {**both.runs, "other": measured("other")})
    assert {each.run for each in compare_experiments([both, more], PLAN)} == {"cured"}


@pytest.mark.parametrize(
    ("experiments", "message"),
    [
        ([Experiment("a", {})], "1 experiment is given; two or more can be compared"),
        (
            [Experiment("a", {"x": None}), Experiment("b", {})],
            r"no run is in two of the experiments.*\(a: x; b: none\)",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(experiments, message):
    with pytest.raises(ValueError, match=message):
        compare_experiments(experiments, PLAN)


ROWS = [
    Row("r", "top-1, %", "home", 100, 1, 1, (Value(0.5, 0.4, 0.6, 9), Value(0.7, 0.6, 0.8, 9)), (Change(Value(0.2, 0.1, 0.3), True),)),
    Row("r", "RMSE, m", "d", 1, 2, -1, (Value(0.5, 0.4, 0.6), Value(0.9)), (Change(Value(0.4), False),)),
    Row("r", "only one", "d", 1, 1, 1, (None, Value(1.0)), (None,)),
    Row("r", "same", "d", 1, 1, 1, (Value(1.0), Value(1.0)), (Change(Value(0.0, 0.0, 0.0), True),)),
]  # fmt: skip
TWO = [Experiment("a", {}), Experiment("b", {})]


def test_the_table_marks_what_is_sure_and_what_is_not_paired():
    table = experiment_table(TWO, ROWS)
    assert table.header[-3:] == ("a", "b", "b − a")
    assert table.rows[0] == (
        "r",
        "top-1, %",
        "home",
        "9",
        "50.0 [40.0–60.0]",
        "70.0 [60.0–80.0]",
        "+20.0 [+10.0, +30.0] ▲",
    )
    assert table.rows[1][-1] == "+0.40 †"
    assert table.rows[2][4:] == ("–", "1.0", "–")
    assert len(table.rows) == 3 and "1 rows in which nothing differs are left out" in table.note
    assert len(experiment_table(TWO, ROWS, everything=True).rows) == 4


def test_the_rows_are_written_with_a_line_a_figure(tmp_path):
    write_rows(tmp_path / "a.csv", TWO, ROWS)
    with open(tmp_path / "a.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 7
    assert lines[1] == {
        "run": "r", "measure": "top-1, %", "data_set": "home", "experiment": "b", "value": "0.7", "lo": "0.6", "hi": "0.8",
        "n": "9", "difference": "0.2", "difference_lo": "0.1", "difference_hi": "0.3", "paired": "True",
    }  # fmt: skip


def test_the_picture_has_a_panel_a_row_that_differs(tmp_path):
    plot_experiments(tmp_path / "a.png", TWO, ROWS)
    plot_experiments(tmp_path / "b.png", TWO, ROWS[:1])
    assert Image.open(tmp_path / "a.png").width == pytest.approx(3 * Image.open(tmp_path / "b.png").width, abs=3)
    plot_experiments(tmp_path / "c.png", TWO, ROWS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_where_nothing_differs_there_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="the experiments have the same figures everywhere"):
        plot_experiments(tmp_path / "a.png", TWO, ROWS[3:])
