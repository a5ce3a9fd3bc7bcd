import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from regvit.stats import metrics
from regvit.stats.metrics import (
    ANOMALY_METRICS,
    Separation,
    accuracy,
    aupr_in,
    aupr_out,
    auroc,
    class_indices,
    fpr95,
    fpr95_ood_positive,
    paired_accuracy_difference,
    roc_curve,
    top1_correct,
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


def test_accuracy_carries_wilsons_interval():
    estimate = accuracy(np.arange(10) < 8)  # textbook value: 8 of 10 gives 0.490 to 0.943
    assert (estimate.value, estimate.n) == (0.8, 10)
    assert (estimate.lo, estimate.hi) == pytest.approx((0.49016, 0.94331), abs=1e-5)


@pytest.mark.parametrize("n", [1, 3, 1000])
def test_accuracy_of_none_or_all_right_stays_within_its_interval_and_the_unit(n):
    none, everything = accuracy(np.zeros(n, dtype=bool)), accuracy(np.ones(n, dtype=bool))
    assert (none.lo, none.value) == (0, 0) and 0 < none.hi < 1
    assert (everything.hi, everything.value) == (1, 1) and 0 < everything.lo < 1


def test_accuracy_refuses_no_images_and_what_is_not_boolean():
    with pytest.raises(ValueError, match="correct is empty; an accuracy needs at least one image"):
        accuracy(np.zeros(0, dtype=bool))
    with pytest.raises(ValueError, match=r"correct is float64 of shape \(2,\); expected one boolean per image"):
        accuracy(np.ones(2))
    with pytest.raises(ValueError, match=r"correct is bool of shape \(1, 2, 1\); expected"):
        accuracy(np.ones((1, 2, 1), dtype=bool))


def test_seeds_that_agree_add_nothing():
    correct = np.arange(50) % 3 > 0
    assert accuracy(np.stack([correct] * 4)) == accuracy(correct)


def test_the_interval_over_seeds_is_worked_by_hand():
    correct = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=bool)
    images = ((np.array([1, 2 / 3, 1 / 3, 0]) - 0.5) ** 2).sum() / 16
    seeds = (0.25**2 + 0.25**2) / (3 * 2)
    size = 0.25 / (images + seeds)
    z = 1.959964
    half = z / (1 + z * z / size) * math.sqrt(0.25 / size + z * z / (4 * size**2))
    estimate = accuracy(correct)
    assert (estimate.value, estimate.n) == (0.5, 4)
    assert (estimate.lo, estimate.hi) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_images_that_half_of_the_seeds_get_right_count_at_most_once_a_seed():
    estimate, single = accuracy(np.array([[True, False] * 10, [False, True] * 10])), accuracy(np.arange(40) % 2 == 0)
    assert (estimate.lo, estimate.hi, estimate.n) == (single.lo, single.hi, 20)


def test_the_interval_over_images_and_seeds_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        luck = rng.normal(0, 0.05, size=(5, 1))  # of a seed: E Φ is ½ by symmetry
        estimate = accuracy(rng.normal(0, 1, 150) + luck + rng.normal(0, 0.5, (5, 150)) > 0)
        hits += estimate.lo <= 0.5 <= estimate.hi
    assert 0.93 <= hits / 2000 <= 0.975


def test_a_named_estimate_has_its_interval_beside_it():
    assert metrics.Estimate(0.5, 0.4, 0.6, 9).named("top1") == {"top1": 0.5, "top1_lo": 0.4, "top1_hi": 0.6}


def test_top1_takes_the_first_of_equal_logits():
    logits = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    assert top1_correct(logits, np.array([0, 2])).tolist() == [True, False]


def test_top1_among_some_classes_does_not_predict_the_others():
    logits = np.array([[9.0, 1.0, 2.0], [9.0, 3.0, 2.0]])
    labels = np.array([2, 2])
    assert top1_correct(logits, labels).tolist() == [False, False]
    assert top1_correct(logits, labels, among=[2, 1]).tolist() == [True, False]


def test_top1_refuses_labels_that_cannot_be_predicted_and_nan():
    with pytest.raises(ValueError, match="label -1 is not one of the 3 classes"):
        top1_correct(np.zeros((1, 3)), np.array([-1]))
    with pytest.raises(ValueError, match="label 0 is not one of the 2 classes"):
        top1_correct(np.zeros((1, 3)), np.array([0]), among=[1, 2])
    with pytest.raises(ValueError, match="1 of 2 images have NaN logits"):
        top1_correct(np.array([[0.0, np.nan], [0.0, 1.0]]), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"logits \(2, 3\) and labels \(3,\) do not fit"):
        top1_correct(np.zeros((2, 3)), np.zeros(3, dtype=int))


def test_classes_are_matched_by_name_not_by_place():
    assert class_indices(["dog", "cat"], ["ant", "cat", "dog"]).tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"1 of 2 classes are unknown to the probe \('cow'\); it knows ant, cat"):
        class_indices(["cat", "cow"], ["ant", "cat"])


def test_the_paired_difference_is_that_of_the_accuracies():
    a = np.array([True] * 7 + [False] * 3)
    b = np.array([True] * 2 + [False] * 5 + [True] + [False] * 2)
    difference = paired_accuracy_difference(a, b)
    assert (difference.only_a, difference.only_b, difference.n) == (5, 1, 10)
    assert difference.value == pytest.approx(0.7 - 0.3)
    assert difference.p == pytest.approx(2 * (1 + 6) / 2**6)  # at most 1 head of 6 coins, two tails
    p_a, p_b = 6 / 12, 2 / 12  # Bonett and Price: one more of each, two more images
    half = 1.959964 * math.sqrt((p_a + p_b - (p_a - p_b) ** 2) / 12)
    assert (difference.lo, difference.hi) == pytest.approx((p_a - p_b - half, p_a - p_b + half), abs=1e-6)


@given(st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_mcnemars_p_is_the_exact_binomial_test(only_a, only_b):
    a = np.repeat([True, False, True], [only_a, only_b, 5])
    b = np.repeat([False, True, True], [only_a, only_b, 5])
    n, k = only_a + only_b, min(only_a, only_b)
    exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert paired_accuracy_difference(a, b).p == pytest.approx(exact, rel=1e-9)


def test_swapping_the_two_turns_the_sign():
    rng = np.random.default_rng(0)
    a, b = rng.random(300) < 0.8, rng.random(300) < 0.7
    one, other = paired_accuracy_difference(a, b), paired_accuracy_difference(b, a)
    assert (one.value, one.lo, one.hi, one.p) == pytest.approx((-other.value, -other.hi, -other.lo, other.p))


def test_equal_predictions_differ_by_zero_with_an_interval_around_it():
    difference = paired_accuracy_difference(np.ones(50, dtype=bool), np.ones(50, dtype=bool))
    assert (difference.value, difference.p) == (0, 1)
    assert difference.lo < 0 < difference.hi


def test_the_paired_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        hard = rng.random(200)  # shared by both: they are right on the same easy images
        difference = paired_accuracy_difference(hard + rng.normal(0, 0.1, 200) < 0.8, hard < 0.7)
        hits += difference.lo <= TRUE_DIFFERENCE <= difference.hi
    assert 930 <= hits <= 975


# E over hard ~ U(0, 1) of Φ((0.8 − hard) / 0.1), minus 0.7: the integral is 0.8 but for what noise takes at the edges.
TRUE_DIFFERENCE = (
    sum(0.5 * (1 + math.erf((0.8 - (i + 0.5) / 10000) / 0.1 / math.sqrt(2))) for i in range(10000)) / 10000 - 0.7
)


def test_paired_arrays_must_have_equal_length():
    with pytest.raises(ValueError, match="correct_a has 2 images and correct_b 3; pair the same images"):
        paired_accuracy_difference(np.ones(2, dtype=bool), np.ones(3, dtype=bool))


def test_several_seeds_are_compared_by_the_mean_of_each_image():
    a = np.array([[1, 1, 1, 0, 1], [1, 1, 0, 0, 1]], dtype=bool)
    b = np.array([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=bool)
    difference = paired_accuracy_difference(a, b)
    assert difference.value == pytest.approx(0.3)
    assert (difference.only_a, difference.only_b, difference.n) == (4, 1, 5)
    d, centre = np.array([1, 0.5, 0.5, -0.5, 0, 1, -1]), 1.5 / 7  # two images more
    by_seed = np.array([0.2, 0.4])
    variance = ((d - centre) ** 2).sum() / 49 + by_seed.var(ddof=1) / 2
    half = 1.959964 * math.sqrt(variance)
    assert (difference.lo, difference.hi) == pytest.approx((centre - half, centre + half), abs=1e-6)
    totals = [2, 1, 1, -1]
    flips = [abs(sum(s * t for s, t in zip(signs, totals, strict=True))) for signs in product((1, -1), repeat=4)]
    assert difference.p == pytest.approx(np.mean([flip >= 3 for flip in flips]))


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=10))
@settings(max_examples=60, deadline=None)
def test_the_sign_flip_test_equals_trying_all_signs(totals):
    flips = [
        abs(sum(s * t for s, t in zip(signs, totals, strict=True))) for signs in product((1, -1), repeat=len(totals))
    ]
    expected = np.mean([flip >= abs(sum(totals)) for flip in flips])
    assert metrics._sign_flip(np.array(totals)) == pytest.approx(expected)


def test_very_many_disagreements_follow_the_normal_law(monkeypatch):
    totals = np.repeat([3, -2, 1, -1], [800, 1050, 300, 350])
    exact = metrics._sign_flip(totals)
    monkeypatch.setattr(metrics, "EXACT_FLIPS", 10)
    assert metrics._sign_flip(totals) == pytest.approx(exact, rel=0.05)


def test_images_of_a_group_are_flipped_and_counted_together():
    a = np.array([True, True, True, True, False, True])
    b = np.array([False, False, False, False, True, True])
    apart, together = paired_accuracy_difference(a, b), paired_accuracy_difference(a, b, np.array([7, 7, 7, 7, 1, 2]))
    assert (apart.value, apart.p) == pytest.approx((3 / 6, 2 * 6 / 32))
    assert (together.value, together.p) == (apart.value, 1.0)  # 4 against 1: no flip gives less than 3
    assert together.hi - together.lo > apart.hi - apart.lo
    with pytest.raises(ValueError, match=r"groups have shape \(2,\); expected one for each of the 6 images"):
        paired_accuracy_difference(a, b, np.zeros(2))


def test_one_classifier_without_seeds_meets_all_of_the_others():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 40)) < 0.8, rng.random(40) < 0.6
    assert paired_accuracy_difference(a, b) == paired_accuracy_difference(a, np.stack([b] * 3))
    with pytest.raises(ValueError, match="correct_a has 3 seeds and correct_b 2; pair the same seeds"):
        paired_accuracy_difference(a, a[:2])
