import inspect
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from regvit.measures import gallery
from regvit.measures.feature_colours import fit_palette
from regvit.measures.gallery import (
    Maps,
    attention_colours,
    draw_attention,
    draw_heads,
    draw_maps,
    draw_sheet,
    norm_colours,
    normal_range,
    tile_colours,
)

CYAN = np.array([0, 200, 224]) / 255
MAGMA = matplotlib.colormaps["magma"]
BRIGHT = matplotlib.colormaps["viridis"](1.0)[:3]


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


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """What `draw_sheet` is given, by the name of its argument."""
    given, names = {}, inspect.signature(draw_sheet)
    monkeypatch.setattr(gallery, "draw_sheet", lambda *a, **b: given.update(names.bind(*a, **b).arguments))
    return given


def test_under_each_map_stands_its_scale_and_the_attention_on_outliers(drawn):
    features = np.zeros((1, 2, 2, 3))
    intact = Maps(np.array([[[2.0, 2.0], [3.0, 3.0]]]), np.array([[[0.1, 0.1], [0.4, 0.0]]]), features)
    original = Maps(np.array([[[90.0, 2.0], [3.0, 3.0]]]), np.array([[[0.5, 0.1], [0.1, 0.0]]]), features)
    draw_maps(Path("a.png"), np.zeros((1, 8, 8, 3)), {"intact": intact, "original": original}, 20.0)
    assert drawn["notes"] == [
        ["", "2 to 3+", "2 to 3+, 1 outlier", "0 to 40.0%, 10% on outliers", "0 to 50.0%, 50% on outliers"]
    ]
    tiles = drawn["rows"][0]
    assert np.allclose(tiles[2][0, 0], CYAN)
    assert np.allclose([tiles[3][1, 0], tiles[4][0, 0]], BRIGHT)  # each to its own maximum
    assert "cyan: outliers, norm over 20" in drawn["below"]


def test_models_share_one_scale_on_which_outliers_do_not_count():
    features, norms = np.zeros((1, 1, 2, 3)), np.array([[[1.0, 50.0]]])
    before = Maps(norms, np.array([[[0.1, 0.9]]]), features)
    after = Maps(np.ones((1, 1, 2)), np.array([[[0.2, 0.0]]]), features)
    palette = fit_palette(features.reshape(-1, 3))
    drawn = tile_colours({"a": before, "b": after}, palette, norms > 20, 20.0)
    assert np.allclose(drawn["attention", "b"][0, 0, 0], BRIGHT)  # 0.2 is the most of what is no outlier
    assert np.allclose(drawn["attention", "a"][0, 0, 1], BRIGHT)  # the outlier is beyond the end
    assert np.allclose(drawn["attention", "a"][0, 0, 0], matplotlib.colormaps["viridis"](0.5)[:3], atol=0.01)
    assert np.array_equal(drawn["norms", "a"][0, 0, 0], drawn["norms", "b"][0, 0, 0])


def test_attention_is_drawn_with_a_column_a_map_each_to_its_own_maximum(drawn):
    images, maps = np.zeros((2, 8, 8, 3)), np.array([[[0.1, 0.2]], [[0.8, 0.4]]])
    draw_attention(Path("a.png"), images, {"cls": maps, "register_0": maps[::-1]})
    assert drawn["titles"] == ["image", "cls", "register_0"]
    (_, first, last), (_, second, _) = drawn["rows"]
    assert np.allclose([first[0, 1], second[0, 0], last[0, 0]], BRIGHT)


def test_each_head_has_a_column_and_each_query_of_an_image_a_row_with_the_image_beside_it(drawn):
    maps = {name: np.random.default_rng(i).random((2, 3, 4, 4)) for i, name in enumerate(("cls", "register_0"))}
    draw_heads(Path("a.png"), np.stack([np.zeros((8, 8, 3)), np.ones((8, 8, 3))]), maps)
    assert drawn["titles"] == ["image", "0", "1", "2"]
    assert drawn["names"] == 2 * ["cls", "register_0"]
    assert [tiles[0].max() for tiles in drawn["rows"]] == [0, 0, 1, 1]
    one = maps["register_0"][1, 1]
    assert np.array_equal(drawn["rows"][3][2], attention_colours(one, one.max()))


def test_a_sheet_has_the_same_bytes_each_time_and_columns_as_wide_as_what_is_written(tmp_path):
    black, white = np.zeros((2, 2, 3)), np.ones((1, 1, 3))
    for name, title in (("a.png", "c"), ("b.png", "c"), ("wide.png", "a title that is longer than its tile")):
        draw_sheet(tmp_path / name, ["image", title], [[white, black], [black, white]], 20, [["", "x"]] * 2, ["y", "z"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    narrow, wide = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "wide.png"))
    assert wide.shape[1] > narrow.shape[1] and wide.shape[0] == narrow.shape[0]
    for pixels in (narrow, wide):
        assert (pixels[:, [0, -1]] == 255).all() and (pixels[[0, -1]] == 255).all()  # nothing is cut
        dark = (pixels == 0).all(2)
        places = [(y, x) for y, x in np.argwhere(dark) if dark[y : y + 20, x : x + 20].sum() == 400]
        assert len(places) == 2 and places[0][0] < places[1][0] and places[0][1] > places[1][1]
