"""Self-checks hold on a planted backbone that is found and cured exactly, and fail on anything else."""

import dataclasses

import pytest

from regvit.report.checks import Check, findings, self_checks, summary_line
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


def figures(results: Results, **changes: dict[str, float]) -> Results:
    """With other figures: `run_or_backbone={"stage_metric": value}`."""
    more = {
        (name, Place(stage, metric, "home")): Value(value)
        for name, each in changes.items()
        for key, value in each.items()
        for stage, _, metric in [key.partition("_")]
    }
    return dataclasses.replace(results, figures={**results.figures, **more})


def test_of_every_backbone_it_is_said_whether_there_are_outliers_what_runs_leave_and_what_controls_say(results):
    shown = figures(
        results,
        plain={"identify_median_norm": 2.0, "identify_largest_norm": 5.0},
        planted={"identify_explained": 0.998},
        cured={
            "verify_outlier_fraction": 0.0001,
            "verify_untreated_outlier_fraction": 0.02,
            "verify_own_outlier_fraction": 0.0,
        },
    )
    assert findings(shown) == [
        "plain: no outliers that stand apart as a small group: the largest patch norm in the last block but one is 2.5 medians",
        "planted: 2.00% of the patches are outliers after block 1; 6 neurons write 99.8% of their excess",
        "  cured: 0.010% of 2.000% left on held-out images, gone",
        "  controls of the search: these neurons moved leave 0%, an empty register 100%, random neurons 100% of them, so it is "
        "these neurons",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cured": {"verify_outlier_fraction": 0.019}}, "1.900% of 2.000% left on held-out images, still there"),
        ({"cured": {"verify_outlier_fraction": 0.005}}, "0.500% of 2.000% left on held-out images, fewer"),
        ({"cured": {"verify_own_outlier_fraction": 0.01}}, "gone; by the run's own norms 1.000%"),
        (
            {"planted": {"identify_outlier_fraction_random": 0.001}},
            "random neurons 5% of them, so it is not these alone",
        ),
        ({"planted": {"identify_register_neurons": 0}}, "no neuron writes a notable share of their excess"),
    ],
)
def test_what_is_not_cured_or_not_due_to_the_neurons_is_said(results, changes, said):
    base = {
        "verify_outlier_fraction": 0.0,
        "verify_untreated_outlier_fraction": 0.02,
        "verify_own_outlier_fraction": 0.0,
    }
    shown = figures(
        results,
        **({"cured": base} | {name: base | each if name == "cured" else each for name, each in changes.items()}),
    )
    assert said in "\n".join(findings(shown))


@pytest.mark.parametrize(
    ("low", "high", "limit"),
    [(1, 1, "= 1"), (-1, 0.3, "≤ 0.3"), (0.95, 1.0001, "≥ 0.95"), (0.005, 0.03, "0.005 to 0.03"), (0.5, float("inf"), "≥ 0.5")],
)  # fmt: skip
def test_limits_are_said_in_words(low, high, limit):
    assert Check("run", "figure", 0.5, low, high).limit == limit


def test_without_a_planted_backbone_there_are_none():
    assert summary_line([]).startswith("There are none")
