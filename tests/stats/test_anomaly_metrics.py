import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from regvit.stats.anomaly_metrics import (
    ANOMALY_METRICS,
    Separation,
    aupr_in,
    aupr_out,
    auroc,
    fpr95,
    fpr95_ood_positive,
    roc_curve,
)

ALL = (auroc, fpr95, fpr95_ood_positive, aupr_in, aupr_out)
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
    assert auroc(*scores) == pytest.approx(roc_auc_score(anomalous, both), abs=1e-12)
    assert aupr_out(*scores) == pytest.approx(average_precision_score(anomalous, both), abs=1e-12)
    assert aupr_in(*scores) == pytest.approx(average_precision_score(1 - anomalous, -both), abs=1e-12)


@given(sides)
@settings(max_examples=300, deadline=None)
def test_both_false_positive_rates_equal_a_search_over_all_thresholds(scores):
    id_scores, anomaly_scores = scores
    assert fpr95(*scores) == accepted_share(id_scores, anomaly_scores)
    assert fpr95_ood_positive(*scores) == accepted_share(-anomaly_scores, -id_scores)


def test_anomalies_score_higher():
    id_scores, anomaly_scores = np.arange(10.0), np.arange(10.0, 20.0)
    assert [metric(id_scores, anomaly_scores) for metric in ALL] == [1, 0, 0, 1, 1]
    assert auroc(anomaly_scores, id_scores) == 0


def test_the_two_conventions_of_fpr95_differ_as_worked_by_hand():
    id_scores = np.arange(20.0)  # k = 19: the threshold is 18
    anomaly_scores = np.array([5.0, 17.0, 18.0, 18.5, 30.0])  # k = ⌈4.75⌉ = 5: all must be flagged, so from 5 on
    assert fpr95(id_scores, anomaly_scores) == 3 / 5
    assert fpr95_ood_positive(id_scores, anomaly_scores) == 15 / 20


def test_constant_scores_tell_nothing():
    id_scores, anomaly_scores = np.ones(30), np.ones(10)
    assert auroc(id_scores, anomaly_scores) == 0.5
    assert fpr95(id_scores, anomaly_scores) == fpr95_ood_positive(id_scores, anomaly_scores) == 1
    assert (aupr_in(id_scores, anomaly_scores), aupr_out(id_scores, anomaly_scores)) == (0.75, 0.25)


@pytest.mark.parametrize("metric", ALL)
def test_infinite_scores_stand_at_the_ends_and_tie_with_each_other(metric):
    id_scores, anomaly_scores = np.array([-np.inf, 0.0, 1.0, np.inf]), np.array([0.5, np.inf, np.inf])
    finite = metric(np.array([-9.0, 0.0, 1.0, 9.0]), np.array([0.5, 9.0, 9.0]))
    assert metric(id_scores, anomaly_scores) == finite


@pytest.mark.parametrize("metric", [*ALL, Separation, roc_curve])
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
        for metric in ALL:
            expected = metric(scores[0][rows[0]], scores[1][rows[1]])
            assert measured[metric.__name__][i] == pytest.approx(expected, abs=1e-12)


def test_only_the_metrics_asked_for_are_measured():
    assert list(ANOMALY_METRICS) == [metric.__name__ for metric in ALL]
    assert list(Separation(np.zeros(2), np.ones(2)).measure(["fpr95", "auroc"])) == ["fpr95", "auroc"]


def test_the_roc_is_thinned_but_keeps_its_ends_and_its_area():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=3000), rng.normal(1.0, size=2000)
    curve = roc_curve(id_scores, anomaly_scores, points=200)
    assert len(curve.fpr) <= 200
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(auroc(id_scores, anomaly_scores), abs=1e-3)


def test_fpr95_is_read_off_the_roc():
    id_scores, anomaly_scores = np.arange(20.0), np.array([5.0, 17.0, 18.0, 18.5, 30.0])
    curve = roc_curve(id_scores, anomaly_scores)
    assert curve.fpr[(curve.tpr >= 0.95).argmax()] == fpr95(id_scores, anomaly_scores)
