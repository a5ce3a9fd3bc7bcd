import dataclasses

import numpy as np
import pytest
from dense_example import dense_set

from regvit.measures.anatomy import Anatomy, ashman_d, figures, image_columns, norm_table, position_table
from regvit.registers.outliers import Detection

DETECTION = Detection(2, 5.0, 1.0)


def made_anatomy(detection: Detection | None = DETECTION) -> Anatomy:
    """Two images of 3 x 3 patches in four blocks; the centre of the first grows ten times as large in block 2."""
    norms = np.ones((2, 4, 9), dtype=np.float32) + np.linspace(0, 0.1, 9, dtype=np.float32)
    outliers = np.zeros((2, 9), dtype=bool)
    outliers[0, 4] = detection is not None
    norms[0, 1:, 4] = 1.5, 10.0, 4.0
    cosine = np.full((2, 9), 0.5, dtype=np.float32)
    cosine[0, 4] = 0.9
    rank = np.full((2, 9), 0.5, dtype=np.float32)
    rank[0, 4] = 0.95
    return Anatomy(norms, outliers, cosine, rank, detection)


def values(anatomy: Anatomy) -> dict:
    return {one.metric: one.value for one in figures(anatomy, norm_table(anatomy))}


def test_the_anatomy_of_some_images_is_what_their_forward_left(tmp_path):
    rng = np.random.default_rng(0)
    neighbours = rng.uniform(size=(5, 2, 16)).round(1).astype(np.float16)  # many are equal
    arrays = {
        "norms": rng.uniform(size=(5, 3, 16)),
        "neighbours": neighbours,
        "outliers": rng.uniform(size=(5, 16)) > 0.8,
    }
    dense = dense_set(tmp_path / "set", arrays, detection={"layer": 1, "threshold": 9.0})
    found = Anatomy.of(dense, [1, 4])
    assert np.allclose(found.norms, arrays["norms"][[1, 4]], atol=1e-3) and found.detection.layer == 1
    assert np.array_equal(found.outliers, arrays["outliers"][[1, 4]]) and found.side == 4
    assert np.allclose(found.neighbours, neighbours[[1, 4], 0])
    for own, ranks in zip(neighbours[[1, 4], 1].astype(float), found.information_rank, strict=True):
        assert np.allclose(ranks, [((own < one).sum() + (own <= one).sum()) / 32 for one in own])  # equal ones half


def test_two_modes_are_found_where_there_are_two_and_not_where_there_is_one():
    rng = np.random.default_rng(0)
    sample = np.concatenate([rng.normal(1, 0.2, 9500), rng.normal(4, 0.4, 500)])
    assert ashman_d(sample) == pytest.approx(3 / np.sqrt((0.04 + 0.16) / 2), rel=0.08)
    assert ashman_d(rng.normal(size=5000)) < 2
    with pytest.raises(ValueError, match=r"3 value\(s\), all equal"):
        ashman_d(np.ones(3))


def test_the_table_of_norms_has_a_row_a_block_and_compares_medians():
    table = norm_table(made_anatomy())
    assert table["layer"].tolist() == [0, 1, 2, 3]
    normal = np.median(np.delete(made_anatomy().norms[:, 2].ravel(), 4))
    assert table["ratio"][2] == pytest.approx(10 / normal, rel=1e-5)
    assert table["over_threshold"].tolist() == pytest.approx([0, 0, 1 / 18, 0])
    assert table["otsu_separation"][2] > 0.98 > table["otsu_separation"][0]


def test_the_figures_say_where_outliers_appear_and_what_they_grow_on():
    found = values(made_anatomy())
    assert (found["appears_in_layer"], found["peak_layer"], found["layer"]) == (2, 2, 2)
    assert found["images_with_outliers"] == 1
    assert found["outlier_fraction"] == found["untreated_outlier_fraction"] == pytest.approx(1 / 18)
    assert found["neighbour_similarity_difference"] == pytest.approx(0.4)
    assert found["outlier_information_rank"] == pytest.approx(0.95)
    assert found["outlier_on_low_information"] == 1
    assert found["outlier_on_border"] == 0 and found["border_patches"] == pytest.approx(8 / 9)


def test_without_outliers_what_needs_them_has_no_value():
    found = values(made_anatomy(None))
    assert found["outlier_fraction"] == 0 and found["layer"] == 2 and found["threshold"] is None
    for name in ("appears_in_layer", "peak_layer", "neighbour_similarity_outlier", "outlier_on_border"):
        assert found[name] is None, name
    assert np.isnan(found["norm_ratio"])


@pytest.mark.filterwarnings("error")
def test_where_every_patch_is_an_outlier_there_is_no_other_to_compare_with():
    made = made_anatomy()
    everywhere = dataclasses.replace(made, outliers=np.ones_like(made.outliers))
    assert np.isnan(norm_table(everywhere)["ratio"]).all() and values(everywhere)["outlier_on_border"] is not None


def test_outliers_that_registers_took_away_are_counted_in_the_untreated_model_alone():
    made = made_anatomy()
    cured = Anatomy(np.ones_like(made.norms) + made.norms * 1e-3, *list(vars(made).values())[1:])
    found = values(cured)
    assert found["images_with_outliers"] == 1 and found["norm_ratio"] < 1.1
    assert found["outlier_fraction"] == 0 and found["untreated_outlier_fraction"] == pytest.approx(1 / 18)
    assert found["appears_in_layer"] is None and found["peak_layer"] is None
    assert np.isnan(image_columns(cured)["neighbour_similarity_outlier"][1])


def test_the_table_of_positions_counts_images_by_place():
    table = position_table(made_anatomy())
    assert len(table) == 9 and table.iloc[4].tolist() == [1, 1, 0.5] and table["share"].sum() == 0.5
