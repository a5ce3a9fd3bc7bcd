import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, label

from regvit.data.batches import Batches
from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.transform import Transform
from regvit.data.whole_images import WholeTransform
from regvit.measures.discovery import (
    Setting,
    attention_boxes,
    boxes_around,
    choose,
    discover,
    discover_all,
    lost,
    measure,
    patch_size,
    settings,
    similarity,
)
from regvit.models.token_features import Feature, patch_features
from regvit.registers.test_time import add_test_time_registers

TRANSFORM = Transform(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def published(features, grid, k=100):
    """The published algorithm on one image, dense and in float64; equal degrees in reading order."""
    features = features.astype(np.float64)
    a = features @ features.T
    others = a.copy()
    np.fill_diagonal(others, 0)
    order = np.argsort((others > 0).sum(1), kind="stable")
    seed = order[0]
    near = order[:k]
    near = near[a[seed, near] > 0]
    components, _ = label(a[near].sum(0).reshape(grid) > 0)
    rows, columns = np.where(components == components.ravel()[seed])
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], seed


def structured(count, grid, d=16, seed=0):
    """Features with smooth structure over the grid, centred, so that similarities have both signs."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(count, *grid, d)), (0, 2, 2, 0))
    field += 0.02 * rng.normal(size=field.shape)
    return torch.from_numpy((field - field.mean((1, 2), keepdims=True)).reshape(count, -1, d)).float()


@pytest.mark.parametrize("grid", [(16, 16), (6, 21)])
@pytest.mark.parametrize("k", [100, 7])
def test_with_bias_zero_the_boxes_are_those_of_the_published_algorithm(grid, k):
    features = structured(60, grid)
    found = lost(similarity(features, normalised=False), grid, k_patches=k)
    expected = [published(one.numpy(), grid, k) for one in features]
    assert found.seeds.tolist() == [seed for _, seed in expected]
    assert found.boxes.tolist() == [box for box, _ in expected]
    assert len(set(map(tuple, found.boxes.tolist()))) > 12  # the boxes differ, so that equality says something


def test_a_batch_gives_what_its_images_give_alone():
    matrix = similarity(structured(9, (8, 8)), normalised=True)
    whole = lost(matrix, (8, 8), -0.1)
    for i in range(9):
        alone = lost(matrix[i : i + 1], (8, 8), -0.1)
        assert alone.boxes[0].tolist() == whole.boxes[i].tolist() and alone.seeds[0] == whole.seeds[i]


def test_the_object_is_the_component_of_the_patch_that_few_others_resemble():
    # Background along one axis, an object of 2 x 3 patches along the opposite one, and an equal but separate patch.
    features = torch.tensor([1.0, 0.0]).repeat(5, 6, 1)
    features[1:3, 2:5] = torch.tensor([-1.0, 0.2])
    features[4, 0] = torch.tensor([-1.0, 0.2])
    found = lost(similarity(features.reshape(1, 30, 2), normalised=False), (5, 6))
    assert found.seeds.tolist() == [8]  # row 1, column 2: first in reading order of the seven of lowest degree
    assert found.boxes.tolist() == [[2, 1, 5, 3]]
    assert found.masks[0].sum() == 6 and not found.isolated[0]


def test_diagonal_neighbours_do_not_connect():
    features = torch.tensor([1.0, 0.0]).repeat(4, 4, 1)
    features[1, 1] = features[2, 2] = torch.tensor([-1.0, 0.0])
    found = lost(similarity(features.reshape(1, 16, 2), normalised=True), (4, 4))
    assert found.boxes.tolist() == [[1, 1, 2, 2]]


def test_equal_degrees_are_taken_in_reading_order():
    found = lost(torch.ones(2, 9, 9), (3, 3))
    assert found.seeds.tolist() == [0, 0] and found.boxes.tolist() == [[0, 0, 3, 3]] * 2


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


def test_a_bias_means_the_same_at_any_scale_of_unnormalised_features():
    features = structured(20, (8, 8)) + 0.3
    boxes = [lost(similarity(scale * features, normalised=False), (8, 8), -0.4).boxes for scale in (1.0, 64.0)]
    assert boxes[0].tolist() == boxes[1].tolist()


def test_the_bias_is_measured_by_the_median_patch():
    features = torch.tensor([[1.0], [2.0], [3.0]])[None]
    assert similarity(features, normalised=False)[0].diagonal().tolist() == pytest.approx([0.25, 1.0, 2.25])
    assert similarity(features, normalised=True)[0].diagonal().tolist() == [1.0, 1.0, 1.0]


def test_padding_takes_no_part():
    features = structured(20, (8, 6))
    padded = torch.randn(20, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    padded[:, :, :6] = features.reshape(20, 8, 6, 16)
    valid = torch.zeros(20, 8, 8, dtype=torch.bool)
    valid[:, :, :6] = True
    alone = lost(similarity(features, normalised=True), (8, 6), -0.1)
    found = lost(similarity(padded.reshape(20, 64, 16), normalised=True), (8, 8), -0.1, valid=valid.reshape(20, 64))
    assert found.boxes.tolist() == alone.boxes.tolist()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="similarities of 9 patches do not fit a grid of 2 x 4"):
        lost(torch.ones(1, 9, 9), (2, 4))
    with pytest.raises(ValueError, match="k_patches is 0; expected 1 or more"):
        lost(torch.ones(1, 9, 9), (3, 3), k_patches=0)
    with pytest.raises(ValueError, match="an image has no valid patch"):
        lost(torch.ones(1, 9, 9), (3, 3), valid=torch.zeros(1, 9, dtype=torch.bool))


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


def test_boxes_are_tight_around_masks():
    masks = np.zeros((2, 4, 5), bool)
    masks[0, 1:3, 2] = masks[1] = True
    assert boxes_around(masks).tolist() == [[2, 1, 3, 3], [0, 0, 5, 4]]


def test_most_hits_win_then_the_larger_overlap_then_the_first():
    assert choose(np.array([[0.9, 0.1], [0.5, 0.5], [0.6, 0.5], [0.6, 0.5]])) == 2
    with pytest.raises(ValueError, match="nothing can be chosen from 3 settings on 0 images"):
        choose(np.zeros((3, 0)))


def test_settings_of_a_feature_stand_together():
    made = settings([Feature("k", 1), Feature("v", 0)], [True, False], [0.0, -0.5])
    assert len(made) == 8 and made[0] == Setting(Feature("k", 1), True, 0.0) and made[3].bias == -0.5
    assert [one.feature.kind for one in made] == ["k"] * 4 + ["v"] * 4


def test_registers_are_never_counted_as_patches(tiny_vit, noise_images):
    # A test-time register that moves no neuron is a token more; boxes must be those of the plain patches' features.
    model, images = tiny_vit(registers=2), noise_images(6)
    tried = settings([Feature("k", 5), Feature("token", 4)], [True], [0.0, -0.3])
    with add_test_time_registers(model, {3: (1, 2)}, 3):
        found = discover(model, images, tried, heads=True)
        for i, one in enumerate(tried):
            features = patch_features(model, images, [one.feature])[one.feature]
            assert features.shape == (6, 64, 64)
            expected = lost(similarity(features, one.normalised), (8, 8), one.bias).boxes * 8
            assert found.lost[i].tolist() == expected.tolist()
    assert found.heads.shape == (4, 6, 4)
    assert (found.lost >= 0).all() and (found.lost <= 64).all() and (found.heads <= 64).all()


def test_discovery_leaves_no_trace_on_the_model(tiny_vit, noise_images):
    model, images = tiny_vit(), noise_images(2)
    before = model.forward_features(images)
    discover(model, images, settings([Feature("q", 5)], [True], [0.0]), heads=True)
    assert torch.equal(model.forward_features(images), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_cls_has_no_attention_to_draw_boxes_from(tiny_vit, noise_images):
    with pytest.raises(ValueError, match="no CLS token, so there is no CLS attention"):
        discover(tiny_vit(cls=False, registers=1), noise_images(1), (), heads=True)


def test_the_patch_size_is_the_models(tiny_vit):
    assert patch_size(tiny_vit()) == 8
    with pytest.raises(ValueError, match="Linear has patches of None"):
        patch_size(torch.nn.Linear(2, 2))


@pytest.fixture
def folder(tmp_path):
    """Three images of different shapes, the last without a box."""
    rng, rows = np.random.default_rng(0), []
    for i, size in enumerate([(64, 64), (128, 64), (40, 80)]):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        boxes = json.dumps([[0, 0, size[0], size[1]], [0, 0, 8, 8]]) if i < 2 else ""
        rows.append(Row(f"{i}", f"{i}.png", "", "test", boxes))
    write_dataset(tmp_path, "few", rows, (), {})
    return read_dataset(tmp_path)


def test_boxes_of_a_data_set_are_in_pixels_of_its_images(tiny_vit, folder):
    model, tried = tiny_vit(), settings([Feature("k", 5)], [True], [0.0, -0.5])
    for fit in ("squash", "pad"):
        batches = Batches(folder, WholeTransform.of(TRANSFORM, fit), 2, label=None)
        found = discover_all(model, batches, tried, heads=True)
        assert found.lost.shape == (2, 3, 4) and found.heads.shape == (4, 3, 4) and found.isolated.shape == (2, 3)
        assert (found.lost[:, 1] <= [128, 64, 128, 64]).all() and (found.lost[:, 2] <= [40, 80, 40, 80]).all()
        measured = measure(model, batches, tried)
        assert measured.overlaps.shape == (2, 3) and (measured.overlaps[:, 2] == 0).all()
        assert measured.head_overlaps.shape == (0, 3)
        assert measured.best() in tried and measured.best_of_each() == (measured.best("k"),)
        assert measured.hits(tried[1]).tolist() == (measured.overlaps[1] >= 0.5).tolist()


def test_a_transform_that_crops_is_refused(tiny_vit, folder):
    with pytest.raises(ValueError, match=r"give WholeTransform\.of\(transform\)"):
        discover_all(tiny_vit(), Batches(folder, TRANSFORM, 2, label=None), ())
