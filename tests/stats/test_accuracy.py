import numpy as np
import pytest
from scipy.stats import norm, t

from regvit.stats.accuracy import accuracy, class_indices, paired_accuracy_difference, top1_correct

FIRST = np.array([True, True, True, False, True, False, True, True])
SECOND = np.array([True, False, True, False, True, True, False, True])


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


def half_width(values, single_variance):
    """z² times the covariance of two seeds over the images, and t² times what the seeds differ."""
    seeds = len(values)
    together = values.mean(0)
    covariance = max(0, (seeds * together.var() - single_variance) / (seeds - 1)) / values.shape[1]
    apart = values.mean(1).var(ddof=1) / seeds
    return np.sqrt(norm.ppf(0.975) ** 2 * covariance + t.ppf(0.975, seeds - 1) ** 2 * apart)


def test_the_interval_over_seeds_is_that_of_the_formula():
    correct = np.stack([FIRST, SECOND, FIRST])
    p, kappa = correct.mean(), half_width(correct.astype(float), correct.var(1).mean()) ** 2
    kappa /= p * (1 - p)
    half = np.sqrt(kappa * p * (1 - p) + kappa**2 / 4) / (1 + kappa)
    found, centre = accuracy(correct), (p + kappa / 2) / (1 + kappa)
    assert (found.value, found.n) == (p, 8)
    assert (found.lo, found.hi) == pytest.approx((max(0, centre - half), centre + half), abs=1e-8)


def test_seeds_that_differ_make_the_interval_wider_the_fewer_they_are():
    rng = np.random.default_rng(0)
    correct = rng.random((6, 4000)) < np.array([[0.5], [0.6], [0.7], [0.5], [0.6], [0.7]])
    few, many = (accuracy(correct[:seeds]) for seeds in (3, 6))
    assert few.hi - few.lo > 2 * (many.hi - many.lo) > 4 * (accuracy(correct[0]).hi - accuracy(correct[0]).lo)


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


@pytest.mark.parametrize("among", [[0, 3], [-1, 2]])
def test_classes_out_of_range_are_refused_with_the_range(among):
    with pytest.raises(ValueError, match=r"are out of range \(0 to 2\)"):
        top1_correct(np.zeros((1, 3)), np.array([0]), among=among)
    assert top1_correct(np.zeros((1, 3)), np.array([0]), among=[0, 2]).tolist() == [True]


def test_the_paired_difference_is_that_of_the_accuracies():
    a = np.array([True] * 7 + [False] * 3)
    b = np.array([True] * 2 + [False] * 5 + [True] + [False] * 2)
    found = paired_accuracy_difference(a, b)
    assert (found.only_a, found.only_b, found.n) == (5, 1, 10)
    assert found.value == pytest.approx(0.7 - 0.3)
    p_a, p_b = 6 / 12, 2 / 12  # Bonett and Price: one more of each, two more images
    error = np.sqrt((p_a + p_b - (p_a - p_b) ** 2) / 12)
    assert (found.lo, found.hi) == pytest.approx((p_a - p_b - 1.959964 * error, p_a - p_b + 1.959964 * error), abs=1e-6)
    assert found.p == pytest.approx(2 * norm.sf((p_a - p_b) / error), rel=1e-6)


@pytest.mark.parametrize("seeds", [1, 3])
def test_p_is_below_five_percent_exactly_where_the_interval_leaves_zero_out(seeds):
    rng = np.random.default_rng(0)
    found = [paired_accuracy_difference(rng.random((seeds, 90)) < 0.75, rng.random((seeds, 90)) < 0.6)
             for _ in range(200)]  # fmt: skip
    assert 20 < sum(each.p < 0.05 for each in found) < 180
    assert all((each.p < 0.05) == (each.lo > 0 or each.hi < 0) for each in found)


def test_swapping_the_two_turns_the_sign():
    rng = np.random.default_rng(0)
    a, b = rng.random(300) < 0.8, rng.random(300) < 0.7
    one, other = paired_accuracy_difference(a, b), paired_accuracy_difference(b, a)
    assert (one.value, one.lo, one.hi, one.p) == pytest.approx((-other.value, -other.hi, -other.lo, other.p))


def test_equal_predictions_differ_by_zero_with_an_interval_around_it():
    difference = paired_accuracy_difference(np.ones(50, dtype=bool), np.ones(50, dtype=bool))
    assert (difference.value, difference.p) == (0, 1)
    assert difference.lo < 0 < difference.hi


def test_several_seeds_are_compared_by_the_mean_of_each_image():
    a = np.array([[1, 1, 1, 0, 1], [1, 1, 0, 0, 1]], dtype=bool)
    b = np.array([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=bool)
    found = paired_accuracy_difference(a, b)
    assert found.value == pytest.approx(0.3)
    assert (found.only_a, found.only_b, found.n) == (4, 1, 5)


def test_images_of_a_group_count_together():
    a = np.array([True, True, True, True, False, True])
    b = np.array([False, False, False, False, True, True])
    apart, together = paired_accuracy_difference(a, b), paired_accuracy_difference(a, b, np.array([7, 7, 7, 7, 1, 2]))
    assert apart.value == together.value == pytest.approx(3 / 6)
    assert together.hi - together.lo > apart.hi - apart.lo and together.p > apart.p
    with pytest.raises(ValueError, match=r"groups have shape \(2,\); expected one for each of the 6 images"):
        paired_accuracy_difference(a, b, np.zeros(2))


def test_what_does_not_pair_is_refused_by_name():
    with pytest.raises(ValueError, match="correct_a has 2 images and correct_b 3; pair the same images"):
        paired_accuracy_difference(np.ones(2, dtype=bool), np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="correct_a has 2 seeds and correct_b 3; pair the same seeds"):
        paired_accuracy_difference(np.stack([FIRST] * 2), np.stack([SECOND] * 3))
    with pytest.raises(ValueError, match=r"^correct_b is float64"):
        paired_accuracy_difference(FIRST[:2], np.array([0.5, 1.0]))


def test_one_classifier_without_seeds_meets_all_of_the_others():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 40)) < 0.8, rng.random(40) < 0.6
    assert paired_accuracy_difference(a, b) == paired_accuracy_difference(a, np.stack([b] * 3))
