"""Features become colours by one palette, against scikit-learn's PCA."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from regvit.measures.feature_colours import fit_palette


def some(count: int = 40, channels: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, channels)) * np.arange(channels, 0, -1)


def test_colours_are_the_first_three_components_between_their_quantiles():
    x = some()
    projected = PCA(3).fit_transform(x)
    painted = fit_palette(x).paint(x)
    for i in range(3):
        low, high = np.quantile(projected[:, i], [0.02, 0.98])
        expected = np.clip((projected[:, i] - low) / (high - low), 0, 1)
        assert np.allclose(painted[:, i], expected) or np.allclose(painted[:, i], 1 - expected)  # a sign is free


def test_the_largest_weight_of_each_component_is_positive():
    basis = fit_palette(some()).basis
    assert (basis[np.abs(basis).argmax(0), range(3)] > 0).all()


@given(st.integers(1, 5), st.integers(1, 5))
def test_few_patches_or_channels_have_colours_too(count, channels):
    painted = fit_palette(some(count, channels)).paint(some(3, channels, seed=1))
    assert painted.shape == (3, 3)
    assert np.isfinite(painted).all() and painted.min() >= 0 and painted.max() <= 1


def test_features_of_another_backbone_and_none_at_all_are_refused():
    with pytest.raises(ValueError, match=r"features have 5 channels and the palette was fitted on 6; fit one on"):
        fit_palette(some()).paint(some(channels=5))
    with pytest.raises(ValueError, match="no patch is left to fit colours on"):
        fit_palette(np.empty((0, 4)))
