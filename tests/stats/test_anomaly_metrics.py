import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from regvit.stats.anomaly_metrics import ANOMALY_METRICS, Separation, anomaly_metric, roc_curve

few_values = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=60).map(np.array)  # ties everywhere
any_values = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=60).map(np.array)
sides = st.one_of(st.tuples(few_values, few_values), st.tuples(any_values, any_values))


def labelled(id_scores, anomaly_scores):
    return np.r_[np.zeros(len(id_scores)), np.ones(len(anomaly_scores))], np.r_[id_scores, anomaly_scores]


def accepted_share(accepting, other):
    """Share of `other` at or below the smallest score that at least 95 % of `accepting` do not exceed, by trying all."""
    for threshold in sorted(accepting):
        if 100 * sum(s <= threshold for s in accepting) >= 95 * len(accepting):
            return sum(s <= threshold for s in other) / len(other)


@given(sides)
@settings(max_examples=300, deadline=None)
def test_auroc_and_average_precision_equal_those_of_scikit_learn_with_ties(scores):
    anomalous, both = labelled(*scores)
    for metric, expected in (
        ("auroc", roc_auc_score(anomalous, both)),
        ("aupr_out", average_precision_score(anomalous, both)),
        ("aupr_in", average_precision_score(1 - anomalous, -both)),
    ):
        assert anomaly_metric(metric, *scores) == pytest.approx(expected, abs=1e-12)


@given(sides)
@settings(max_examples=300, deadline=None)
def test_both_false_positive_rates_equal_a_search_over_all_thresholds(scores):
    id_scores, anomaly_scores = scores
    assert anomaly_metric("fpr95", *scores) == accepted_share(id_scores, anomaly_scores)
    assert anomaly_metric("fpr95_ood_positive", *scores) == accepted_share(-anomaly_scores, -id_scores)


UP = np.arange(20.0)  # fpr95: 19 of the ID images are the 95 %, so the threshold is 18
AMONG = np.array([5.0, 17.0, 18.0, 18.5, 30.0])  # fpr95_ood_positive: all five must be flagged, so from 5 on


@pytest.mark.parametrize(
    ("id_scores", "anomaly_scores", "expected"),
    [
        (np.arange(10.0), np.arange(10.0, 20.0), {"auroc": 1, "fpr95": 0, "fpr95_ood_positive": 0, "aupr_in": 1, "aupr_out": 1}),
        (np.arange(10.0, 20.0), np.arange(10.0), {"auroc": 0}),
        (UP, AMONG, {"fpr95": 3 / 5, "fpr95_ood_positive": 15 / 20}),
        (np.ones(30), np.ones(10), {"auroc": 0.5, "fpr95": 1, "fpr95_ood_positive": 1, "aupr_in": 0.75, "aupr_out": 0.25}),
    ],
    ids=["apart", "upside down", "two conventions of FPR95", "constant"],
)  # fmt: skip
def test_metrics_worked_by_hand(id_scores, anomaly_scores, expected):
    assert {metric: anomaly_metric(metric, id_scores, anomaly_scores) for metric in expected} == expected


@pytest.mark.parametrize("metric", ANOMALY_METRICS)
def test_infinite_scores_stand_at_the_ends_and_tie_with_each_other(metric):
    id_scores, anomaly_scores = np.array([-np.inf, 0.0, 1.0, np.inf]), np.array([0.5, np.inf, np.inf])
    finite = anomaly_metric(metric, np.array([-9.0, 0.0, 1.0, 9.0]), np.array([0.5, 9.0, 9.0]))
    assert anomaly_metric(metric, id_scores, anomaly_scores) == finite


@pytest.mark.parametrize("metric", [Separation, roc_curve])
def test_nan_and_empty_sides_are_refused(metric):
    good = np.array([0.0, 1.0])
    with pytest.raises(ValueError, match=r"anomaly_scores holds 1 NaN among 2 scores"):
        metric(good, np.array([np.nan, 1.0]))
    with pytest.raises(ValueError, match=r"id_scores has shape \(0,\); expected one score per image"):
        metric(np.array([]), good)
    with pytest.raises(ValueError, match=r"anomaly_scores has shape \(2, 1\)"):
        metric(good, good[:, None])


@given(sides, st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_weighed_images_count_as_often_as_they_are_drawn(scores, seed):
    rng = np.random.default_rng(seed)
    drawn = [[rng.integers(0, len(side), len(side)) for side in scores] for _ in range(3)]
    counts = [np.array([np.bincount(rows[i], minlength=len(scores[i])) for rows in drawn]) for i in (0, 1)]
    measured = Separation(*scores).measure(None, *counts)
    for i, rows in enumerate(drawn):
        for metric, values in measured.items():
            expected = anomaly_metric(metric, scores[0][rows[0]], scores[1][rows[1]])
            assert values[i] == pytest.approx(expected, abs=1e-12)


def test_only_the_metrics_asked_for_are_measured():
    assert list(ANOMALY_METRICS) == ["auroc", "fpr95", "fpr95_ood_positive", "aupr_in", "aupr_out"]
    assert list(Separation(np.zeros(2), np.ones(2)).measure(["fpr95", "auroc"])) == ["fpr95", "auroc"]


def test_the_roc_is_thinned_but_keeps_its_ends_and_its_area():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=3000), rng.normal(1.0, size=2000)
    curve = roc_curve(id_scores, anomaly_scores, points=200)
    assert len(curve.fpr) <= 200
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(
        anomaly_metric("auroc", id_scores, anomaly_scores), abs=1e-3
    )


def test_fpr95_is_read_off_the_roc():
    curve = roc_curve(UP, AMONG)
    assert curve.fpr[(curve.tpr >= 0.95).argmax()] == anomaly_metric("fpr95", UP, AMONG)
