import json

import numpy as np
import pytest
import torch
from dense_example import dense_set
from PIL import Image

from regvit.data.correspondences import Pair, read_pairs, write_pairs
from regvit.measures.training_free.correspondence import (
    category_table,
    counts,
    figures,
    image_columns,
    judge,
    known_pairs,
    match_pairs,
    nearest_patch,
    patch_of,
)
from regvit.measures.training_free.pictures import class_colours, draw_masks


def test_the_nearest_patch_is_that_of_largest_cosine():
    rng = np.random.default_rng(0)
    queries, patches = rng.normal(size=(40, 8)), rng.normal(size=(16, 8)) * rng.uniform(0.1, 50, (16, 1))
    found = nearest_patch(torch.from_numpy(queries).float(), torch.from_numpy(patches).float())
    cosines = queries @ patches.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(patches, axis=1)
    assert found.tolist() == cosines.argmax(1).tolist()


def test_points_lie_in_patches_of_the_squashed_image():
    points = np.array([[0.0, 0.0], [29.9, 0], [30, 0], [119.9, 79.9], [120, 80]])
    assert patch_of(points, (120, 80), 4).tolist() == [0, 0, 1, 15, 15]
    with pytest.raises(ValueError, match=r"\[121.0, 3.0\] is outside of"):
        patch_of(np.array([[121.0, 3.0]]), (120, 80), 4)


def test_a_match_is_right_within_a_patch_or_within_the_pairs_tolerance():
    # patches of 30 x 20 pixels; patch 5 has its middle at (45, 30)
    points = np.array([[0, 0, 45.0, 30.0], [0, 0, 74, 30], [0, 0, 76, 30], [0, 0, 45, 49], [0, 0, 45, 51]])
    by_patch = judge(Pair("a", "b", points), np.zeros(5, int), np.full(5, 5), (120, 80), 4)
    assert by_patch.found.tolist() == [[45.0, 30.0]] * 5
    assert by_patch.right.tolist() == [True, True, False, True, False]
    in_pixels = judge(Pair("a", "b", points, tolerance=20.0), np.zeros(5, int), np.full(5, 5), (120, 80), 4)
    assert in_pixels.right.tolist() == [True, False, False, True, False]


@pytest.fixture
def matched(tmp_path):
    """Two pairs on three images: the second image is the first one with its patches moved a column to the right."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(3, 4, 4, 16))
    patches[1] = np.roll(patches[0], 1, axis=1)
    patches[2] = rng.normal(size=(4, 4, 16))
    patches = patches.reshape(3, 16, 16)
    patches[1, 5], patches[1, 12] = -patches[0, 4], patches[0, 4]  # what patch 4 shows is found two rows too low
    outliers = np.zeros((3, 16), bool)
    outliers[0, 4] = True
    dense = dense_set(
        tmp_path / "made", {"patches": patches, "outliers": outliers}, sizes=[(32, 16), (64, 64), (40, 8)]
    )
    x, y = (each.ravel() for each in np.meshgrid(np.arange(3) * 8 + 4.0, np.arange(4) * 4 + 2.0))
    points = np.stack([x, y, (x / 8 + 1) * 16, y * 4], axis=1)
    pairs = [Pair("0", "1", points, "cat"), Pair("0", "2", points[:2] * [1, 1, 0.6, 0.1], "dog")]
    found = known_pairs(dense, [*pairs, Pair("0", "gone", points)])
    return found, match_pairs(dense, found), dense


def test_shares_are_pooled_over_points_and_told_apart_at_outliers(matched):
    _, found, dense = matched
    counted = counts(found, dense.side)
    assert counted.counted.sum(1).tolist() == [12, 2] and counted.right[0].sum() == 11 and counted.right[0, 4] == 0
    outliers = np.stack([dense.outliers([0])[0]] * 2)
    told = {figure.metric: figure for figure in figures(found, counted, outliers)}
    right = [each.right for each in found]
    assert told["pck"].value == pytest.approx(np.concatenate(right).mean())
    assert told["pck_at_outliers"].value == 0 and told["pck_at_outliers"].n == 1
    assert told["pck_by_pair"].value == pytest.approx(np.mean([each.mean() for each in right]))
    columns = image_columns(found, counted, outliers)
    assert columns["pck_weight"].tolist() == [12, 2] and columns["pck"][0] == pytest.approx(11 / 12)
    table = category_table(found).set_index("category")
    assert table.loc["cat", ["pairs", "points"]].tolist() == [1, 12] and table.loc["cat", "pck"] == pytest.approx(
        11 / 12
    )


def test_pairs_are_read_as_they_were_written_and_a_set_without_any_is_refused(tmp_path, matched):
    pairs = [pair for pair, *_ in matched[0]]
    write_pairs(tmp_path, [*pairs, Pair("a", "b", np.array([[1, 2, 3, 4.5]]), "", 7.25)])
    read = read_pairs(tmp_path)
    assert [(one.name, one.category, one.tolerance) for one in read] == [
        ("0>1", "cat", None), ("0>2", "dog", None), ("a>b", "", 7.25)]  # fmt: skip
    np.testing.assert_allclose(read[0].points, pairs[0].points)
    text = (tmp_path / "pairs.csv").read_text().replace(json.dumps([[1.0, 2.0, 3.0, 4.5]]), "[[1, 2]]")
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(ValueError, match="points of a and b are not"):
        read_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"take a data set with pairs"):
        read_pairs(tmp_path / "made")
    with pytest.raises(ValueError, match="has no pair"):
        known_pairs(matched[2], [Pair("x", "y", pairs[0].points)])


def test_masks_are_drawn_in_the_colours_of_voc(tmp_path):
    white = Image.new("RGB", (50, 30), "white")
    draw_masks(tmp_path / "k.png", [white], [np.array([[1, 255]], np.uint8)], [np.array([[0, 2]])])
    drawn = np.asarray(Image.open(tmp_path / "k.png").convert("RGB"))
    assert drawn.shape == (336, 112, 3)
    assert drawn[170, 20].tolist() == [128, 0, 0] and drawn[170, 90].tolist() == [128, 128, 128]
    assert drawn[300, 90].tolist() == [0, 128, 0]
    assert class_colours(np.array([[15]])).tolist() == [[[192, 128, 128]]]  # a person
