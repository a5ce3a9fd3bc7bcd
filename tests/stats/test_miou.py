"""mIoU from counts, its intervals, and pairs of runs."""

import dataclasses

import numpy as np
import pytest
from miou_example import random_counts

from regvit.stats.miou import (
    Counts,
    accuracy,
    class_ious,
    class_ious_with_interval,
    image_miou,
    miou,
    miou_with_interval,
    paired_miou_difference,
)


def test_iou_sums_over_images_before_it_divides():
    # Class 0: 3 of a union of 4 and 0 of 6, by hand 3/10; class 1: 5/10; class 2 occurs nowhere.
    counts = Counts(
        np.array([[3, 5, 0], [0, 0, 0]]),
        np.array([[4, 9, 1], [6, 0, 0]]),
        np.array([[3, 6, 0], [0, 0, 0]]),
        np.zeros((2, 1), int),
        np.zeros((2, 1), int),
    )
    np.testing.assert_allclose(class_ious(counts), [0.3, 0.5, np.nan])
    assert miou(counts) == pytest.approx(0.4)
    np.testing.assert_allclose(image_miou(counts), [(3 / 4 + 5 / 10) / 2, np.nan])
    assert class_ious_with_interval(counts, resamples=20)[2] is None


def test_the_interval_is_that_of_images_drawn_anew():
    counts = random_counts(np.random.default_rng(0))
    found = miou_with_interval(counts, seed=3, resamples=4000)
    rng = np.random.default_rng(77)
    values = []
    for _ in range(4000):
        drawn = rng.integers(12, size=12)
        inter, pred, actual = (x[drawn].sum(0) for x in (counts.intersection, counts.predicted, counts.actual))
        values.append((inter / (pred + actual - inter)).mean())
    np.testing.assert_allclose([found.lo, found.hi], np.percentile(values, [2.5, 97.5]), atol=0.006)
    assert found.lo < found.value < found.hi and found.n == 12


def test_two_runs_on_the_same_images_are_compared_far_more_sharply_than_apart():
    rng = np.random.default_rng(0)
    a = random_counts(rng, images=40)
    better = a.intersection + np.minimum(3, a.predicted - a.intersection)  # three pixels more of each class
    b = dataclasses.replace(a, intersection=np.minimum(better, a.actual))
    found = paired_miou_difference(b, a)
    assert found.value == pytest.approx(miou(b) - miou(a)) and found.value > 0
    alone = miou_with_interval(a)
    assert found.hi - found.lo < (alone.hi - alone.lo) / 3
    assert found.lo > 0 and found.p < 0.001
    same = paired_miou_difference(a, a)
    assert (same.value, same.lo, same.hi, same.p) == (0, 0, 0, 1)


def test_runs_on_other_masks_are_not_compared():
    a, b = (random_counts(np.random.default_rng(seed)) for seed in (0, 1))
    with pytest.raises(ValueError, match="counted on other masks"):
        paired_miou_difference(a, b)


def test_accuracy_at_some_patches_looks_at_their_pixels_alone():
    counts = Counts(*(np.ones((3, 1), int),) * 3, np.array([[1, 8], [2, 9], [3, 3]]), np.full((3, 2), 10))
    where = np.array([[True, False], [True, False], [False, False]])
    found = accuracy(counts, where)
    assert (found.value, found.n) == (pytest.approx(3 / 20), 2)
    assert accuracy(counts).value == pytest.approx(26 / 60)
    assert accuracy(counts, np.zeros_like(where)) is None
    with pytest.raises(ValueError, match=r"shape \(3, 5\).*\(3, 2\)"):
        accuracy(counts, np.zeros((3, 5), bool))
