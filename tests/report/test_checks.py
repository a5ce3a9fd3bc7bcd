"""Self-checks hold on a planted backbone that is found and cured exactly, and fail on anything else."""

import dataclasses

import pytest

from regvit.report.checks import Check, self_checks, summary_line
from regvit.report.results import Place, Results
from regvit.report.study import Value


def changed(results: Results, run: str, stage: str, metric: str, value: float | None) -> Results:
    key = (run, Place(stage, metric, "home"))
    figures = dict(results.figures)
    assert figures.pop(key, None) is not None
    return dataclasses.replace(results, figures=figures | ({} if value is None else {key: Value(value)}))


def test_they_hold_where_all_is_found_spoilt_cured_and_not_cured_by_controls(results):
    checks = self_checks(results)
    assert len(checks) == 12 and all(check.passed for check in checks)
    assert {check.subject for check in checks} == {"original", "cured"}
    assert summary_line(checks) == "All 12 self-checks hold."


@pytest.mark.parametrize(
    ("run", "stage", "metric", "value"),
    [
        ("planted", "identify", "precision", 0.99), ("planted", "identify", "recall", None),
        ("planted", "identify", "outlier_fraction_random", 0.001), ("planted", "identify", "outlier_fraction_empty", 0.001),
        ("original", "verify", "cls_cosine", 0.99), ("cured", "verify", "outlier_fraction", 0.001),
        ("cured", "verify", "cls_cosine", 0.9), ("cured", "verify", "cls_attention_on_outliers", None),
    ],
)  # fmt: skip
def test_one_figure_that_is_off_or_missing_fails(results, run, stage, metric, value):
    checks = self_checks(changed(results, run, stage, metric, value))
    (failed,) = [check for check in checks if not check.passed]
    assert failed.text().startswith("FAIL  ") and ("missing" in failed.text()) == (value is None)
    assert summary_line(checks) == "1 of 12 self-checks failed."


def test_controls_are_not_meant_to_cure_and_several_registers_are_not_held_to_the_limits(results):
    for other in ({"neurons": "random"}, {"num_registers": 4}):
        runs = {**results.study.runs, "cured": {**results.study.runs["cured"], **other}}
        study = dataclasses.replace(results.study, runs=runs)
        assert {check.subject for check in self_checks(dataclasses.replace(results, study=study))} == {"original"}


@pytest.mark.parametrize(
    ("low", "high", "limit"),
    [(1, 1, "= 1"), (-1, 0.3, "≤ 0.3"), (0.95, 1.0001, "≥ 0.95"), (0.005, 0.03, "0.005 to 0.03"), (0.5, float("inf"), "≥ 0.5")],
)  # fmt: skip
def test_limits_are_said_in_words(low, high, limit):
    assert Check("run", "figure", 0.5, low, high).limit == limit


def test_without_a_planted_backbone_there_are_none():
    assert summary_line([]).startswith("There are none")
