"""Metrics, to the last word and digit: what mutation testing found untested (`make mutation MODULE=metrics`)."""

import math

import numpy as np
import pytest

from regvit.stats.metrics import Z_95, Difference, accuracy, paired_accuracy_difference, top1_correct

FIRST = np.array([True, True, True, False, True, False, True, True])
SECOND = np.array([True, False, True, False, True, True, False, True])


def test_the_names_of_a_difference_are_those_that_the_metrics_files_have():
    named = Difference(0.1, -0.1, 0.3, 0.04, 7).named("gain")
    assert named == {"gain": 0.1, "gain_lo": -0.1, "gain_hi": 0.3, "gain_p": 0.04}


@pytest.mark.parametrize("among", [[0, 3], [-1, 2]])
def test_classes_out_of_range_are_refused_with_the_range(among):
    with pytest.raises(ValueError, match=r"are out of range \(0 to 2\)"):
        top1_correct(np.zeros((1, 3)), np.array([0]), among=among)
    assert top1_correct(np.zeros((1, 3)), np.array([0]), among=[0, 2]).tolist() == [True]


def test_what_is_not_boolean_is_named_by_its_argument():
    wrong = np.array([0.5, 1.0])
    with pytest.raises(ValueError, match=r"^correct "):
        accuracy(wrong)
    with pytest.raises(ValueError, match=r"^correct_a "):
        paired_accuracy_difference(wrong, FIRST[:2])
    with pytest.raises(ValueError, match=r"^correct_b "):
        paired_accuracy_difference(FIRST[:2], wrong)


def test_the_interval_of_two_seeds_is_that_of_the_formula():
    """Wilson's for n* images, with both parts of the variance, worked out term by term."""
    correct = np.stack([FIRST, SECOND])
    n, seeds = 8, 2
    by_image, by_seed = correct.mean(0), [6 / 8, 5 / 8]
    p = 11 / 16
    v = sum((x - p) ** 2 for x in by_image) / n**2 + sum((x - p) ** 2 for x in by_seed) / (seeds * (seeds - 1))
    size = min(p * (1 - p) / v, n * seeds)
    z = Z_95**2 / size
    centre, half = (p + z / 2) / (1 + z), math.sqrt(z * p * (1 - p) + z**2 / 4) / (1 + z)
    found = accuracy(correct)
    assert (found.value, found.n) == (p, 8)
    assert (found.lo, found.hi) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_the_paired_interval_of_two_seeds_is_that_of_the_formula():
    a, b = np.stack([FIRST, SECOND]), np.stack([SECOND, ~FIRST])
    d = (a.astype(float) - b).mean(0)
    middle = d.sum() / 10
    spread = ((d - middle) ** 2).sum() + (1 - middle) ** 2 + (-1 - middle) ** 2
    seeds = [(x.astype(float) - y).mean() for x, y in zip(a, b, strict=True)]
    v = spread / 100 + sum((x - np.mean(seeds)) ** 2 for x in seeds) / 2
    found = paired_accuracy_difference(a, b)
    assert found.value == pytest.approx(d.mean())
    expected = (max(-1.0, middle - Z_95 * math.sqrt(v)), min(1.0, middle + Z_95 * math.sqrt(v)))
    assert (found.lo, found.hi) == pytest.approx(expected, abs=1e-12)


def test_numbers_of_seeds_that_differ_are_refused_unless_one_is_one():
    with pytest.raises(ValueError, match="correct_a has 2 seeds and correct_b 3; pair the same seeds"):
        paired_accuracy_difference(np.stack([FIRST] * 2), np.stack([SECOND] * 3))
    for a, b in ((FIRST, np.stack([SECOND] * 3)), (np.stack([FIRST] * 3), SECOND)):
        assert paired_accuracy_difference(a, b).value == pytest.approx(1 / 8)


@pytest.mark.parametrize(("only_a", "only_b"), [(1, 0), (3, 0), (5, 2), (4, 4), (9, 1)])
def test_the_p_value_of_one_seed_is_exact_mcnemars(only_a, only_b):
    a = np.array([True] * only_a + [False] * only_b + [True])
    b = np.array([False] * only_a + [True] * only_b + [True])
    n, most = only_a + only_b, max(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n
    found = paired_accuracy_difference(a, b)
    assert found.p == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert (found.only_a, found.only_b, found.n) == (only_a, only_b, n + 1)
