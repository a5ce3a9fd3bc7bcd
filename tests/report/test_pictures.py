"""Pictures are as good as their bytes allow; maps are cut out of strips, and what is shown is what was drawn."""

import base64
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from report_example import write_strips

from regvit.report.pictures import (
    SMALLEST_PICTURE,
    Comparison,
    Strips,
    comparisons,
    photo_bytes,
    picture,
    shrunk,
    tiles,
)


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
    return Comparison("b", images, Strips("<a>", paths), Strips("b", after))


def noise(path, size=(300, 200)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def embedded(source: str) -> bytes:
    return base64.b64decode(source.partition("base64,")[2])


def test_a_strip_is_cut_into_squares(tmp_path):
    path = strip(tmp_path / "a.png", np.stack([np.full((2, 2, 3), 10), np.full((2, 2, 3), 200)]))
    assert [np.asarray(tile).mean() for tile in tiles(path)] == [10, 200]


def test_a_picture_that_is_no_row_of_squares_is_refused(tmp_path):
    Image.new("RGB", (25, 10)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is 25 pixels wide and 10 high: no row of squares"):
        tiles(tmp_path / "a.png")


def test_a_map_is_kept_with_one_pixel_a_patch(tmp_path):
    patches = np.random.default_rng(0).integers(0, 255, (1, 4, 4, 3))
    (tile,) = tiles(strip(tmp_path / "a.png", patches, enlarged=7))
    assert np.array_equal(np.asarray(shrunk(tile)), patches[0])
    assert shrunk(Image.new("RGB", (12, 12), "red")).size == (1, 1)


def test_only_what_both_sides_have_is_compared_and_drawn_as_it_was(comparison):
    assert comparison.name == "<a> → b"
    cards = comparison.cards(9_000)
    assert [list(card["maps"]) for card in cards] == [["patch norms", "features as colours"]] * 2
    first = cards[0]["maps"]["patch norms"][0]
    assert first.alternative == "patch norms of image 1, <a>"
    drawn = np.asarray(Image.open(io.BytesIO(embedded(first.source))).convert("RGB"))
    assert np.array_equal(drawn, np.asarray(tiles(comparison.before.maps["norms"])[0])[::5, ::5])
    alone = dataclasses.replace(comparison, before=None)
    assert alone.name == "b" and len(alone.cards(9_000)[0]["maps"]["patch norms"]) == 1


def test_a_model_that_no_run_is_has_a_name_that_says_what_it_is(results):
    study = dataclasses.replace(results.study, runs={"cured": results.study.runs["cured"]}, references={})
    assert [each.name for each in comparisons(study)] == ["without registers → cured", "before planting → cured"]


def test_a_run_that_is_its_backbone_as_it_came_is_compared_with_its_reference(results, tmp_path):
    runs = dict.fromkeys(("intact", "trained"), results.study.runs["intact"])
    study = dataclasses.replace(results.study, runs=runs, references={"trained": "intact"}, folder=tmp_path)
    for name in runs:
        write_strips(study.path(name, "verify", "", "images.jpg").parent, [name], np.random.default_rng(0))
    assert [each.name for each in comparisons(study)] == ["intact", "intact → trained"]


@pytest.mark.parametrize("limit", [30_000, 9_000, 1])
def test_a_picture_is_as_good_as_its_bytes_allow_but_never_nothing(tmp_path, limit):
    drawn = picture(noise(tmp_path / "a.png"), "noise", limit)
    assert len(embedded(drawn.source)) <= max(limit, SMALLEST_PICTURE)
    assert (drawn.width, drawn.height) == (300, 200)  # the place that it takes does not depend on the bytes
    assert drawn == picture(tmp_path / "a.png", "noise", limit)


def test_many_comparisons_share_the_room_of_the_photographs():
    assert [photo_bytes(shown, 2) for shown in (1, 20, 1000)] == [9_000, 5_000, 2_000]
