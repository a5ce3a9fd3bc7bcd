import numpy as np
import pytest
import torch
from dense_example import dense_set
from scipy.ndimage import gaussian_filter

from regvit.data.manifest import Row
from regvit.measures.dense.discovery import (
    Discovered,
    attention_boxes,
    choose,
    discover,
    feature_table,
    figures,
    image_columns,
    kept_features,
    lost,
    settings,
    similarity,
    sweep_table,
)
from regvit.models.token_features import Feature


def structured(count, grid, d=16, seed=0):
    """Features with smooth structure over the grid, centred, so that similarities have both signs."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(count, *grid, d)), (0, 2, 2, 0))
    field += 0.02 * rng.normal(size=field.shape)
    return torch.from_numpy((field - field.mean((1, 2), keepdims=True)).reshape(count, -1, d)).float()


@pytest.mark.parametrize("bias", [0.0, -1.0])
def test_an_isolated_seed_gets_the_box_of_its_own_patch(bias):
    # Patch 4 is orthogonal to all others; with a bias of -1 it is not even similar to itself, where the published code
    # raises "The seed is in the background component."
    features = torch.tensor([1.0, 0.0]).repeat(9, 1)
    features[4] = torch.tensor([0.0, 1.0])
    found = lost(similarity(features[None], normalised=True), (3, 3), bias)
    assert found.isolated.tolist() == [True]
    assert found.boxes.tolist() == ([[1, 1, 2, 2]] if bias == 0 else [[0, 0, 1, 1]])


def test_the_bias_separates_features_that_are_all_positively_correlated():
    features = torch.tensor([1.0, 0.6]).repeat(4, 4, 1)
    features[1:3, 1:3] = torch.tensor([0.6, 1.0])  # cosine 0.88 with the background
    matrix = similarity(features.reshape(1, 16, 2), normalised=True)
    assert lost(matrix, (4, 4), 0.0).boxes.tolist() == [[0, 0, 4, 4]]
    assert lost(matrix, (4, 4), -0.95).boxes.tolist() == [[1, 1, 3, 3]]


def test_attention_keeps_the_patches_with_most_of_the_mass():
    attention = torch.tensor([[0.30, 0.25, 0.02], [0.02, 0.02, 0.20], [0.02, 0.02, 0.15]]).reshape(1, 9)
    # Ascending, the five patches of 0.02 hold 0.10, with 0.15 then 0.25; 0.20 more passes 0.4, so three patches stay.
    assert attention_boxes(attention, (3, 3)).masks[0].tolist() == [
        [True, True, False], [False, False, False], [False, False, False]]  # fmt: skip
    assert attention_boxes(attention, (3, 3)).boxes.tolist() == [[0, 0, 2, 1]]
    assert attention_boxes(10 * attention, (3, 3), mass=0.9).boxes.tolist() == [[0, 0, 2, 1]]
    assert attention_boxes(attention, (3, 3), mass=1.0).boxes.tolist() == [[0, 0, 3, 3]]
    with pytest.raises(ValueError, match=r"mass is 0; expected a share in \(0, 1\]"):
        attention_boxes(attention, (3, 3), mass=0)


def test_the_last_of_the_components_counts_as_well():
    # The published code never looks at the last component: here it is the largest.
    attention = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).reshape(1, 9)
    assert attention_boxes(attention, (3, 3), mass=1.0 - 1e-9).boxes.tolist() == [[2, 1, 3, 3]]
    single = torch.tensor([[0.0, 0.0], [0.0, 1.0]]).reshape(1, 4)
    assert attention_boxes(single, (2, 2)).boxes.tolist() == [[1, 1, 2, 2]]


def test_most_hits_win_then_the_larger_overlap_then_the_first():
    assert choose(np.array([[0.9, 0.1], [0.5, 0.5], [0.6, 0.5], [0.6, 0.5]])) == 2
    with pytest.raises(ValueError, match="nothing can be chosen from 3 settings on 0 images"):
        choose(np.zeros((3, 0)))


@pytest.fixture
def dense(tmp_path):
    """Six images of different shapes, all but the last with boxes; keys of two blocks, attention of CLS and a register."""
    sizes = [(64, 64), (128, 64), (40, 80)] * 2
    boxes = [f"[[0, 0, {width}, {height}], [0, 0, 8, 8]]" for width, height in sizes[:5]]
    splits = ["train", "val", "test"] * 2
    rows = [Row(f"{i}", f"{i}.png", "", splits[i], each) for i, each in enumerate([*boxes, ""])]
    keys = structured(12, (4, 4)).reshape(6, 2, 16, 16).numpy()
    attention = np.random.default_rng(0).uniform(size=(6, 3, 2, 2, 18))
    return dense_set(tmp_path / "few", {"k": keys, "attention": attention}, rows, sizes, inside_layers=[1, 2])


def test_boxes_are_those_of_each_images_own_features_in_its_pixels(dense):
    tried = settings(kept_features(dense, ["k"]), [True], [0.0, -0.3])
    rows = dense.rows("train", "val", having="boxes")
    found = discover(dense, rows, tried)
    assert rows == [0, 1, 3, 4] and found.boxes.shape == (4, 4, 4) and found.head_overlaps.shape == (2, 4)
    for i, one in enumerate(tried):
        keys = torch.from_numpy(dense.read("k", rows)[:, one.feature.layer - 1])
        expected = lost(similarity(keys, True), (4, 4), one.bias).boxes
        assert np.allclose(found.boxes[i, 0], expected[0] * 16)
        assert np.allclose(found.boxes[i, 1], expected[1] * [32, 16, 32, 16])  # of 128 x 64
    maps = torch.from_numpy(dense.read("attention", rows)[:, -1, :, 0, 2:])
    first = attention_boxes(maps[:, 0], (4, 4)).boxes[0]
    covered = (first[2] - first[0]) * (first[3] - first[1]) / 16  # the first true box is the whole image
    assert found.head_overlaps[0, 0] >= covered - 1e-6
    assert found.best() in tried and found.best_of_each()[0].feature == Feature("k", 1)
    assert found.hits(tried[1]).tolist() == (found.overlaps[1] >= 0.5).tolist()


def test_the_setting_is_chosen_on_some_images_and_its_corloc_is_of_others():
    tried = settings([Feature("k", 1), Feature("v", 1)], [True], [0.0, -0.5])
    overlaps = np.array([[0.6, 0.1], [0.6, 0.7], [0.1, 0.1], [0.1, 0.6]])
    learned = Discovered(
        tried, np.zeros((4, 2, 4)), overlaps, np.zeros((4, 2), bool), np.array([[0.1, 0.2], [0.6, 0.1]])
    )
    kept = (tried[1], tried[3], tried[0])
    final = Discovered(
        kept,
        np.arange(36.0).reshape(3, 3, 4),
        np.array([[0.9, 0.1, 0.2], [0.6, 0.6, 0.1], [0.0, 0.0, 0.9]]),
        np.array([[True, False, False]] * 3),
        np.array([[0.9, 0.9, 0.9], [0.9, 0.1, 0.1]]),
    )
    found = {one.metric: one for one in figures(learned, final, tried[0], seed=0)}
    expected = {"corloc": 1 / 3, "corloc_k": 1 / 3, "corloc_v": 2 / 3, "corloc_published": 1 / 3, "corloc_mean": 1 / 2}
    expected |= {"corloc_dino_seg": 1 / 3, "corloc_chosen_on": 1, "isolated": 1 / 3}
    assert {name: one.value for name, one in found.items()} == pytest.approx(expected)
    assert (
        found["corloc"].n == 3 and found["corloc"].lo < 1 / 3 < found["corloc"].hi and found["corloc_chosen_on"].n == 2
    )
    columns = image_columns(learned, final, tried[0])
    assert columns["corloc"].tolist() == [1, 0, 0] and columns["corloc_mean"].tolist() == [1, 0.5, 0]
    assert columns["iou"].tolist() == [0.9, 0.1, 0.2] and columns["x1"].tolist() == [2, 6, 10]
    sweep = sweep_table(learned)
    assert sweep["corloc"].tolist() == [0.5, 1, 0, 0.5] and list(sweep["bias"]) == [0.0, -0.5] * 2
    features = feature_table(learned, final)
    assert features["kind"].tolist() == ["k", "v"] and features["chosen"].tolist() == [1, 0]
    assert features["corloc"].tolist() == pytest.approx([1 / 3, 2 / 3])
