import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_example import patch_store

from regvit.measures.dense.dense_heads import DenseTraining, LinearLayer, PatchTokens
from regvit.measures.dense.depth import DepthBins, DepthModel, errors, figures, image_columns, losses, measure, train

SIDE = 4
INDOORS = DepthBins(0.5, 5.0, bins=32)


def world(images=32, seed=0):
    """Smooth depth in metres at 16 px, and patches that say it linearly beside noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(1, 4.5, (images, SIDE, SIDE)).astype(np.float32)
    truth = F.interpolate(torch.from_numpy(coarse)[:, None], (16, 16), mode="bilinear")[:, 0].numpy()
    patches = rng.normal(size=(images, SIDE**2, 6))
    patches[..., 2] = coarse.reshape(images, -1) * 3 - 5
    return patches, truth


def learn(folder, patches, truth, bins=INDOORS, steps=150):
    store = patch_store(folder, patches)
    tokens = [PatchTokens(store, range(*ends)) for ends in ((0, 16), (16, 24), (24, 32))]
    return train(*tokens[:2], truth.__getitem__, bins, DenseTraining([1e-5, 0.03], [0.01], steps, 8)), tokens[2]


def test_depth_that_patches_tell_is_learned_and_the_better_rate_is_chosen(tmp_path):
    patches, truth = world()
    model, test = learn(tmp_path, patches, truth)
    found = measure(model, test, truth.__getitem__).errors
    constant = np.sqrt(((truth[24:] - truth[:16].mean()) ** 2).mean((1, 2))).mean()
    assert found["rmse"].mean() < 0.5 * constant
    assert model.layer.learning_rate == 0.03
    assert model.val_rmse[(0.03, 0.01)] < model.val_rmse[(1e-5, 0.01)]


def test_upsampling_before_depth_is_made_is_learned_as_well(tmp_path):
    patches, truth = world()
    model, test = learn(tmp_path, patches, truth, dataclasses.replace(INDOORS, upsample=2), 60)
    constant = np.sqrt(((truth[24:] - truth[:16].mean()) ** 2).mean((1, 2))).mean()
    assert measure(model, test, truth.__getitem__).errors["rmse"].mean() < 0.8 * constant


def test_depth_is_the_mean_of_the_bins_under_the_normalised_outputs_upsampled():
    layer = LinearLayer(torch.tensor([[1.0], [0.0], [-1.0]]), torch.zeros(3), 0.1, 0.0)
    model = DepthModel(layer, DepthBins(1.0, 3.0), {})
    patches = torch.tensor([[[0.4], [-0.9], [0.0], [0.4]]])
    # bins 1, 2, 3 m with weights relu(±z) + 0.1: (0.5, 0.1, 0.1), (0.1, 0.1, 1.0), equal
    grid = torch.tensor([[(0.5 + 0.2 + 0.3) / 0.7, (0.1 + 0.2 + 3.0) / 1.2], [2.0, (0.5 + 0.2 + 0.3) / 0.7]])
    torch.testing.assert_close(model(patches, (2, 2))[0], grid)
    expected = F.interpolate(grid[None, None], (5, 7), mode="bilinear")[0, 0]
    torch.testing.assert_close(model(patches, (5, 7))[0], expected)


def reference_loss(depth, truth, only_scale):
    """One head in plain float64 loops."""
    g, n = {}, 0
    for b, y, x in np.ndindex(truth.shape):
        if truth[b, y, x] > 0:
            g[b, y, x] = math.log(depth[b, y, x] + 0.001) - math.log(truth[b, y, x] + 0.001)
            n += 1
    values = np.array(list(g.values()))
    scale = 0.15 * values.mean() ** 2
    first = math.sqrt((0 if only_scale else values.var(ddof=1)) + scale + 1e-6)
    second = 0
    for stride in (1, 2, 4, 8):
        kept = {k: v for k, v in g.items() if k[1] % stride == 0 and k[2] % stride == 0}
        total = sum(
            abs(v - kept[k[0], k[1] + dy, k[2] + dx])
            for (k, v), (dy, dx) in itertools.product(kept.items(), ((stride, 0), (0, stride)))
            if (k[0], k[1] + dy, k[2] + dx) in kept
        )
        second += total / len(kept)
    return first + 0.5 * second


@pytest.mark.parametrize("only_scale", [False, True])
def test_the_loss_is_scale_invariant_with_gradient_matching_over_known_pixels(only_scale):
    rng = np.random.default_rng(0)
    depth, truth = rng.uniform(1, 9, (2, 3, 12, 12)), rng.uniform(1, 9, (2, 12, 12))
    truth[:, 3:5, 2:7] = 0
    found = losses(torch.from_numpy(depth), torch.from_numpy(truth), only_scale)
    expected = [reference_loss(depth[:, head], truth, only_scale) for head in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_errors_are_those_worked_by_hand():
    found = errors(np.array([1.0, 2.0, 4.0]), np.array([1.0, 4.0, 2.0]))
    ln2 = math.log(2)
    assert found == pytest.approx({
        "rmse": math.sqrt(8 / 3), "rmse_log": math.sqrt(2 * ln2**2 / 3), "abs_rel": (0 + 0.5 + 1) / 3,
        "log10": 2 * math.log10(2) / 3, "silog": math.sqrt(2 * ln2**2 / 3), "delta1": 1 / 3, "delta2": 1 / 3,
        "delta3": 1 / 3,
    })  # fmt: skip
    assert errors(np.array([1.5, 1.9]), np.ones(2))["delta2"] == 0.5  # 1.5 < 1.5625 < 1.9 < 1.953
    assert errors(np.array([1.5, 1.9]), np.ones(2))["delta3"] == 1.0
    assert math.isnan(errors(np.zeros(0), np.zeros(0))["rmse"])


def test_eigens_crop_is_that_of_nyu_and_in_proportion_elsewhere():
    known = DepthBins(0.001, 10.0, "eigen").known(np.ones((480, 640), np.float32))
    rows, columns = np.flatnonzero(known.any(1)), np.flatnonzero(known.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (45, 470, 41, 600)
    assert known.sum() == 426 * 560
    half = DepthBins(0.001, 10.0, "eigen").known(np.ones((240, 320), np.float32))
    assert half.sum() == pytest.approx(426 * 560 / 4, rel=0.01)


def test_unknown_and_far_pixels_do_not_count_and_predictions_are_clipped(tmp_path):
    patches = np.zeros((3, SIDE**2, 2))
    layer = LinearLayer(torch.zeros(8, 2), torch.zeros(8), 0.1, 0.0)  # every bin alike: 2.75 m everywhere
    model = DepthModel(layer, INDOORS, {})
    truth = np.full((3, 16, 16), 2.0, np.float32)
    truth[0, :8], truth[0, 8:, :8] = 0, 20  # a quarter of the first image counts
    truth[2] = 0
    found = measure(model, PatchTokens(patch_store(tmp_path, patches), range(3)), truth.__getitem__)
    np.testing.assert_allclose(found.errors["rmse"], [0.75, 0.75, np.nan], rtol=1e-6)
    assert found.counted.sum(1).tolist() == [64, 256, 0]
    assert found.counted[0].reshape(4, 4).tolist() == [[0] * 4] * 2 + [[0, 0, 16, 16]] * 2
    where = np.zeros((3, 16), bool)
    where[:, 0] = True
    columns = image_columns(found, where)
    np.testing.assert_allclose(columns["rmse_at_outliers"], [np.nan, 0.75, np.nan], rtol=1e-6)
    np.testing.assert_allclose(columns["abs_rel_elsewhere"], [0.375, 0.375, np.nan], rtol=1e-6)


def test_the_figures_hold_every_error_and_what_it_is_at_outliers(tmp_path):
    patches, truth = world()
    model, test = learn(tmp_path, patches, truth, steps=5)
    measured = measure(model, test, truth.__getitem__)
    outliers = np.zeros((8, 16), bool)
    outliers[:3, 5] = True
    found = {one.metric: one for one in figures(model, measured, outliers)}
    assert found["rmse"].value == pytest.approx(measured.errors["rmse"].mean()) and found["rmse"].n == 8
    expected = [np.sqrt(measured.squared[i, 5] / measured.counted[i, 5]) for i in range(3)]
    assert found["rmse_at_outliers"].value == pytest.approx(np.mean(expected)) and found["rmse_at_outliers"].n == 3
    assert found["delta1"].lo <= found["delta1"].value <= found["delta1"].hi
    without = {one.metric: one.value for one in figures(model, measured, np.zeros((8, 16), bool))}
    assert without["rmse_at_outliers"] is None and without["rmse_elsewhere"] is None
