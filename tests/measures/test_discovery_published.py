"""LOST against the published algorithm as benchmarks/discovery.py has it, with and without ties of the degree."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_example import dense_set
from scipy.ndimage import gaussian_filter

from regvit.measures.dense.discovery import lost, similarity
from regvit.models.backbones import create
from regvit.models.token_features import KINDS, last_layers, patch_features

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import discovery
from benchmarks.discovery import Agreement, compare, published_lost, tie_decides

GRID = (12, 14)


def structured(count, seed=0):
    """Features (b, p, d) with smooth structure over the grid, centred, so that similarities have both signs."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(count, *GRID, 24)), (0, 2, 2, 0)) + 0.01 * rng.normal(size=(*GRID, 24))
    return torch.from_numpy((field - field.mean((1, 2), keepdims=True)).reshape(count, -1, 24)).float()


def shapes(count, size=128):
    """Bright rectangles and discs on gradients, normalised: (b, 3, size, size)."""
    rng, rows, columns = np.random.default_rng(1), *np.mgrid[:size, :size] / size
    images = []
    for i in range(count):
        y, x, reach = *rng.uniform(0.25, 0.75, 2), rng.uniform(0.1, 0.25)
        inside = (
            np.hypot(rows - y, columns - x) < reach if i % 2 else np.maximum(abs(rows - y), abs(columns - x)) < reach
        )
        ground = rng.uniform(-1, 1, (3, 1, 1)) * rows + rng.uniform(-1, 1, (3, 1, 1)) * columns
        images.append(np.where(inside, rng.uniform(-2, 2, (3, 1, 1)), ground))
    return torch.from_numpy(np.stack(images)).float()


def own_boxes(features, grid, k):
    return [tuple(box) for box in lost(similarity(features, normalised=False), grid, k_patches=k).boxes.tolist()]


@pytest.mark.parametrize("k", [100, 9])
def test_where_no_tie_decides_every_box_is_the_published_one(k):
    features = structured(300)
    found = [published_lost(one, GRID, k) for one in features]
    clear = [i for i, one in enumerate(found) if not one.tie_decides]
    assert len(clear) > 30
    assert own_boxes(features[clear], GRID, k) == [found[i].box for i in clear]
    assert len({found[i].box for i in clear}) > 20  # the boxes differ, so that equality says something


@pytest.mark.parametrize("k", [100, 9])
def test_where_ties_decide_every_box_is_the_published_one_with_a_stable_sort(k):
    features = structured(150)
    reading, reverse = (
        [published_lost(one, GRID, k, equal).box for one in features] for equal in ("reading", "reverse")
    )
    tied = [published_lost(one, GRID, k).tie_decides for one in features]
    assert own_boxes(features, GRID, k) == reading
    different = np.array([a != b for a, b in zip(reading, reverse, strict=True)])
    assert different.sum() > 3 and (different <= tied).all()  # ties make boxes differ, and nothing else does


@pytest.mark.parametrize("kind", KINDS)
def test_on_features_of_a_vision_transformer_every_box_is_the_published_one(kind):
    torch.manual_seed(0)
    model = create("test_vit", {"num_classes": 0, "img_size": 128})
    features = patch_features(model.eval(), shapes(24), last_layers(model, 2, [kind]))
    for values in features.values():
        values = values - values.mean((0, 1))  # random weights: all patches are alike but for what is taken away here
        assert own_boxes(values, (8, 8), 20) == [published_lost(one, (8, 8), 20, "reading").box for one in values]
        agreement, _ = compare(values, (8, 8), 20)
        assert agreement.boxes == agreement.same_stably == 24
        assert agreement.boxes - agreement.same == agreement.different_with_ties


def test_a_tie_decides_at_the_first_place_and_at_the_kth():
    def decides(*degrees, k):
        return tie_decides(torch.tensor(degrees), k)

    assert decides(3, 1, 1, 5, k=4)  # two patches of the lowest degree
    assert decides(1, 3, 3, 5, k=2)  # the second and the third
    assert not decides(1, 3, 3, 5, k=3) and not decides(1, 3, 3, 5, k=1)
    assert not decides(4, 3, 2, 1, k=100) and not decides(1, 3, 3, k=100) and not decides(2, k=1)


def test_the_order_of_equal_degrees_can_be_chosen():
    features = torch.tensor([1.0, 0.0]).repeat(9, 1)
    features[[0, 8]] = torch.tensor([-1.0, 0.0])  # two corners of the lowest degree
    assert published_lost(features, (3, 3), 9, "reading").box == (0, 0, 1, 1)
    assert published_lost(features, (3, 3), 9, "reverse").box == (2, 2, 3, 3)
    with pytest.raises(ValueError, match="equal is 'any'; expected open, reading or reverse"):
        published_lost(features, (3, 3), 9, "any")


def test_features_that_all_correlate_give_the_whole_image():
    found = published_lost(structured(1)[0].abs() + 0.1, GRID)
    assert found.whole and found.positive == 1.0 and found.box == (0, 0, 14, 12)
    features = structured(1)[0]
    gram = (features @ features.T).numpy()
    expected = ((gram > 0).sum() - len(gram)) / (len(gram) ** 2 - len(gram))
    assert published_lost(features, GRID).positive == pytest.approx(expected)


def test_a_seed_outside_of_its_mask_raises_as_published():
    with pytest.raises(ValueError, match="the seed, patch 0, is in the background component"):
        published_lost(torch.zeros(9, 2), (3, 3))


def test_counts_add_up_and_are_said_as_shares():
    total = Agreement(8, 6, 8, 5, 7, 2) + Agreement(2, 2, 1, 2, 1, 0)
    assert total == Agreement(10, 8, 9, 7, 8, 2)
    assert total.sentence() == (
        "80.00% of 10 boxes equal the published ones, with a stable sort there 90.00%; 2 of the 2 different ones come "
        "from ties (a tie decides in 8 cases); the published code agrees with itself, its ties reversed, on 70.00%"
    )


def test_a_built_project_is_measured_run_by_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    keys = {kind: np.random.default_rng(0).normal(size=(4, 2, 16, 8)) for kind in KINDS}
    made = dense_set(tmp_path / "data/scenes", keys, inside_layers=[4, 5])
    (tmp_path / "features/dense/cured").mkdir(parents=True)
    made.store.path.rename(tmp_path / "features/dense/cured/scenes.zarr")
    monkeypatch.setattr(sys, "argv", ["discovery.py", "--out", "found.json"])
    discovery.main()
    found = json.loads((tmp_path / "found.json").read_text())["runs"]["cured"]
    assert found["all"]["boxes"] == 4 * 8 and found["all"]["same_stably"] == 4 * 8
    assert len(found["by_feature"]) == 8 and found["by_feature"]["k5"]["boxes"] == 4
    assert found["published_setting"]["feature"] == "k5" and found["published_setting"]["images"] == 4
    assert capsys.readouterr().out.startswith("cured: ")
    monkeypatch.setattr(sys, "argv", ["discovery.py", "--dataset", "rooms"])
    with pytest.raises(SystemExit, match="no run in features/dense has rooms: run `dvc repro extract_dense` first"):
        discovery.main()
