"""Intervals hold the truth 95 times in 100: simulations of known truth, 300 each, or REGVIT_SIMULATIONS of them."""

import os

import numpy as np
import pytest
from scipy.stats import norm

from regvit.stats.accuracy import accuracy, paired_accuracy_difference
from regvit.stats.bootstrap import mean_over_images, paired_mean_difference, resample

SIMULATIONS = int(os.environ.get("REGVIT_SIMULATIONS", "300"))
ERROR = (0.95 * 0.05 / SIMULATIONS) ** 0.5  # of a coverage of 95 %


def right(rng, ease, luck, n=300, seeds=3):
    """Whether each seed gets each image right: what images share, what a seed has, and what is of both."""
    return [
        shift + images + luck * rng.normal(size=(seeds, 1)) + 0.3 * rng.normal(size=(seeds, n)) > 0
        for images in [rng.normal(size=n)]
        for shift in ease
    ]


def share(ease, luck):
    return norm.cdf(ease / np.sqrt(1 + luck**2 + 0.3**2))


def scores(rng, apart, luck, n=60, seeds=3):
    """AUROC of a readout and seed: what images share, the seed's luck, and noise of both; (ID, anomalies)."""
    return [(each + 0.5 * rng.normal(size=(seeds, n)), other + apart + luck * rng.normal(size=(seeds, 1))
             + 0.5 * rng.normal(size=(seeds, n))) for each, other in [rng.normal(size=(2, n))] * 2]  # fmt: skip


def separation(rng, apart, n=60, resamples=200):
    drawn = resample(rng.normal(size=(1, n)), rng.normal(size=(1, n)) + apart, resamples, metrics=["auroc"])
    return drawn.estimate("auroc")


def paired_auroc(rng, luck):
    a, b = (resample(*each, 200, metrics=["auroc"]) for each in scores(rng, 1.0, luck))
    return a.minus(b, "auroc")


# name: the truth, and a function of a generator that draws data and gives the interval
CASES = {
    "accuracy, three seeds that agree": (share(1, 0), lambda rng: accuracy(*right(rng, [1], 0))),
    "accuracy, three seeds that differ a little": (share(1, 0.1), lambda rng: accuracy(*right(rng, [1], 0.1))),
    "accuracy, three seeds that differ much": (share(1, 0.4), lambda rng: accuracy(*right(rng, [1], 0.4))),
    "paired accuracy, three seeds that agree": (
        share(1, 0) - share(0.8, 0),
        lambda rng: paired_accuracy_difference(*right(rng, [1, 0.8], 0)),
    ),
    "paired accuracy, three seeds that differ": (
        share(1, 0.1) - share(0.8, 0.1),
        lambda rng: paired_accuracy_difference(*right(rng, [1, 0.8], 0.1)),
    ),
    "paired accuracy, one seed": (
        share(1, 0) - share(0.8, 0),
        lambda rng: paired_accuracy_difference(*right(rng, [1, 0.8], 0, seeds=1)),
    ),
    "paired AUROC, three seeds that agree": (0, lambda rng: paired_auroc(rng, 0)),
    "paired AUROC, three seeds that differ": (0, lambda rng: paired_auroc(rng, 0.3)),
    "AUROC of 60 + 60": (norm.cdf(1 / 2**0.5), lambda rng: separation(rng, 1.0)),
    "AUROC of 60 + 60 that is near 1": (norm.cdf(2.5 / 2**0.5), lambda rng: separation(rng, 2.5)),
    "mean of 20": (0, lambda rng: mean_over_images(rng.normal(size=20))),
    "mean of 20 skewed values": (1, lambda rng: mean_over_images(rng.exponential(size=20))),
    "paired mean of 20": (0.5, lambda rng: paired_mean_difference(rng.exponential(1.5, 20), rng.exponential(1, 20))),
    "3 % events in 140": (0.03, lambda rng: mean_over_images(rng.random(140) < 0.03)),
    "3 % images with a value in 140": (
        0.03 / 2,
        lambda rng: mean_over_images((rng.random(140) < 0.03) * rng.random(140)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_interval_covers_the_truth_and_p_agrees_with_it(case):
    truth, draw = CASES[case]
    rng = np.random.default_rng(0)
    found = [draw(rng) for _ in range(SIMULATIONS)]
    covered = np.mean([each.lo <= truth <= each.hi for each in found])
    print(f"{case}: {covered:.3f}")
    assert 0.945 - 2.5 * ERROR < covered < 0.985 + 2 * ERROR
    for each in found:
        if hasattr(each, "p"):
            assert (each.p < 0.05) == (each.lo > 0 or each.hi < 0)
