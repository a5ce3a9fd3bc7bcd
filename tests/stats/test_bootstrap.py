"""Resampled metrics against a plain bootstrap, Hanley and McNeil, and the truth of simulations."""

import math
import time

import numpy as np
import pytest

from regvit.stats import bootstrap
from regvit.stats.bootstrap import difference, estimate, mean_over_sets, resample
from regvit.stats.metrics import aupr_in, aupr_out, auroc, fpr95, fpr95_ood_positive


def paired(a, b):
    """Difference of AUROC between two rows of one `Resampled`."""
    return difference(a.points["auroc"], a.values["auroc"], b.points["auroc"], b.values["auroc"], a.n)


def anomaly_metrics(id_scores, anomaly_scores, bootstrap=1000, seed=0, strata=None):
    """All five metrics of a row of scores, or of one row a probe seed."""
    sides = (scores[None] if np.ndim(scores) == 1 else scores for scores in (id_scores, anomaly_scores))
    drawn = resample(*sides, bootstrap, seed, strata)
    return {metric: estimate(drawn.points[metric], drawn.values[metric], drawn.n, seed) for metric in drawn.points}


def test_intervals_hold_the_point_and_are_those_of_a_plain_bootstrap():
    rng = np.random.default_rng(1)
    id_scores, anomaly_scores = rng.normal(size=120), rng.normal(1.0, size=80).round(1)
    estimates = anomaly_metrics(id_scores, anomaly_scores, bootstrap=2000, seed=3)
    assert list(estimates) == ["auroc", "fpr95", "fpr95_ood_positive", "aupr_in", "aupr_out"]
    own = np.random.default_rng(7)
    resamples = [(own.choice(id_scores, 120), own.choice(anomaly_scores, 80)) for _ in range(2000)]
    for metric, near in ((auroc, 0.01), (aupr_in, 0.01), (aupr_out, 0.01), (fpr95, 0.04), (fpr95_ood_positive, 0.04)):
        found = estimates[metric.__name__]
        assert found.value == metric(id_scores, anomaly_scores)
        lo, hi = np.quantile([metric(*r) for r in resamples], [0.025, 0.975])
        assert (found.lo, found.hi) == pytest.approx((lo, hi), abs=near)
        assert found.lo < found.value < found.hi and found.n == 80


def test_the_interval_of_auroc_is_as_wide_as_hanley_and_mcneil_say():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=500), rng.normal(1.0, size=400)
    found = anomaly_metrics(id_scores, anomaly_scores, bootstrap=2000)["auroc"]
    a, n, m = found.value, 400, 500
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + (n - 1) * (q1 - a * a) + (m - 1) * (q2 - a * a)) / (n * m))
    assert found.hi - found.lo == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_same_seed_gives_the_same_interval_however_the_resamples_are_cut(monkeypatch):
    rng = np.random.default_rng(0)
    scores, strata = (rng.normal(size=50), rng.normal(1.0, size=40)), np.arange(50) % 3
    for classes in (None, strata):
        whole = anomaly_metrics(*scores, bootstrap=100, seed=5, strata=classes)
        assert anomaly_metrics(*scores, bootstrap=100, seed=6, strata=classes) != whole
        with monkeypatch.context() as patch:
            patch.setattr(bootstrap, "CELLS_PER_CHUNK", 350)  # 7 resamples at once
            assert anomaly_metrics(*scores, bootstrap=100, seed=5, strata=classes) == whole


def test_an_interval_holds_its_point_even_where_the_detector_is_upside_down():
    rng = np.random.default_rng(0)
    for found in anomaly_metrics(rng.normal(4.0, size=80), rng.normal(size=70), bootstrap=200).values():
        assert 0 <= found.lo <= found.value <= found.hi <= 1


def test_infinite_and_constant_scores_have_intervals_and_nan_none():
    infinite = anomaly_metrics(np.array([-np.inf, 0, 1, np.inf]), np.array([0.5, np.inf, np.inf]), bootstrap=50)
    assert all(0 <= found.lo <= found.value <= found.hi <= 1 for found in infinite.values())
    constant = anomaly_metrics(np.zeros(9), np.zeros(8), bootstrap=50)["auroc"]
    assert (constant.value, constant.lo, constant.hi) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="id_scores holds 1 NaN among 2 scores"):
        anomaly_metrics(np.array([np.nan, 0]), np.zeros(3))


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(ValueError, match="bootstrap is 0; an interval needs at least 1 resample"):
        anomaly_metrics(np.zeros(2), np.ones(2), bootstrap=0)
    with pytest.raises(ValueError, match=r"id_scores \(1, 2\) and anomaly_scores \(2, 3\) do not fit"):
        resample(np.zeros((1, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"id_scores has shape \(0,\)"):
        anomaly_metrics(np.zeros(0), np.ones(2))
    with pytest.raises(ValueError, match=r"strata have shape \(3,\); expected the class of each of the 2 ID images"):
        anomaly_metrics(np.zeros(2), np.ones(2), strata=np.zeros(3, int))


# --- strata


def test_classes_are_drawn_as_often_as_they_have_images():
    strata = np.repeat([4, 2, 9], [10, 25, 65])
    drawn = bootstrap._Draws(bootstrap._strata(strata, 100), [0]).next(50)
    assert all((drawn[:, strata == label].sum(1) == (strata == label).sum()).all() for label in (2, 4, 9))
    assert drawn.max() > 2 and (drawn.mean(0) - 1).max() < 1


def test_few_images_of_a_class_are_drawn_from_all():
    strata = np.repeat([4, 2, 9], [9, 26, 65])
    drawn = bootstrap._Draws(bootstrap._strata(strata, 100), [0]).next(50)
    assert (drawn.sum(1) == 100).all() and (drawn[:, :9].sum(1) != 9).any()


def test_classes_that_score_apart_make_a_narrower_interval_when_drawn_one_by_one():
    rng = np.random.default_rng(0)
    strata = np.repeat([0, 1], 100)
    id_scores, anomaly_scores = rng.normal(size=200) + 4 * strata, rng.normal(3.0, size=5000)
    plain, stratified = (anomaly_metrics(id_scores, anomaly_scores, strata=s)["auroc"] for s in (None, strata))
    assert stratified.hi - stratified.lo < 0.8 * (plain.hi - plain.lo)


# --- seeds


def test_seeds_that_agree_add_nothing():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=60), rng.normal(size=50)
    single = anomaly_metrics(id_scores, anomaly_scores, 200)["auroc"]
    several = anomaly_metrics(np.stack([id_scores] * 3), np.stack([anomaly_scores] * 3), 200)["auroc"]
    assert (several.lo, several.hi) == pytest.approx((single.lo, single.hi))


def test_the_variance_of_the_resamples_is_that_of_the_images_and_that_of_the_seeds():
    points = np.array([0.70, 0.72, 0.77])
    images = np.random.default_rng(1).normal(0, 0.01, 200_000)
    values = points[:, None] + images
    drawn = bootstrap._over_seeds(values, seed=0)
    assert drawn.mean() == pytest.approx(points.mean(), abs=1e-3)
    assert drawn.var() == pytest.approx(0.01**2 + points.var(ddof=1) / 3, rel=0.02)
    found = estimate(points, values, 9)
    assert found.lo < points.mean() - 1.9 * 0.01 and found.n == 9


def test_intervals_over_images_and_seeds_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    truth, hits = 0.5 * (1 + math.erf(1 / 2)), 0  # P(N(1, 1) > N(0, 1)) = Φ(1 / √2)
    for _ in range(400):
        luck = rng.normal(0, 0.1, size=(4, 1))
        shared = rng.normal(size=60), rng.normal(size=80)
        drawn = resample(np.stack([shared[0]] * 4), shared[1] + 1 + luck, 200, metrics=["auroc"])
        found = estimate(drawn.points["auroc"], drawn.values["auroc"], 80)
        hits += found.lo <= truth <= found.hi
    assert 0.90 <= hits / 400 <= 0.98


# --- differences


def test_a_difference_is_paired_by_image():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=(1, 200)), rng.normal(0.5, size=(1, 150))
    a = resample(id_scores, anomaly_scores + 0.1, metrics=["auroc"])
    b = resample(id_scores, anomaly_scores, metrics=["auroc"])
    found = paired(a, b)
    alone = estimate(b.points["auroc"], b.values["auroc"], b.n)
    assert found.value == pytest.approx(a.points["auroc"][0] - b.points["auroc"][0])
    assert 0 < found.lo < found.value < found.hi and found.n == 150
    assert found.hi - found.lo < 0.1 * (alone.hi - alone.lo)
    assert found.p == pytest.approx(2 / 1001)


def test_no_difference_has_p_one_and_turning_it_around_turns_its_sign():
    rng = np.random.default_rng(0)
    drawn = [resample(rng.normal(size=(2, 40)), rng.normal(size=(2, 30)), 300, metrics=["auroc"]) for _ in range(2)]
    same, one, other = paired(drawn[0], drawn[0]), paired(*drawn), paired(*drawn[::-1])
    assert (same.value, same.lo, same.hi, same.p) == (0, 0, 0, 1)
    assert (one.value, one.lo, one.hi, one.p) == pytest.approx((-other.value, -other.hi, -other.lo, other.p))


def test_p_is_below_five_percent_about_where_the_interval_leaves_zero_out_and_seldom_where_nothing_differs():
    rng = np.random.default_rng(0)
    significant = 0
    for _ in range(300):
        both = rng.normal(size=(1, 60)), rng.normal(1, size=(1, 60))
        a, b = (resample(*(x + rng.normal(size=x.shape) for x in both), 200, metrics=["auroc"]) for _ in range(2))
        found = paired(a, b)
        significant += found.p < 0.05
        if abs(found.p - 0.05) > 0.02:
            assert (found.p < 0.05) == (not found.lo <= 0 <= found.hi)
    assert 3 <= significant <= 27  # 15 expected


def test_a_detector_without_seeds_meets_all_of_the_others():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=(3, 40)), rng.normal(1, size=(3, 30))
    three = resample(id_scores, anomaly_scores, 100, metrics=["auroc"])
    one = resample(id_scores[:1], anomaly_scores[:1], 100, metrics=["auroc"])
    expanded = resample(id_scores[[0, 0, 0]], anomaly_scores[[0, 0, 0]], 100, metrics=["auroc"])
    assert paired(three, one) == paired(three, expanded)
    two = resample(id_scores[:2], anomaly_scores[:2], 100, metrics=["auroc"])
    with pytest.raises(ValueError, match="a has 3 seeds in 100 resamples and b 2 in 100; pair the same"):
        paired(three, two)


def test_the_mean_over_sets_weighs_each_alike_and_draws_each_on_its_own():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=(1, 40)), rng.normal(1, size=(1, 30))
    sets = {name: resample(id_scores, anomaly_scores, 300, name=name, metrics=["auroc"]) for name in ("a", "b")}
    again = resample(id_scores, anomaly_scores, 300, name="a", metrics=["auroc"])
    assert np.array_equal(sets["a"].values["auroc"], again.values["auroc"])
    assert not np.array_equal(sets["a"].values["auroc"], sets["b"].values["auroc"])
    mean = mean_over_sets({**sets, "c": resample(id_scores, anomaly_scores[:, :5], 300, metrics=["auroc"])})
    assert mean.n == 65
    expected = (2 * auroc(id_scores[0], anomaly_scores[0]) + auroc(id_scores[0], anomaly_scores[0, :5])) / 3
    assert mean.points["auroc"] == pytest.approx([expected])


def test_a_thousand_resamples_of_a_hundred_thousand_scores_take_seconds():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=(1, 50_000)), rng.normal(1, size=(1, 50_000))
    start = time.perf_counter()
    drawn = resample(id_scores, anomaly_scores, 1000, metrics=["auroc"])
    assert time.perf_counter() - start < 20  # 2 s on an idle core
    a = auroc(id_scores[0], anomaly_scores[0])
    error = math.sqrt((a / (2 - a) + 2 * a * a / (1 + a) - 2 * a * a) / 50_000)  # Hanley and McNeil, for many images
    assert drawn.values["auroc"].std() == pytest.approx(error, rel=0.1)
