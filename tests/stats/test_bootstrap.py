"""Resampled metrics against a plain bootstrap, Hanley and McNeil, and worked values."""

import math
import time

import numpy as np
import pytest
from scipy.stats import norm, t

from regvit.stats import bootstrap
from regvit.stats.anomaly_metrics import ANOMALY_METRICS, Separation, anomaly_metric
from regvit.stats.bootstrap import mean_over_images, mean_over_sets, of_sums, paired_mean_difference, resample


def estimates(id_scores, anomaly_scores, resamples=1000, seed=0):
    """All five metrics of a row of scores, or of one row a probe seed."""
    drawn = resample(np.atleast_2d(id_scores), np.atleast_2d(anomaly_scores), resamples, seed)
    return {metric: drawn.estimate(metric) for metric in drawn.points}


# --- anomaly metrics


def test_the_resamples_vary_as_those_of_a_plain_bootstrap():
    rng = np.random.default_rng(1)
    id_scores, anomaly_scores = rng.normal(size=120), rng.normal(1.0, size=80).round(1)
    drawn = resample(id_scores[None], anomaly_scores[None], 2000, seed=3)
    own = np.random.default_rng(7)
    sides = [(own.choice(id_scores, 120), own.choice(anomaly_scores, 80)) for _ in range(2000)]
    plain = [Separation(*each).measure() for each in sides]
    for metric in ANOMALY_METRICS:
        found = drawn.estimate(metric)
        assert found.value == anomaly_metric(metric, id_scores, anomaly_scores)
        assert drawn.values[metric].std() == pytest.approx(np.std([each[metric] for each in plain]), rel=0.08)
        assert found.lo < found.value < found.hi and found.n == 80


def test_the_interval_of_auroc_is_as_wide_as_hanley_and_mcneil_say():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=500), rng.normal(1.0, size=400)
    found = estimates(id_scores, anomaly_scores, 2000)["auroc"]
    a, n, m = found.value, 400, 500
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + (n - 1) * (q1 - a * a) + (m - 1) * (q2 - a * a)) / (n * m))
    assert found.hi - found.lo == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_same_seed_gives_the_same_interval_however_the_resamples_are_cut(monkeypatch):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=50), rng.normal(1.0, size=40)
    whole = estimates(*scores, 100, seed=5)
    assert estimates(*scores, 100, seed=6) != whole
    monkeypatch.setattr(bootstrap, "CELLS_AT_ONCE", 350)  # 7 resamples at once
    assert estimates(*scores, 100, seed=5) == whole


def test_an_interval_holds_its_point_even_where_the_detector_is_upside_down_or_all_scores_are_alike():
    rng = np.random.default_rng(0)
    infinite = np.array([-np.inf, 0, 1, np.inf]), np.array([0.5, np.inf, np.inf])
    for sides in ((rng.normal(4.0, size=80), rng.normal(size=70)), infinite, (np.zeros(9), np.zeros(8))):
        for found in estimates(*sides, 200).values():
            assert 0 <= found.lo <= found.value <= found.hi <= 1


def test_scores_that_never_meet_still_have_an_interval():
    found = estimates(np.arange(30.0), np.arange(30.0, 50.0), 100)["auroc"]
    assert (found.value, found.hi) == (1, 1) and 0.8 < found.lo < 0.9  # Wilson's of 20 of 20


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(ValueError, match="bootstrap is 0; an interval needs at least 2 resamples"):
        estimates(np.zeros(2), np.ones(2), 0)
    with pytest.raises(ValueError, match=r"id_scores \(1, 2\) and anomaly_scores \(2, 3\) do not fit"):
        resample(np.zeros((1, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"id_scores has shape \(0,\)"):
        estimates(np.zeros(0), np.ones(2))
    with pytest.raises(ValueError, match="id_scores holds 1 NaN among 2 scores"):
        estimates(np.array([np.nan, 0]), np.zeros(3))


def test_seeds_that_agree_add_nothing_and_seeds_that_differ_take_students_t():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=(1, 60)), rng.normal(size=(1, 50))
    single = resample(id_scores, anomaly_scores, 200).estimate("auroc")
    several = resample(id_scores.repeat(3, 0), anomaly_scores.repeat(3, 0), 200).estimate("auroc")
    assert (several.lo, several.hi) == pytest.approx((single.lo, single.hi))
    luck = np.array([[0.0], [0.5], [1.0]])
    apart = resample(id_scores.repeat(3, 0), anomaly_scores + luck, 200)
    seeds = t.ppf(0.975, 2) * apart.points["auroc"].std(ddof=1) / math.sqrt(3)
    assert apart.estimate("auroc").hi - apart.estimate("auroc").lo > 1.5 * seeds


def test_a_difference_is_paired_by_image():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=(1, 200)), rng.normal(0.5, size=(1, 150))
    a, b = (resample(id_scores, anomaly_scores + more, metrics=["auroc"]) for more in (0.1, 0))
    found, alone = a.minus(b, "auroc"), b.estimate("auroc")
    assert found.value == pytest.approx(a.points["auroc"][0] - b.points["auroc"][0])
    assert 0 < found.lo < found.value < found.hi and found.n == 150 and found.p < 1e-4
    assert found.hi - found.lo < 0.1 * (alone.hi - alone.lo)


def test_no_difference_has_p_one_and_turning_it_around_turns_its_sign():
    rng = np.random.default_rng(0)
    drawn = [resample(rng.normal(size=(2, 40)), rng.normal(size=(2, 30)), 300, metrics=["auroc"]) for _ in range(2)]
    same = drawn[0].minus(drawn[0], "auroc")
    one, other = drawn[0].minus(drawn[1], "auroc"), drawn[1].minus(drawn[0], "auroc")
    assert (same.value, same.lo, same.hi, same.p) == (0, 0, 0, 1)
    assert (one.value, one.lo, one.hi, one.p) == pytest.approx((-other.value, -other.hi, -other.lo, other.p))


def test_a_detector_without_seeds_meets_all_of_the_others():
    rng = np.random.default_rng(0)
    drawn = resample(rng.normal(size=(3, 40)), rng.normal(1, size=(3, 30)), 100, metrics=["auroc"])
    assert drawn.minus(drawn.rows([0]), "auroc") == drawn.minus(drawn.rows([0, 0, 0]), "auroc")
    with pytest.raises(ValueError, match="a has 3 seeds in 100 resamples and b 2 in 100; pair the same"):
        drawn.minus(drawn.rows([0, 1]), "auroc")


def test_the_mean_over_sets_weighs_each_alike_and_draws_each_on_its_own():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=(1, 40)), rng.normal(1, size=(1, 30))
    sets = {name: resample(id_scores, anomaly_scores, 300, name=name, metrics=["auroc"]) for name in ("a", "b")}
    again = resample(id_scores, anomaly_scores, 300, name="a", metrics=["auroc"])
    assert np.array_equal(sets["a"].values["auroc"], again.values["auroc"])
    assert not np.array_equal(sets["a"].values["auroc"], sets["b"].values["auroc"])
    mean = mean_over_sets({**sets, "c": resample(id_scores, anomaly_scores[:, :5], 300, metrics=["auroc"])})
    assert mean.n == 65
    few, many = (anomaly_metric("auroc", id_scores[0], each) for each in (anomaly_scores[0, :5], anomaly_scores[0]))
    expected = (2 * many + few) / 3
    assert mean.points["auroc"] == pytest.approx([expected])


def test_a_thousand_resamples_of_a_hundred_thousand_scores_take_seconds():
    rng = np.random.default_rng(0)
    id_scores, anomaly_scores = rng.normal(size=(1, 50_000)), rng.normal(1, size=(1, 50_000))
    start = time.process_time()
    drawn = resample(id_scores, anomaly_scores, 1000, metrics=["auroc", "fpr95"])
    assert time.process_time() - start < 20  # 2 s on an idle core
    a = anomaly_metric("auroc", id_scores[0], anomaly_scores[0])
    error = math.sqrt((a / (2 - a) + 2 * a * a / (1 + a) - 2 * a * a) / 50_000)  # Hanley and McNeil, for many images
    assert drawn.values["auroc"].std() == pytest.approx(error, rel=0.1)
    assert drawn.points["auroc"][0] == a  # of all images, not of those that are resampled


def test_many_images_are_resampled_on_some_of_them_with_the_same_spread(monkeypatch):
    rng = np.random.default_rng(0)
    sides = rng.normal(size=(1, 8000)), rng.normal(1, size=(1, 2000))
    plain = resample(*sides, 500)
    monkeypatch.setattr(bootstrap, "MANY_IMAGES", 4000)
    some = resample(*sides, 500)
    for metric in ANOMALY_METRICS:
        assert some.points[metric] == plain.points[metric]
        assert some.values[metric].std() == pytest.approx(plain.values[metric].std(), rel=0.3)


# --- means


def test_the_interval_of_a_mean_is_near_the_normal_one_for_many_images():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=4000)
    found, half = mean_over_images(values), 1.96 * values.std() / np.sqrt(4000)
    assert (found.value, found.n) == (values.mean(), 4000)
    assert (found.lo, found.hi) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert mean_over_images(values, seed=3) == mean_over_images(values, seed=3) != mean_over_images(values, seed=4)


def test_the_interval_of_a_few_skewed_values_reaches_further_to_the_long_side():
    values = np.random.default_rng(0).exponential(size=20)
    found = mean_over_images(values)
    assert found.hi - found.value > 1.2 * (found.value - found.lo)
    assert found.hi - found.value >= t.ppf(0.975, 19) * values.std(ddof=1) / math.sqrt(20) * (1 - 1e-9)


def test_images_without_a_value_are_left_out_and_ones_and_zeros_are_a_fraction():
    one = mean_over_images(np.array([1.0, np.nan, 1.0]))
    assert (one.value, one.lo, one.hi, one.n) == (1, 1, 1, 2)
    assert mean_over_images(np.array([np.nan])) is None
    rare = mean_over_images(np.arange(100) < 2)
    assert (rare.lo, rare.hi) == pytest.approx((0.0055, 0.0700), abs=1e-4)  # Wilson's of 2 of 100


def test_a_paired_difference_of_means_leaves_out_images_where_one_has_no_value():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, size=80), rng.normal(size=80)
    found = paired_mean_difference(np.append(a, np.nan), np.append(b, 5.0))
    assert found.n == 80 and found == paired_mean_difference(a, b)
    assert found.value == pytest.approx((a - b).mean())
    shifted = [paired_mean_difference(a + more, b) for more in np.linspace(-0.6, 0.2, 60)]
    assert all((each.p < 0.05) == (each.lo > 0 or each.hi < 0) for each in shifted)
    assert {each.p < 0.05 for each in shifted} == {True, False}
    assert paired_mean_difference(a, a).p == 1 and paired_mean_difference(a, a * np.nan) is None
    with pytest.raises(ValueError, match=r"a has shape \(80,\) and b \(3,\); pair the same images"):
        paired_mean_difference(a, b[:3])


def test_sums_are_drawn_with_every_image_as_often_in_each():
    drawn = of_sums(lambda ones, values: np.stack([ones, values], 1), (np.ones(50), np.arange(50.0)), resamples=400)
    assert (drawn[:, 0] == 50).all()
    assert drawn[:, 1].std() == pytest.approx(np.arange(50).std() * math.sqrt(50), rel=0.1)
    assert abs(drawn[:, 1].mean() - np.arange(50).sum()) < 3 * norm.ppf(0.975) * drawn[:, 1].std() / 20
