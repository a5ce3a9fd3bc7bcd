"""Sliders are cut out of strips; what is shown is what was drawn."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from test_report import check_page

from regvit.report.page import Section, page
from regvit.report.sliders import Comparison, Side, shrunk, sliders, tiles


def strip(path, patches: np.ndarray, enlarged: int = 5):
    """A strip of maps, tile after tile."""
    row = np.concatenate(list(patches), axis=1).astype(np.uint8)
    Image.fromarray(row.repeat(enlarged, 0).repeat(enlarged, 1)).save(path)
    return path


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    """Two images with 3 x 3 patches; the second model has no attention."""
    rng = np.random.default_rng(0)
    made = {name: rng.integers(0, 255, (2, 3, 3, 3)) for name in ("norms", "attention", "features")}
    paths = {name: strip(tmp_path / f"{name}.png", patches) for name, patches in made.items()}
    images = strip(tmp_path / "images.png", rng.integers(0, 255, (2, 3, 3, 3)))
    after = {name: path for name, path in paths.items() if name != "attention"}
    return Comparison(images, Side("<a>", paths), Side("b", after))


def test_a_strip_is_cut_into_squares(tmp_path):
    path = strip(tmp_path / "a.png", np.stack([np.full((2, 2, 3), 10), np.full((2, 2, 3), 200)]))
    assert [np.asarray(tile).mean() for tile in tiles(path)] == [10, 200]


def test_a_picture_that_is_no_row_of_squares_is_refused(tmp_path):
    Image.new("RGB", (25, 10)).save(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match=r"a\.png is 25 pixels wide and 10 high: no row of squares; run `dvc repro verify`"
    ):
        tiles(tmp_path / "a.png")


def test_a_map_is_kept_with_one_pixel_a_patch(tmp_path):
    patches = np.random.default_rng(0).integers(0, 255, (1, 4, 4, 3))
    (tile,) = tiles(strip(tmp_path / "a.png", patches, enlarged=7))
    assert np.array_equal(np.asarray(shrunk(tile)), patches[0])


def test_a_map_of_one_colour_is_one_pixel():
    assert shrunk(Image.new("RGB", (12, 12), "red")).size == (1, 1)


def test_only_what_both_sides_have_is_compared_and_drawn_as_it_was(comparison):
    html = sliders("key", [comparison])
    assert comparison.name == "<a> → b" and comparison.what == ["norms", "features"]
    assert "CLS attention" not in html
    assert html.count('class="wipe"') == 4  # two maps of two images
    first = re.search(r'class="wipe"><img src="data:image/png;base64,([^"]+)"', html)[1]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))).convert("RGB"))
    assert np.array_equal(drawn, np.asarray(tiles(comparison.before.strips["norms"])[0])[::5, ::5])


def test_each_image_says_what_it_shows_and_names_are_escaped(comparison):
    html = sliders("key", [comparison])
    assert 'alt="patch norms of image 2, &lt;a&gt;"' in html
    assert 'aria-label="how far &lt;a&gt; covers b"' in html
    check_page(page("t", "", [Section("s", html)]))


def test_without_another_side_there_is_no_slider(comparison):
    html = sliders("key", [Comparison(comparison.images, None, comparison.after)])
    assert 'type="range"' not in html and 'class="wipe"' not in html
    assert html.count("<img") == 2 * 3


def test_many_comparisons_share_the_room_of_the_photographs(comparison, monkeypatch):
    asked = []
    monkeypatch.setattr("regvit.report.sliders.encode", lambda image, limit: asked.append(limit) or b"")
    sliders("key", [comparison])
    assert asked == [9_000] * 2
    asked.clear()
    sliders("key", [comparison] * 20)
    assert asked == [5_000] * 40
