import numpy as np
import pandas as pd
import pytest
import torch
from dense_example import dense_set
from PIL import Image
from scipy.stats import entropy as scipy_entropy
from scipy.stats import pearsonr
from sklearn.metrics import roc_auc_score

from regvit.data.manifest import Row
from regvit.measures.attention_quality import (
    METRICS,
    AttentionQuality,
    attention_maps,
    distance_correlation,
    entropy,
    figures,
    image_columns,
    later_blocks,
    measure_attention,
    morans_i,
    object_auroc,
    object_shares,
    qualities,
    register_overlap,
    write_tables,
)
from regvit.models.tokens import TokenLayout


def random_maps(*shape: int, seed: int = 0) -> torch.Tensor:
    maps = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return maps / maps.sum(-1, keepdim=True)


def test_entropy_is_scipys():
    maps = torch.cat([random_maps(3, 25), torch.eye(25)[3:4].double()])
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


def test_object_auroc_is_that_of_the_pixels_with_ties_counted_half():
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 4, size=(5, 16)) / 10  # many ties
    covered = rng.integers(0, 5, size=(5, 16))  # of four pixels a patch
    found = object_auroc(torch.from_numpy(maps), torch.from_numpy(covered / 4))
    for values, pixels, one in zip(maps, covered, found, strict=True):
        truth = (np.arange(4) < pixels[:, None]).ravel()
        assert one.item() == pytest.approx(roc_auc_score(truth, values.repeat(4)))


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


def test_registers_overlap_by_what_their_maps_share():
    maps = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    assert register_overlap(maps).item() == pytest.approx((0.5 + 0 + 0) / 3) and register_overlap(maps[:1]).isnan()
    attention = torch.cat([torch.full((3, 1), 0.25, dtype=torch.float64), torch.zeros(3, 3), 0.75 * maps], 1)
    rows = torch.cat([attention[:1], attention])[None, None, None]  # CLS, three registers; over 1 + 3 + 4 tokens
    found = qualities(rows, TokenLayout(1, 3), torch.zeros(1, 4, dtype=torch.bool), None)["register_overlap"]
    assert found.shape == (1, 1, 1, 4) and found.flatten().tolist() == pytest.approx([1 / 6] * 4)


def test_what_an_image_lacks_is_nan_and_nothing_else_is():
    layout, outliers = TokenLayout(1, 0), torch.zeros(2, 16, dtype=torch.bool)
    outliers[1, 3] = True
    objects = torch.full((2, 16), torch.nan)
    objects[0] = 0
    objects[0, 2] = 1
    found = qualities(random_maps(2, 1, 1, 1, 17), layout, outliers, objects)
    undefined = {name: values[:, 0, 0, 0].isnan().tolist() for name, values in found.items()}
    assert undefined.pop("on_outliers") == [True, False]
    assert undefined.pop("on_registers") == undefined.pop("register_overlap") == [True, True]
    assert all(undefined.pop(name) == [False, True] for name in METRICS if name.startswith("object"))
    assert not np.array(list(undefined.values())).any()
    nothing = qualities(random_maps(1, 1, 1, 1, 17), layout, outliers[:1], torch.zeros(1, 16))
    assert nothing["object_auroc"].isnan().all()


def test_attention_is_measured_image_by_image_in_the_places_of_the_untreated_models_outliers(tmp_path):
    attention, outliers = random_maps(6, 4, 2, 2, 18).numpy(), np.zeros((6, 16), dtype=bool)
    outliers[[1, 4], 3] = outliers[4, 9] = True
    over_all = np.arange(6 * 4 * 2 * 3).reshape(6, 4, 2, 3) / 100
    dense = dense_set(tmp_path / "set", {"attention": attention, "outliers": outliers, "all_queries": over_all})
    found = measure_attention(dense, [1, 2, 4], [2, 3])
    assert found.queries == ("cls", "register_0") and found.outliers.sum(1).tolist() == [1, 0, 2]
    on_outliers = (attention[[1, 4]][..., 2:] * outliers[[1, 4], None, None, None]).sum(-1)  # (b, l, h, q)
    assert np.allclose(found.heads["on_outliers"][[0, 2]], on_outliers, atol=1e-3)
    assert np.isnan(found.heads["on_outliers"][1]).all() and np.isnan(found.heads["object_auroc"]).all()
    columns = image_columns(found)
    assert np.allclose(columns["on_registers"], attention[[1, 2, 4]][:, 2:, :, 0, 1].mean((1, 2)), atol=1e-3)
    assert np.allclose(columns["all_largest"], over_all[[1, 2, 4]][:, 2:, :, 1].mean((1, 2)), atol=1e-2)
    one = image_columns(measure_attention(dense, [1, 2, 4], [0, 3], [1]))
    assert np.allclose(one["on_registers"], attention[[1, 2, 4]][:, [0, 3], 1, 0, 1].mean(1), atol=1e-3)
    assert np.allclose(one["all_entropy"], over_all[[1, 2, 4]][:, [0, 3], 1, 0].mean(1), atol=1e-2)
    with pytest.raises(ValueError, match=r"attention\.heads has 2, but the model has 2 heads \(0 to 1\)"):
        measure_attention(dense, [1], [2], [2])
    maps = attention_maps(dense, [2], [2, 3])
    assert np.allclose(maps["register_0"][0].ravel(), attention[2, 2:, :, 1, 2:].mean((0, 1)), atol=1e-3)


def made_quality() -> AttentionQuality:
    heads = {name: np.full((4, 3, 2, 2), 9.0) for name in METRICS}
    heads["entropy"][:, 1:, :, 0] = np.array([1.0, 2.0, 3.0, 4.0])[:, None, None]
    heads["entropy"][:, 1, 0, 0] -= 0.5
    heads["on_outliers"][:] = np.nan
    heads["on_outliers"][:2, 0] = 0.25
    over_all = {"all_coherence": np.full((4, 3, 2), -0.5)}
    return AttentionQuality(("cls", "register_0"), (1, 2), heads, np.zeros((4, 9), dtype=bool), over_all)


def test_figures_are_over_later_blocks_and_heads_of_the_first_query_and_their_intervals_over_images():
    found = {one.metric: one for one in figures(made_quality())}
    one = found["entropy"]
    assert one.value == pytest.approx(2.5 - 0.5 / 4) == image_columns(made_quality())["entropy"].mean()
    assert one.lo < 2.0 and one.hi > 2.8 and one.n == 4  # images differ, blocks hardly
    assert found["on_outliers"].value is None and found["images_with_outliers"].value == 0


def test_tables_have_a_row_a_query_block_and_head_with_empty_cells_for_what_is_not_defined(tmp_path):
    write_tables(tmp_path, made_quality())
    heads, layers = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("heads", "layers"))
    assert len(heads) == 2 * 3 * 2 and heads["query"].tolist() == ["cls"] * 6 + ["register_0"] * 6
    assert heads[["layer", "head"]].values[:3].tolist() == [[0, 0], [0, 1], [1, 0]]
    assert heads["entropy"][2] == 2.0 and heads["entropy_lo"][2] < 2 < heads["entropy_hi"][2]
    assert heads.loc[0, ["on_outliers", "on_outliers_lo", "on_outliers_hi"]].tolist() == [0.25] * 3  # of two images
    assert np.isnan(heads["on_outliers"][2])
    over_all = pd.read_csv(tmp_path / "all_queries.csv")
    assert len(over_all) == 3 * 2 and over_all["all_coherence_hi"].eq(-0.5).all()
    assert len(layers) == 3 and "head" not in layers and layers["entropy"][1] == 2.25  # mean of 2.0 and 2.5


def test_object_shares_are_of_the_whole_squashed_image(tmp_path):
    mask = np.zeros((8, 16), dtype=np.uint8)
    mask[0:4, 0:8], mask[4:] = 3, 255  # the upper left quarter; below nothing is known
    (tmp_path / "set").mkdir()
    Image.fromarray(mask).save(tmp_path / "set/mask.png")
    rows = [Row("a", "a.png", "", "test", mask="mask.png"), Row("b", "b.png", "", "test")]
    dense = dense_set(tmp_path / "set", {"cls": np.zeros((2, 1))}, rows, sizes=[(16, 8), (16, 8)], side=2)
    shares = object_shares(dense, [0, 1])
    assert shares[0].tolist() == [1, 0, 0, 0] and np.isnan(shares[1]).all()
    assert object_shares(dense, [1]) is None


def test_later_blocks_are_the_second_half_or_begin_where_told():
    assert (
        later_blocks(12) == [6, 7, 8, 9, 10, 11] and later_blocks(5) == [2, 3, 4] and later_blocks(12, 10) == [10, 11]
    )
    assert later_blocks(12, layers=(11,)) == [11]
    with pytest.raises(ValueError, match=r"attention\.layers has 12, but the model has 12 blocks \(0 to 11\)"):
        later_blocks(12, layers=(3, 12))
    with pytest.raises(ValueError, match=r"first layer 12 is out of range: the model has 12 blocks \(0 to 11\)"):
        later_blocks(12, 12)
