import numpy as np
import pytest

from regvit.stats.intervals import mean_with_interval


def test_interval_is_near_the_normal_one_for_many_images():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=4000)
    found = mean_with_interval("norm", values)
    half = 1.96 * values.std() / np.sqrt(4000)
    assert found["norm"] == pytest.approx(values.mean(), abs=1e-6)
    assert found["norm_lo"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["norm_hi"] == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_images_without_a_value_are_left_out():
    assert mean_with_interval("x", np.array([1.0, np.nan, 1.0])) == {"x": 1.0, "x_lo": 1.0, "x_hi": 1.0}


def test_no_value_at_all_is_none():
    assert mean_with_interval("x", np.array([np.nan])) == {"x": None, "x_lo": None, "x_hi": None}


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).random(50)
    assert mean_with_interval("x", values, seed=3) == mean_with_interval("x", values, seed=3)
    assert mean_with_interval("x", values, seed=3) != mean_with_interval("x", values, seed=4)
