import csv

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy as scipy_entropy
from scipy.stats import pearsonr
from sklearn.metrics import roc_auc_score

from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.transform import Transform
from regvit.measures.anatomy import Subject
from regvit.measures.attention_quality import (
    METRICS,
    AttentionQuality,
    Measured,
    distance_correlation,
    entropy,
    later_blocks,
    measure_attention,
    morans_i,
    object_auroc,
    object_iou,
    object_shares,
    qualities,
    summary,
    write_tables,
)
from regvit.models.attention import prefix_attention
from regvit.models.backbones import Backbone
from regvit.models.tokens import TokenLayout
from regvit.registers.outliers import Detection, patch_norms
from regvit.registers.test_time import add_test_time_registers


def random_maps(*shape: int, seed: int = 0) -> torch.Tensor:
    maps = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return maps / maps.sum(-1, keepdim=True)


def wrapped(model: torch.nn.Module) -> Backbone:
    return Backbone("tiny", model, Transform(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "0" * 64, None, {})


def test_entropy_of_an_even_map_is_the_logarithm_of_its_patches_and_of_a_single_peak_zero():
    assert entropy(torch.full((16,), 1 / 16, dtype=torch.float64)).item() == pytest.approx(np.log(16))
    assert entropy(torch.eye(16)[3]).item() == 0
    maps = random_maps(3, 25)
    assert np.allclose(entropy(maps), scipy_entropy(maps.numpy(), axis=1))


def test_morans_i_is_that_of_its_definition():
    side, maps = 5, random_maps(2, 25)
    for values, found in zip(maps.numpy(), morans_i(maps), strict=True):
        x, pairs, weights = values - values.mean(), 0.0, 0
        for i in range(25):
            for j in range(25):
                near = abs(i // side - j // side) + abs(i % side - j % side) == 1
                pairs, weights = pairs + near * x[i] * x[j], weights + near
        assert found.item() == pytest.approx(25 / weights * pairs / (x**2).sum())


def test_morans_i_is_minus_one_on_a_chessboard_and_near_one_on_a_slope():
    i, j = np.divmod(np.arange(256), 16)
    assert morans_i(torch.from_numpy(1.0 * ((i + j) % 2))).item() == pytest.approx(-1)
    assert morans_i(torch.from_numpy(1.0 * (i + j))).item() > 0.9
    assert morans_i(torch.full((16,), 1 / 16)).isnan()


def test_distance_correlation_is_pearsons_over_all_patches_but_the_peak():
    maps = random_maps(3, 2, 36)
    found = distance_correlation(maps)
    for place in np.ndindex(3, 2):
        values = maps[place].numpy()
        peak = values.argmax()
        others = np.arange(36) != peak
        i, j = np.divmod(np.arange(36), 6)
        distance = np.hypot(i - i[peak], j - j[peak])
        assert found[place].item() == pytest.approx(pearsonr(values[others], distance[others])[0])


def test_attention_that_falls_off_in_a_straight_line_correlates_perfectly_with_distance():
    i, j = np.divmod(np.arange(49), 7)
    cone = torch.from_numpy(10 - np.hypot(i - 2, j - 5))
    assert distance_correlation(cone).item() == pytest.approx(-1)


def test_object_auroc_is_that_of_the_pixels_with_ties_counted_half():
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 4, size=(5, 16)) / 10  # many ties
    covered = rng.integers(0, 5, size=(5, 16))  # of four pixels a patch
    found = object_auroc(torch.from_numpy(maps), torch.from_numpy(covered / 4))
    for values, pixels, one in zip(maps, covered, found, strict=True):
        truth = (np.arange(4) < pixels[:, None]).ravel()
        assert one.item() == pytest.approx(roc_auc_score(truth, values.repeat(4)))


def test_object_iou_takes_the_smallest_set_of_patches_that_holds_sixty_percent():
    attention = torch.tensor([0.35, 0.05, 0.3, 0.3], dtype=torch.float64)  # 0.35 + 0.3 is enough
    objects = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    assert object_iou(attention, objects).item() == pytest.approx(1.5 / 2)
    assert object_iou(attention, 1 - objects).item() == pytest.approx(0.5 / (2 + 2.5 - 0.5))


def test_shares_of_attention_are_those_of_the_whole_row_and_maps_those_of_the_patches():
    layout = TokenLayout(1, 0, 1)
    row = torch.tensor([0.2, 0.3, 0.1, 0.1, 0.05, 0.25])  # CLS, register, four patches
    outliers = torch.tensor([[False, False, False, True]])
    objects = torch.tensor([[1.0, 0.5, 0.0, 0.0]])
    found = {
        name: values.item()
        for name, values in qualities(row[None, None, None, None], layout, outliers, objects).items()
    }
    assert found["on_cls"] == pytest.approx(0.2) and found["on_registers"] == pytest.approx(0.3)
    assert found["on_patches"] == pytest.approx(0.5) and found["on_outliers"] == pytest.approx(0.25)
    assert found["largest"] == pytest.approx(0.5)
    assert found["object_mass"] == pytest.approx(0.2 + 0.5 * 0.2)
    assert found["object_lift"] == pytest.approx(0.3 / 0.375)
    assert found["entropy_share"] == pytest.approx(found["entropy"] / np.log(4))


def test_what_an_image_lacks_is_nan_and_nothing_else_is():
    layout, outliers = TokenLayout(1, 0), torch.zeros(2, 16, dtype=torch.bool)
    outliers[1, 3] = True
    objects = torch.full((2, 16), torch.nan)
    objects[0] = 0
    objects[0, 2] = 1
    found = qualities(random_maps(2, 1, 1, 1, 17), layout, outliers, objects)
    undefined = {name: values[:, 0, 0, 0].isnan().tolist() for name, values in found.items()}
    assert undefined.pop("on_outliers") == [True, False]
    assert undefined.pop("on_registers") == [True, True]
    assert all(undefined.pop(name) == [False, True] for name in METRICS if name.startswith("object"))
    assert not np.array(list(undefined.values())).any()


def test_a_mask_without_objects_has_no_auroc():
    found = qualities(random_maps(1, 1, 1, 1, 17), TokenLayout(1, 0), torch.zeros(1, 16).bool(), torch.zeros(1, 16))
    assert found["object_auroc"].isnan().all() and found["object_lift"].isnan().all()


def test_outliers_are_those_of_the_untreated_model_before_and_after_registers(tiny_vit, noise_images):
    plain, treated, images = tiny_vit(), tiny_vit(), noise_images(5)
    add_test_time_registers(treated, {2: (3, 9)}, 1)
    norms = patch_norms(plain, [images], [3])[0]
    detection = Detection(3, float(np.quantile(norms, 0.9)), 0.0)
    found = measure_attention(Subject(wrapped(treated), wrapped(plain), detection), images.split(2), [3, 4, 5])
    expected = norms > detection.threshold
    assert np.array_equal(found.run.outliers, expected) and np.array_equal(found.untreated.outliers, expected)
    assert found.run.queries == ("cls", "register_0") and found.untreated.queries == ("cls",)
    weights = prefix_attention(plain, images)[:, :, :, 0, 1:].permute(1, 0, 2, 3).double().numpy()  # (b, l, h, p)
    on_outliers = (weights * expected[:, None, None]).sum(-1)
    on_outliers[~expected.any(1)] = np.nan
    assert np.allclose(found.untreated.heads["on_outliers"][..., 0], on_outliers, atol=1e-6, equal_nan=True)
    assert np.allclose(found.untreated.maps["on_outliers"][:, 0], on_outliers[:, 3:].mean((1, 2)), equal_nan=True)
    metrics = summary(found)
    change = metrics["heads"]["morans_i"] - metrics["untreated"]["heads"]["morans_i"]
    assert metrics["change"]["heads"]["morans_i"] == pytest.approx(change, abs=2e-6)


def test_a_run_that_changes_nothing_has_no_model_before(tiny_vit, noise_images):
    backbone = wrapped(tiny_vit())
    found = measure_attention(Subject(backbone, backbone, None), [noise_images(2)], [5])
    assert found.untreated is None and not found.run.outliers.any()
    metrics = summary(found)
    assert metrics["heads"]["on_outliers"] is None and metrics["heads"]["entropy"] > 0
    assert metrics["n"] == 2 and metrics["n_with_outliers"] == 0 and "change" not in metrics


def read(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


IMAGES = [f"image {i}" for i in range(4)]


def made_quality() -> AttentionQuality:
    heads = {name: np.full((4, 3, 2, 2), 9.0) for name in METRICS}
    heads["entropy"][:, 1:, :, 0] = np.array([1.0, 2.0, 3.0, 4.0])[:, None, None]
    heads["entropy"][:, 1, 0, 0] -= 0.5
    heads["on_outliers"][:] = np.nan
    maps = {name: np.full((4, 2), 7.0) for name in METRICS}
    return AttentionQuality(("cls", "register_0"), (1, 2), heads, maps, np.zeros((4, 9), dtype=bool))


def test_the_summary_is_over_later_blocks_and_heads_of_the_first_query_and_its_interval_over_images():
    metrics = summary(Measured(made_quality(), None))
    assert metrics["heads"]["entropy"] == pytest.approx(2.5 - 0.5 / 4)
    assert metrics["heads"]["entropy_lo"] < 2.0 and metrics["heads"]["entropy_hi"] > 2.8  # images differ, blocks hardly
    assert metrics["heads"]["largest_lo"] == metrics["heads"]["largest_hi"] == 9
    assert metrics["map"]["largest"] == 7 and metrics["query"] == "cls" and metrics["later_blocks"] == [1, 2]


def test_tables_have_a_row_a_block_and_head_with_empty_cells_for_what_is_not_defined(tmp_path):
    write_tables(tmp_path, made_quality(), IMAGES)
    rows = read(tmp_path / "heads.csv")
    assert [(row["layer"], row["head"]) for row in rows[:3]] == [("0", "0"), ("0", "1"), ("1", "0")]
    assert len(rows) == 3 * 2
    assert float(rows[2]["entropy"]) == 2.0 and float(rows[2]["entropy_lo"]) < 2 < float(rows[2]["entropy_hi"])
    assert {row["on_outliers"] + row["on_outliers_lo"] for row in rows} == {""}
    by_layer = read(tmp_path / "layers.csv")
    assert len(by_layer) == 3 and "head" not in by_layer[0]
    assert float(by_layer[1]["entropy"]) == 2.25  # mean of 2.0 and 2.5
    registers = read(tmp_path / "registers.csv")
    assert len(registers) == 3 * 2 and {row["query"] for row in registers} == {"register_0"}


def test_the_table_of_images_has_what_the_summary_is_the_mean_of(tmp_path):
    quality = made_quality()
    quality.heads["on_outliers"][:2] = 0.25
    write_tables(tmp_path, quality, IMAGES)
    rows, metrics = read(tmp_path / "images.csv"), summary(Measured(quality, None))
    assert [row["image_id"] for row in rows] == IMAGES
    assert [row["on_outliers"] for row in rows] == ["0.25", "0.25", "", ""]
    assert np.mean([float(row["entropy"]) for row in rows]) == pytest.approx(metrics["heads"]["entropy"], rel=1e-5)


def test_intervals_of_the_tables_leave_out_images_without_a_value(tmp_path):
    quality = made_quality()
    quality.heads["on_outliers"][:2] = 0.25
    write_tables(tmp_path, quality, IMAGES)
    row = read(tmp_path / "heads.csv")[0]
    assert [float(row[f"on_outliers{end}"]) for end in ("", "_lo", "_hi")] == [0.25] * 3


def test_without_a_quality_the_tables_have_headers_only(tmp_path):
    write_tables(tmp_path, None, IMAGES)
    assert (tmp_path / "heads.csv").read_text().startswith("layer,head,entropy,entropy_lo,entropy_hi,")
    assert len((tmp_path / "layers.csv").read_text().splitlines()) == 1


def test_object_shares_follow_the_geometry_of_the_transform(tmp_path):
    mask = np.zeros((8, 12), dtype=np.uint8)
    mask[0:4, 2:6] = 3  # the centre crop takes columns 2 to 9: the upper left quarter of it
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.zeros((8, 12, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    rows = [Row("a", "image.png", "", "test", mask="mask.png"), Row("b", "image.png", "", "test")]
    write_dataset(tmp_path, "made", rows, [], {})
    transform = Transform(16, (0, 0, 0), (1, 1, 1))
    shares = object_shares(read_dataset(tmp_path), transform, 8)
    assert shares[0].tolist() == [1, 0, 0, 0]
    assert np.isnan(shares[1]).all()
    with pytest.raises(ValueError, match="images of 16 px do not divide into patches of 5 px"):
        object_shares(read_dataset(tmp_path), transform, 5)


def test_a_set_without_masks_has_no_object_shares(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    write_dataset(tmp_path, "made", [Row("a", "image.png", "", "test")], [], {})
    assert object_shares(read_dataset(tmp_path), Transform(16, (0, 0, 0), (1, 1, 1)), 8) is None


def test_later_blocks_are_the_second_half_or_begin_where_told():
    assert (
        later_blocks(12) == [6, 7, 8, 9, 10, 11] and later_blocks(5) == [2, 3, 4] and later_blocks(12, 10) == [10, 11]
    )
    with pytest.raises(ValueError, match=r"first layer 12 is out of range: the model has 12 blocks \(0 to 11\)"):
        later_blocks(12, 12)
    with pytest.raises(ValueError, match="no images to measure attention on"):
        measure_attention(Subject(wrapped(torch.nn.Linear(1, 1)), None, None), [], [1])
