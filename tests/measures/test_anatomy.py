import json

import numpy as np
import pytest
import torch
from PIL import Image
from run_example import write_run
from scipy.stats import rankdata

from regvit.data.transform import Transform
from regvit.measures.anatomy import (
    Anatomy,
    Subject,
    dissect,
    draw_anatomy,
    grid_side,
    image_means,
    looks,
    norm_table,
    open_subject,
    position_table,
    rank_share,
    summary,
    two_modes,
)
from regvit.models.backbones import Backbone, create, save_backbone
from regvit.registers.neighbourhood import low_information
from regvit.registers.outliers import Detection, patch_norms
from regvit.registers.run_files import Variant
from regvit.registers.test_time import add_test_time_registers

TRANSFORM = Transform(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def wrapped(model: torch.nn.Module) -> Backbone:
    return Backbone("tiny", model, TRANSFORM, "0" * 64, None, {})


def same(model: torch.nn.Module, detection: Detection | None = None) -> Subject:
    backbone = wrapped(model)
    return Subject(backbone, backbone, detection)


def made_anatomy() -> Anatomy:
    """Two images of 3 x 3 patches in four blocks; the centre of the first grows ten times as large in block 2."""
    norms = np.ones((4, 2, 9), dtype=np.float32) + np.linspace(0, 0.1, 9, dtype=np.float32)
    outliers = np.zeros((2, 9), dtype=bool)
    outliers[0, 4] = True
    norms[1, 0, 4], norms[2, 0, 4], norms[3, 0, 4] = 1.5, 10.0, 4.0
    cosine = np.full((2, 9), 0.5, dtype=np.float32)
    cosine[0, 4] = 0.9
    rank = np.full((2, 9), 0.5, dtype=np.float32)
    rank[0, 4] = 0.95
    return Anatomy(norms, outliers, cosine, rank)


def test_ranks_are_scipys_shares_with_ties_in_the_middle():
    values = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    expected = (rankdata(values.numpy(), axis=1) - 0.5) / 4
    assert rank_share(values).numpy() == pytest.approx(expected)


def test_ranks_of_information_are_those_that_planting_chooses_by(tiny_vit, noise_images):
    model, images = tiny_vit(), noise_images(6)
    found = dissect(same(model), images.split(4))
    expected = rank_share(low_information(model, images))
    assert np.allclose(found.information_rank, expected, atol=1e-6)
    assert found.side == 8


def test_norms_are_the_runs_and_outliers_the_untreated_models(tiny_vit, noise_images):
    plain, treated, images = tiny_vit(), tiny_vit(), noise_images(5)
    add_test_time_registers(treated, {1: (3, 9)}, 1)
    before, after = patch_norms(plain, [images]), patch_norms(treated, [images])
    detection = Detection(3, float(np.quantile(before[3], 0.9)), 0.0)
    found = dissect(Subject(wrapped(treated), wrapped(plain), detection), images.split(2))
    assert np.allclose(found.norms, after, rtol=1e-4)
    assert not np.allclose(before, after, rtol=1e-4)
    assert np.array_equal(found.outliers, before[3] > detection.threshold)
    assert np.array_equal(dissect(same(plain, detection), images.split(2)).outliers, found.outliers)


def test_looks_hold_the_tokens_that_readouts_get_and_leave_no_hooks(tiny_vit, noise_images):
    model, images = tiny_vit(registers=1), noise_images(3)
    seen = list(looks(same(model), images.split(2)))
    assert torch.equal(torch.cat([look.tokens for look in seen]), model.forward_features(images))
    assert [look.norms.shape for look in seen] == [(6, 2, 64), (6, 1, 64)]
    assert not any(look.outliers.any() for look in seen)
    assert not any(module._forward_hooks for module in model.modules())


def test_every_look_is_shown_to_whoever_wants_more_of_the_same_forward(tiny_vit, noise_images):
    shown = []
    dissect(same(tiny_vit()), noise_images(5).split(2), lambda look: shown.append(len(look.images)))
    assert shown == [2, 2, 1]


def test_without_images_there_is_nothing_to_look_into(tiny_vit):
    with pytest.raises(ValueError, match="no images to look into"):
        dissect(same(tiny_vit()), [])


def test_norms_that_are_not_finite_are_named_by_layer_and_image(tiny_vit, noise_images):
    images = noise_images(3)
    images[2] = torch.nan
    with pytest.raises(ValueError, match="not finite in layer 0 for image 2"):
        dissect(same(tiny_vit()), images.split(2))


def test_patches_that_make_no_square_are_refused():
    assert grid_side(49) == 7
    with pytest.raises(ValueError, match="50 patches make no square grid"):
        grid_side(50)


def test_two_modes_are_found_where_there_are_two():
    rng = np.random.default_rng(0)
    sample = np.concatenate([rng.normal(1, 0.2, 9500), rng.normal(4, 0.4, 500)])
    found = two_modes(sample)
    assert (found.low, found.high) == pytest.approx((1, 4), abs=0.05)
    assert (found.low_sd, found.high_sd) == pytest.approx((0.2, 0.4), abs=0.03)
    assert found.high_share == pytest.approx(0.05, abs=0.002)
    assert found.ashman_d == pytest.approx(3 / np.sqrt((0.04 + 0.16) / 2), rel=0.08)


def test_one_mode_is_not_cleanly_apart():
    assert two_modes(np.random.default_rng(0).normal(size=5000)).ashman_d < 2
    with pytest.raises(ValueError, match=r"3 value\(s\), all equal"):
        two_modes(np.ones(3))


def test_the_table_of_norms_has_a_row_a_block_and_compares_medians():
    rows = norm_table(made_anatomy(), Detection(2, 5.0, 1.0))
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    normal = np.median(np.delete(made_anatomy().norms[2].ravel(), 4))
    assert rows[2]["ratio"] == pytest.approx(10 / normal, rel=1e-5)
    assert rows[2]["over_threshold"] == pytest.approx(1 / 18, abs=1e-6) and rows[1]["over_threshold"] == 0
    assert rows[2]["otsu_separation"] > 0.98 > rows[0]["otsu_separation"]


def test_the_summary_says_where_outliers_appear_and_what_they_grow_on():
    found = summary(made_anatomy(), Detection(2, 5.0, 1.0))
    assert (found["appears_in_layer"], found["peak_layer"], found["layer"]) == (2, 2, 2)
    assert (found["n"], found["n_with_outliers"], found["outliers"]) == (2, 1, 1)
    assert found["outlier_fraction"] == pytest.approx(1 / 18, abs=1e-6)
    assert found["neighbour_cosine_difference"] == pytest.approx(0.4, abs=1e-6)
    assert found["outlier_information_rank"] == pytest.approx(0.95, abs=1e-6)
    assert found["outlier_on_border"] == 0 and found["border_patches"] == pytest.approx(8 / 9, abs=1e-6)


def test_without_outliers_what_needs_them_is_null_and_the_json_has_no_nan():
    made = made_anatomy()
    plain = Anatomy(made.norms[:, 1:], made.outliers[1:], made.neighbour_cosine[1:], made.information_rank[1:])
    found = summary(plain, None)
    json.dumps(found, allow_nan=False)
    assert found["outlier_fraction"] == 0 and found["layer"] == 2 and found["threshold"] is None
    for name in ("norm_ratio", "appears_in_layer", "peak_layer", "neighbour_cosine_outlier", "outlier_on_border"):
        assert found[name] is None, name
    json.dumps(norm_table(plain, None), allow_nan=False)


def test_outliers_that_registers_took_away_appear_nowhere():
    made = made_anatomy()
    found = summary(Anatomy(np.ones_like(made.norms) + made.norms * 1e-3, *list(vars(made).values())[1:]), None)
    assert found["n_with_outliers"] == 1 and found["norm_ratio"] < 1.1
    assert found["appears_in_layer"] is None and found["peak_layer"] is None


def test_the_table_of_positions_counts_images_by_place():
    rows = position_table(made_anatomy())
    assert len(rows) == 9 and rows[4] == {"row": 1, "column": 1, "share": 0.5}
    assert sum(row["share"] for row in rows) == 0.5


def test_means_over_chosen_patches_are_nan_where_none_is_chosen():
    values = np.array([[1.0, 3.0, 8.0], [1.0, 1.0, 1.0]])
    found = image_means(values, np.array([[True, True, False], [False] * 3]))
    assert found[0] == 2 and np.isnan(found[1])


def test_the_picture_has_the_same_bytes_each_time_with_and_without_outliers(tmp_path):
    made = made_anatomy()
    for name in ("a", "b"):
        draw_anatomy(tmp_path / f"{name}.png", made, Detection(2, 5.0, 1.0), "original")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plain = Anatomy(made.norms, np.zeros_like(made.outliers), made.neighbour_cosine, made.information_rank)
    draw_anatomy(tmp_path / "plain.png", plain, None, "intact")
    width, height = Image.open(tmp_path / "plain.png").size
    assert width > 3 * height


def test_a_run_opens_beside_its_backbone_at_the_size_asked_for(tmp_path):
    torch.manual_seed(0)
    args = {"num_classes": 0, "dynamic_img_size": True}
    save_backbone(
        tmp_path / "tiny", create("test_vit", args), name="tiny", architecture="test_vit", model_args=args,
        transform=Transform(160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), source="random weights", licence="MIT",
    )  # fmt: skip
    detection = {"threshold": 2.5, "layer": 3}
    for name, registers, count in (("plain", "none", 0), ("cured", "test_time", 1)):
        write_run(tmp_path / f"{name}.json", tmp_path / "tiny", Variant(registers, count), {1: (3,)}, detection)
    plain = open_subject(tmp_path / "plain.json", tmp_path, 96)
    assert plain.run is plain.untreated and not plain.treated
    cured = open_subject(tmp_path / "cured.json", tmp_path, 96)
    assert cured.treated and cured.detection.threshold == 2.5 and cured.detection.layer == 3
    assert cured.run.model.num_prefix_tokens == 2 and cured.untreated.model.num_prefix_tokens == 1
    assert cured.run.transform.size == cured.untreated.transform.size == 96
    assert cured.patch_size == 16
