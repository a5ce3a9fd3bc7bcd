"""The bootstrap in cells and groups against the plain one, which draws every image."""

import numpy as np
import pytest

from regvit.stats import binned, bootstrap
from regvit.stats.bootstrap import resample
from regvit.stats.metrics import ANOMALY_METRICS, Separation


def both(home, strange, strata=None, resamples=1000):
    """Resamples by the plain bootstrap and by the binned one, of the same scores."""
    with pytest.MonkeyPatch.context() as patch:
        plain = resample(home[None], strange[None], resamples, 0, strata)
        patch.setattr(bootstrap, "MANY_IMAGES", 10)
        return plain, resample(home[None], strange[None], resamples, 0, strata)


def spreads(drawn):
    return {metric: values[0].std() for metric, values in drawn.values.items()}


@pytest.mark.parametrize(("shift", "digits"), [(1.5, None), (0.2, None), (1.5, 1)])
def test_the_spread_is_that_of_the_plain_bootstrap_and_the_point_is_exact(shift, digits):
    rng = np.random.default_rng(0)
    home, strange = rng.normal(size=5_000), rng.normal(shift, 1.3, size=3_000)
    if digits is not None:
        home, strange = home.round(digits), strange.round(digits)
    plain, cells = both(home, strange)
    assert plain.points == cells.points
    for metric, spread in spreads(plain).items():
        assert spreads(cells)[metric] == pytest.approx(spread, rel=0.12), metric
        centre = plain.values[metric].mean()
        assert abs(cells.values[metric].mean() - centre) < 0.15 * spread, metric
        for level in (0.025, 0.975):
            expected = np.quantile(plain.values[metric], level)
            assert abs(np.quantile(cells.values[metric], level) - expected) < 0.35 * spread, metric


def test_images_are_drawn_class_by_class():
    rng = np.random.default_rng(0)
    strata = np.arange(9_000) % 300
    home, strange = rng.normal(size=9_000) + np.linspace(0, 6, 300)[strata], rng.normal(3, size=9_000)
    plain, cells = both(home, strange, strata)
    loose = both(home, strange)[1]
    assert spreads(cells)["auroc"] == pytest.approx(spreads(plain)["auroc"], rel=0.1)
    assert spreads(loose)["auroc"] > 1.2 * spreads(plain)["auroc"]


def test_rows_share_their_resamples_so_that_differences_are_paired(monkeypatch):
    monkeypatch.setattr(bootstrap, "MANY_IMAGES", 10)
    rng = np.random.default_rng(0)
    home, strange = rng.normal(size=4_000), rng.normal(1, size=3_000)
    noise = 0.05 * rng.normal(size=4_000), 0.05 * rng.normal(size=3_000)
    drawn = resample(np.stack([home, home + noise[0]]), np.stack([strange, strange + noise[1]]), 500).values["auroc"]
    assert (drawn[0] - drawn[1]).std() < 0.2 * drawn[0].std()
    again = resample((home + noise[0])[None], (strange + noise[1])[None], 500).values["auroc"]
    assert (again[0] == drawn[1]).all()  # alone or beside others, in this run or another


def test_constant_and_infinite_scores_are_counted_like_others(monkeypatch):
    monkeypatch.setattr(bootstrap, "MANY_IMAGES", 10)
    constant = resample(np.zeros((1, 40)), np.zeros((1, 30)), 20)
    assert (constant.values["auroc"] == 0.5).all() and (constant.values["fpr95"] == 1).all()
    apart = resample(np.full((1, 40), -np.inf), np.full((1, 30), np.inf), 20)
    assert (apart.values["auroc"] == 1).all() and (apart.values["fpr95"] == 0).all()
    for metric in ("aupr_in", "aupr_out"):
        assert apart.values[metric] == pytest.approx(1)


@pytest.mark.parametrize("metric", ANOMALY_METRICS)
def test_counts_of_single_scores_give_the_exact_metric(metric):
    rng = np.random.default_rng(0)
    home, strange = rng.integers(20, size=300) * 1.0, rng.integers(5, 30, size=200) * 1.0  # each cell is one score
    sides = [binned.Side([np.arange(n)], 4, [0, i]) for i, n in enumerate((300, 200))]
    cells = binned._Cells.of(home, strange)
    assert cells.whole.all()
    counts = binned._Counts(*(side.counts(place, len(cells.whole))
                              for side, place in zip(sides, (cells.id, cells.anomalies), strict=True)), cells)  # fmt: skip
    exact = Separation(home, strange).measure([metric])[metric][0]
    assert getattr(counts, metric)()[0] == pytest.approx(exact, abs=1e-12)


def test_few_images_are_drawn_one_by_one():
    strange = binned.Side([np.arange(30)], 50, [0])
    counts = strange.counts(np.arange(30), 30)
    assert (counts[0] == 1).all() and np.allclose(counts.sum(1), 30)
    assert np.allclose(counts, counts.round()) and counts[1:].max() > 2
