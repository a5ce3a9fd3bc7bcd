import numpy as np
import pytest
import torch
from dense_example import dense_set
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from regvit.measures import token_probes
from regvit.measures.token_probes import (
    by_kind,
    chance,
    fit_patch_probes,
    patch_pixels,
    read_patches,
    tokens_and_pixels,
)

SIDE, SIZE = 3, 2  # patches a side, pixels a side of a patch
PATCHES = SIDE**2


def random_patches(count: int, seed: int = 0, d: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch tokens that mix position and pixels linearly, and noise; and the pixels."""
    g = torch.Generator().manual_seed(seed)
    pixels = patch_pixels(torch.randn(count, 3, SIDE * SIZE, SIDE * SIZE, generator=g), PATCHES)
    mix = torch.Generator().manual_seed(99)
    places, of_pixels = torch.randn(PATCHES, d, generator=mix), torch.randn(3 * SIZE**2, d, generator=mix)
    patches = places + 0.3 * pixels @ of_pixels
    return (patches + 0.3 * torch.randn(patches.shape, generator=g)).double(), pixels.double()


def test_pixels_of_a_patch_stand_channel_by_channel_in_the_order_of_the_tokens():
    image = torch.arange(3 * 36, dtype=torch.float32).reshape(1, 3, 6, 6)
    found = patch_pixels(image, 9)
    assert found.shape == (1, 9, 12)
    assert found[0, 5].tolist() == image[0, :, 2:4, 4:6].flatten().tolist()
    with pytest.raises(ValueError, match="images of 6 x 6 px do not divide into 4 x 4 patches"):
        patch_pixels(image, 16)


def test_pixels_are_read_by_ridge_regression_without_a_penalty_on_the_bias():
    seen = random_patches(40)
    probes = fit_patch_probes([tuple(part[rows] for part in seen) for rows in (slice(15), slice(15, 40))])
    x = seen[0].flatten(0, 1).numpy()
    y = seen[1].flatten(0, 1).numpy()
    penalty = token_probes.RIDGE * ((x - x.mean(0)) ** 2).sum(0).mean()
    reference = Ridge(alpha=penalty).fit(x, y)
    assert np.allclose(probes.pixels.weight, reference.coef_, atol=1e-8)
    assert np.allclose(probes.pixels.bias, reference.intercept_, atol=1e-8)
    assert np.allclose(probes.mean_pixels, y.mean(0))


def test_position_is_read_by_a_linear_discriminant(monkeypatch):
    monkeypatch.setattr(token_probes, "RIDGE", 0.0)
    seen, test = random_patches(60), random_patches(20, seed=1)
    x = seen[0].flatten(0, 1).numpy()
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(x, np.tile(np.arange(9), 60))
    probes = fit_patch_probes([seen])
    tested = test[0]
    expected = reference.decision_function(tested.flatten(0, 1).numpy()).reshape(20, 9, 9)
    found = probes.position(tested).numpy()
    # scikit-learn divides the covariance by the number of tokens, here it is that less the number of places
    scale = (60 * 9 - 9) / (60 * 9)
    centred = found - found.mean(-1, keepdims=True)
    assert np.allclose(centred, scale * (expected - expected.mean(-1, keepdims=True)), atol=1e-5)
    assert read_patches(probes, [test])["position_top1"].mean() > 0.9


def test_images_that_cannot_teach_where_a_patch_lies_are_refused():
    tokens, pixels = random_patches(1)
    for batches in ([], [(tokens, pixels)]):
        with pytest.raises(ValueError, match=rf"{len(batches)} training image\(s\) cannot teach"):
            fit_patch_probes(batches)
    with pytest.raises(
        ValueError, match=r"tokens of all 7 training images are alike, place by place.*give images that"
    ):
        fit_patch_probes([(tokens.expand(7, -1, -1), pixels.expand(7, -1, -1))])


def test_tokens_stand_beside_the_pixels_under_them(tmp_path):
    patches = np.random.default_rng(0).normal(size=(5, 16, 3))
    dense = dense_set(tmp_path / "set", {"patches": patches})
    (x, y), (last, _) = tokens_and_pixels(dense, [0, 2, 4])
    assert np.allclose(x, patches[[0, 2]], atol=1e-2) and np.allclose(last, patches[[4]], atol=1e-2)
    image = dense.images([2])[0]
    assert torch.equal(y[1, 6], image[:, 4:8, 8:12].flatten().double())  # row 1, column 2


def test_errors_are_distances_on_the_grid_and_norms_over_pixels():
    x, y = random_patches(1)
    probes = token_probes.PatchProbes(
        position=token_probes.Affine(torch.zeros(9, 20).double(), torch.eye(9)[8].double()),  # always the last place
        pixels=token_probes.Affine(torch.zeros(12, 20).double(), torch.ones(12).double()),
        mean_pixels=torch.zeros(12).double(),
    )
    found = read_patches(probes, [(x, y)])
    assert found["position_top1"][0].tolist() == [0] * 8 + [1]
    assert found["position_distance"][0, 0] == pytest.approx(np.hypot(2, 2)) and found["position_distance"][0, 7] == 1
    assert np.allclose(found["pixels_l2"][0], (y[0] - 1).norm(dim=1))
    assert np.allclose(found["pixels_guess_l2"][0], y[0].norm(dim=1))


def test_outliers_are_compared_with_normal_patches_and_within_their_own_images():
    outliers = np.zeros((3, 9), dtype=bool)
    outliers[0, :2] = outliers[1, 0] = True
    correct = np.ones((3, 9))
    correct[0, 0], correct[1, 0], correct[1, 1:5] = 0, 0, 0
    found = by_kind({"position_top1": correct}, outliers)
    np.testing.assert_allclose(found["position_top1_outlier"], [0.5, 0, np.nan])
    np.testing.assert_allclose(found["position_top1_normal"], [1, 0.5, 1])
    np.testing.assert_allclose(found["position_top1_difference"], [-0.5, -0.5, np.nan])


def test_chance_is_the_mean_distance_of_two_places_drawn_at_random():
    expected = {"position_top1_chance": 1 / 4, "position_distance_chance": (2 + 2**0.5) / 4}  # 0, 1, 1, sqrt 2
    assert chance(4) == pytest.approx(expected)
