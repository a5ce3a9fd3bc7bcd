from fractions import Fraction
from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regvit.detectors import DETECTORS, detector, energy, max_logit, msp

logits = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=5).map(np.array)


@given(logits)
def test_scores_equal_the_formulas_in_float64(z):
    exponentials = [[exp(value) for value in row] for row in z]
    assert msp(z) == pytest.approx([1 - max(row) / sum(row) for row in exponentials], abs=1e-14)
    assert energy(z) == pytest.approx([-log(sum(row)) for row in exponentials], abs=1e-12)
    assert max_logit(z).tolist() == [-max(row) for row in z]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_flat_image_is_more_anomalous_than_a_confident_one(name):
    confident, flat = detector(name)(np.array([[9.0, 0.0, 0.0], [0.1, 0.0, 0.1]]))
    assert flat > confident


def test_confident_images_stay_apart_where_one_minus_p_would_round_to_zero():
    z = np.array([[50.0, 0.0], [60.0, 0.0]])
    assert 1 - 1 / (1 + np.exp(-50.0)) == 0  # the plain formula
    expected = [float(Fraction(exp(-margin)) / (1 + Fraction(exp(-margin)))) for margin in (50, 60)]
    assert msp(z) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", DETECTORS)
def test_large_logits_do_not_overflow(name):
    scores = detector(name)(np.array([[1e5, 0.0], [-1e5, -1e5]], dtype=np.float32))
    assert np.isfinite(scores).all() and scores.dtype == np.float64


def test_msp_ignores_a_shift_and_energy_follows_it():
    z = np.array([[1.0, 2.0, 3.0]])
    assert msp(z + 100) == pytest.approx(msp(z))
    assert energy(z + 100) == pytest.approx(energy(z) - 100)


def test_one_class_is_refused_by_msp_only():
    with pytest.raises(ValueError, match="msp needs at least 2 classes"):
        msp(np.ones((4, 1)))
    assert energy(np.ones((4, 1))).tolist() == max_logit(np.ones((4, 1))).tolist() == [-1] * 4


@pytest.mark.parametrize("name", DETECTORS)
def test_what_is_not_finite_or_not_logits_is_refused(name):
    with pytest.raises(ValueError, match="1 of 2 images have infinite or NaN logits"):
        detector(name)(np.array([[0.0, np.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"logits have shape \(3,\); expected \(images, classes\)"):
        detector(name)(np.zeros(3))
    with pytest.raises(ValueError, match=r"logits have shape \(3, 0\)"):
        detector(name)(np.zeros((3, 0)))


def test_no_images_give_no_scores():
    assert all(detector(name)(np.zeros((0, 3))).shape == (0,) for name in DETECTORS)


def test_an_unknown_detector_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"detector 'enrgy' is unknown; did you mean 'energy'\? Known are msp, energy"):
        detector("enrgy")
