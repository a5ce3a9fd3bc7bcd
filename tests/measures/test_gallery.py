import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from regvit.measures import gallery
from regvit.measures.feature_colours import fit_palette
from regvit.measures.gallery import Maps, draw_heads, draw_maps, norm_colours, normal_range, tile_colours

CYAN = np.array([0, 200, 224]) / 255
MAGMA = matplotlib.colormaps["magma"]


def test_norms_are_drawn_by_their_logarithm_and_outliers_in_a_colour_of_their_own():
    drawn = norm_colours(np.array([[[1.0, 10.0], [100.0, 5000.0]]]), 1.0, 100.0, 1000.0)
    assert np.allclose(drawn[0, 0, 0], MAGMA(0.0)[:3])
    assert np.allclose(drawn[0, 0, 1], MAGMA(0.5)[:3])
    assert np.allclose(drawn[0, 1, 0], MAGMA(1.0)[:3])
    assert np.allclose(drawn[0, 1, 1], CYAN)


def test_the_scale_of_norms_is_that_of_the_patches_that_are_no_outliers():
    maps = [np.linspace(2, 3, 101), np.array([500.0, 900.0])]
    assert normal_range(maps, 20.0) == pytest.approx((2.0, 2.99))
    assert normal_range([np.array([500.0])], 20.0) == (20.0, 20.0)
    assert np.allclose(norm_colours(np.array([[20.0, 500.0]]), 20.0, 20.0, 20.0), [[MAGMA(0.0)[:3], CYAN]])


def test_under_each_map_stands_its_scale_and_the_attention_on_outliers(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(gallery, "Figure", lambda **options: figures.append(Figure(**options)) or figures[0])
    features = np.zeros((1, 2, 2, 3))
    intact = Maps(np.array([[[2.0, 2.0], [3.0, 3.0]]]), np.array([[[0.1, 0.1], [0.4, 0.0]]]), features)
    original = Maps(np.array([[[90.0, 2.0], [3.0, 3.0]]]), np.array([[[0.5, 0.1], [0.1, 0.0]]]), features)
    draw_maps(tmp_path / "a.png", np.zeros((1, 8, 8, 3)), {"intact": intact, "original": original}, 20.0)
    notes = [axes.get_xlabel() for axes in figures[0].axes]
    assert notes == ["", "2 to 3+", "2 to 3+, 1 outlier", "0 to 40.0%, 10% on outliers", "0 to 50.0%, 50% on outliers"]
    assert np.allclose(figures[0].axes[2].images[0].get_array()[0, 0], CYAN)
    assert [axes.images[0].get_clim()[1] for axes in figures[0].axes[3:]] == [0.4, 0.5]  # each to its own maximum
    assert "cyan: outliers, norm over 20" in figures[0].texts[0].get_text().replace("\n", " ")


def test_models_share_one_scale_on_which_outliers_do_not_count():
    features, norms = np.zeros((1, 1, 2, 3)), np.array([[[1.0, 50.0]]])
    before = Maps(norms, np.array([[[0.1, 0.9]]]), features)
    after = Maps(np.ones((1, 1, 2)), np.array([[[0.2, 0.0]]]), features)
    palette = fit_palette(features.reshape(-1, 3))
    drawn = tile_colours({"a": before, "b": after}, palette, norms > 20, 20.0)
    bright = matplotlib.colormaps["viridis"](1.0)[:3]
    assert np.allclose(drawn["attention", "b"][0, 0, 0], bright)  # 0.2 is the most of what is no outlier
    assert np.allclose(drawn["attention", "a"][0, 0, 1], bright)  # the outlier is beyond the end
    assert np.allclose(drawn["attention", "a"][0, 0, 0], matplotlib.colormaps["viridis"](0.5)[:3], atol=0.01)
    assert np.array_equal(drawn["norms", "a"][0, 0, 0], drawn["norms", "b"][0, 0, 0])


def test_each_head_has_a_column_and_each_query_of_an_image_a_row_with_the_image_beside_it(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(gallery, "Figure", lambda **options: figures.append(Figure(**options)) or figures[0])
    maps = {name: np.random.default_rng(i).random((2, 3, 4, 4)) for i, name in enumerate(("cls", "register_0"))}
    draw_heads(tmp_path / "a.png", np.stack([np.zeros((8, 8, 3)), np.ones((8, 8, 3))]), maps)
    grid = np.array(figures[0].axes).reshape(4, 4)  # two images, two queries; the image, three heads
    assert [axis.get_title() for axis in grid[0]] == ["image", "0", "1", "2"]
    assert [line[0].texts[0].get_text() for line in grid] == 2 * ["cls", "register_0"]
    assert [line[0].images[0].get_array().max() for line in grid] == [0, 0, 1, 1]
    assert np.array_equal(grid[3, 2].images[0].get_array(), maps["register_0"][1, 1])
    assert grid[3, 2].images[0].get_clim() == (0, maps["register_0"][1, 1].max())
    assert Image.open(tmp_path / "a.png").size[0] < 400
