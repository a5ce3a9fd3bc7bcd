"""TokenCut, DINO-seg and images at their own size, against the published algorithms written down here step by step."""

import copy

import numpy as np
import pytest
import torch
from dense_example import dense_set
from scipy import ndimage
from scipy.linalg import eigh
from test_discovery_published import GRID, shapes, structured

from benchmarks.discovery import published_lost
from regvit.data.manifest import SPLITS, Row, read_dataset
from regvit.data.transform import Transform
from regvit.features.dense_set import images_having
from regvit.measures.dense.discovery import lost
from regvit.measures.training_free.published_discovery import Published, boxes_of, dino_seg, discover_published, padded
from regvit.measures.training_free.token_cut import Cuts, cut, cut_hits, token_cut
from regvit.models.backbones import Backbone, create
from regvit.models.positions import positions_of
from regvit.models.token_features import Feature, patch_features
from regvit.registers.test_time import add_test_time_registers


def around(mask):
    rows, columns = np.where(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def published_cut(features, grid, tau=0.2, eps=1e-5):
    """ncut and detect_box of TokenCut's code."""
    unit = torch.nn.functional.normalize(features, p=2)
    affinity = (unit @ unit.T).numpy() > tau
    affinity = np.where(affinity.astype(float) == 0, eps, affinity)
    degree = np.diag(affinity.sum(1))
    vector = eigh(degree - affinity, degree, subset_by_index=[1, 2])[1][:, 0]
    bipartition, seed = vector > vector.sum() / len(vector), np.argmax(np.abs(vector))
    if bipartition[seed] != 1:
        bipartition = np.logical_not(bipartition)
    objects, _ = ndimage.label(bipartition.reshape(grid).astype(float))
    return around(objects == objects[np.unravel_index(seed, grid)])


def published_dino_seg(attention, grid):
    """dino_seg of LOST's code, for one head."""
    values, places = torch.sort(attention)
    kept = torch.cumsum(values / values.sum(), 0) > 1 - 0.6
    labels, _ = ndimage.label(kept[torch.argsort(places)].reshape(grid).float().numpy())
    sizes = [np.sum(labels == c) for c in range(np.max(labels))]
    return around(labels == (np.argmax(sizes[1:]) + 1 if len(sizes) > 1 else 0))


def test_token_cut_draws_the_published_boxes():
    features = structured(60)
    found = token_cut(features, GRID)
    assert found.boxes.tolist() == [published_cut(one, GRID) for one in features]
    assert len(set(map(tuple, found.boxes.tolist()))) > 20 and not found.isolated.any()
    flat = torch.ones(1, 12, 3)
    assert token_cut(flat, (3, 4)).isolated.all()  # every pair is joined: there is no cut
    with pytest.raises(ValueError, match="do not fit a grid of 3 x 3"):
        token_cut(flat, (3, 3))


def test_dino_seg_looks_at_one_head_as_published():
    attention = torch.from_numpy(ndimage.gaussian_filter(np.random.default_rng(0).random((40, *GRID)), (0, 1, 1)) ** 8)
    boxes = [dino_seg(one.flatten(), GRID).tolist() for one in attention]
    assert boxes == [published_dino_seg(one.flatten(), GRID) for one in attention]
    single = torch.zeros(GRID)
    single[3:6, 2:5] = 1.0
    assert dino_seg(single.flatten(), GRID).tolist() == [0, 0, 14, 12]  # of one component the background counts


def test_equal_degrees_come_in_torchs_order_where_it_is_asked_for():
    features = structured(80)
    expected = [published_lost(one, GRID, 100).box for one in features]
    assert [tuple(lost((one @ one.T)[None], GRID, stable=False).boxes[0].tolist()) for one in features] == expected


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create("test_vit", {"num_classes": 0, "img_size": 64, "dynamic_img_size": True})


def test_boxes_of_an_image_at_its_own_size_are_the_published_ones(model):
    how = Published(k_patches=9, head=1)
    registered = copy.deepcopy(model)
    add_test_time_registers(registered, {2: (1,)})
    told = 0
    for subject in (model, registered):
        for image in shapes(6):
            image = image[:, :90, :]
            whole = padded(image, (16, 16))
            assert whole.shape == (3, 96, 128) and not whole[:, 90:].any() and torch.equal(whole[:, :90], image)
            found = boxes_of(subject, whole, (90, 128), how)
            with positions_of(subject, (6, 8)):
                keys = patch_features(subject, whole[None], [Feature("k", 5)])[Feature("k", 5)][0]
            assert len(keys) == 48
            limits = np.array([128, 90, 128, 90])
            for method, box in (
                ("lost", published_lost(keys, (6, 8), 9).box),
                ("token_cut", published_cut(keys, (6, 8))),
            ):
                assert found[method].tolist() == np.minimum(np.array(box) * 16, limits).tolist()
                told += found[method].tolist() != [0, 0, 128, 90]
            assert set(found) == {"lost", "token_cut", "dino_seg"}
    assert told > 4


def test_positions_of_a_grid_are_resampled_once_and_put_back(model):
    own, image = model.pos_embed, torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model.forward_features(image)
        with positions_of(model, (6, 8)):
            assert model.pos_embed.shape[1] == 49 and model.patch_embed.grid_size == (6, 8)
            assert model.forward_features(torch.randn(1, 3, 96, 128)).shape[1] == 49
        assert model.pos_embed is own and torch.equal(model.forward_features(image), before)


def test_every_image_of_a_set_has_its_boxes_in_its_own_pixels(tmp_path, model):
    boxes = ("[[0, 0, 9, 9]]", "[]", "[[0, 0, 9, 9]]")
    rows = [Row(f"{i}", f"{i}.png", "", "test", boxes[i]) for i in range(3)]
    dense_set(tmp_path, {"k": np.zeros((3, 1, 16, 4))}, rows,
              [(70, 50), (64, 64), (33, 100)])  # fmt: skip
    backbone = Backbone("tiny", model, Transform(64, (0.5,) * 3, (0.5,) * 3), "", None, {})
    boxes = discover_published(backbone, images_having(read_dataset(tmp_path), SPLITS, "boxes"), Published(head=0))
    for method in ("lost", "token_cut"):
        assert (boxes[method][:, 2:] <= [(70, 50), (33, 100)]).all() and (
            boxes[method][:, :2] < boxes[method][:, 2:]
        ).all()


def test_kept_keys_are_cut_into_boxes_of_the_whole_image(tmp_path):
    keys = structured(3)[:, :144].reshape(3, 144, 24)
    dense = dense_set(tmp_path / "made", {"k": np.stack([keys * 0 + 1, keys], axis=1)}, None, [(120, 240)] * 3, side=12)
    taus = (0.0, 0.2, 0.4)
    expected = [[published_cut(one.half().float(), (12, 12), tau) for one in keys] for tau in taus] * np.array(
        [10, 20, 10, 20]
    )
    found = cut(dense, [0, 1, 2], taus)
    assert found.boxes.tolist() == expected.tolist() and not found.overlaps.any()  # there are no true boxes


def test_the_threshold_that_finds_most_is_taken_to_other_images_and_the_published_one_stands_beside():
    tried = Cuts((0.2, 0.8), np.zeros((2, 3, 4)), np.array([[0.6, 0.1, 0.1], [0.6, 0.6, 0.1]]))
    final = Cuts((0.2, 0.8), np.zeros((2, 2, 4)), np.array([[0.9, 0.9], [0.5, 0.4]]))
    hits = cut_hits(tried, final)
    assert hits["corloc_token_cut"].tolist() == [True, False]
    assert hits["corloc_token_cut_published"].tolist() == [True, True]
