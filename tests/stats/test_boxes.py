import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regvit.data.manifest import Dataset, Row
from regvit.stats.boxes import HIT, best_iou, draw_boxes, true_boxes


def box(side=40):
    """Boxes with whole corners, at least a pixel large."""
    corner = st.tuples(st.integers(0, side - 1), st.integers(0, side - 1))
    size = st.tuples(st.integers(1, side), st.integers(1, side))
    return st.builds(lambda c, s: [c[0], c[1], c[0] + s[0], c[1] + s[1]], corner, size)


def test_overlap_worked_by_hand():
    truth = np.array([[2, 1, 6, 3], [0, 0, 4, 2], [4, 0, 8, 2], [1, 0, 3, 2]])[:, None]
    found = best_iou(np.tile([[0, 0, 4, 2]], (4, 1)), list(truth))
    assert found.tolist() == [pytest.approx(2 / 14), 1.0, 0.0, 0.5]  # shared 2, union 8 + 8 - 2


@settings(deadline=None)
@given(st.lists(st.tuples(box(), st.lists(box(), max_size=4)), min_size=1, max_size=6))
def test_the_best_overlap_is_the_largest_of_each_images_own_boxes(images):
    predicted = np.array([one for one, _ in images])
    truth = [np.array(boxes, dtype=float).reshape(-1, 4) for _, boxes in images]
    pairs = [[torch.from_numpy(each).double() for each in (p[None], t)] for p, t in zip(predicted, truth, strict=True)]
    expected = [torchvision.ops.box_iou(*pair).numpy().max(initial=0.0) for pair in pairs]
    assert np.allclose(best_iou(predicted, truth), expected)


def test_half_an_overlap_is_enough_and_any_object_counts():
    truth = [np.array([[0.0, 0, 2, 2], [10, 10, 14, 14]])] * 3
    predicted = np.array([[0, 0, 4, 2], [10, 10, 14, 13], [0, 0, 4, 2.01]])  # 4/8, 12/16, just under 4/8
    assert (best_iou(predicted, truth) >= HIT).tolist() == [True, True, False]


def test_an_image_without_boxes_is_never_localised():
    assert best_iou(np.array([[0, 0, 5, 5]]), [np.zeros((0, 4))]).tolist() == [0]
    assert best_iou(np.zeros((0, 4)), []).shape == (0,)


def test_true_boxes_are_read_from_the_manifest(tmp_path):
    rows = (Row("a", "a", "", "test", "[[1, 2, 3, 4], [0, 0, 2, 2]]"), Row("b", "b", "", "test"))
    first, second = true_boxes(Dataset("d", tmp_path, (), rows, ""))
    assert first.tolist() == [[1, 2, 3, 4], [0, 0, 2, 2]] and second.shape == (0, 4)


def test_what_is_no_box_is_refused():
    with pytest.raises(ValueError, match=r"predicted\[1\] is \[3.0, 0.0, 2.0, 1.0\]; expected x0 <= x1"):
        best_iou(np.array([[0, 0, 1, 1], [3, 0, 2, 1]]), [np.zeros((0, 4))] * 2)
    with pytest.raises(ValueError, match=r"truth has shape \(4,\); expected \(m, 4\)"):
        best_iou(np.zeros((1, 4)), [np.zeros(4)])
    with pytest.raises(ValueError, match="2 predicted boxes do not fit the true boxes of 1 images"):
        best_iou(np.zeros((2, 4)), [np.zeros((1, 4))])


def test_the_picture_shows_true_boxes_green_and_the_predicted_one_red(tmp_path):
    images = [Image.new("RGB", (80, 40), "grey")] * 5
    truth, predicted = [np.array([[8, 4, 40, 36]])] * 5, [np.array([[50, 4, 70, 20], [4, 4, 20, 20]])] * 5
    for name in ("a.png", "b.png"):
        draw_boxes(tmp_path / name, images, truth, predicted, columns=4, side=80)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert pixels.shape == (160, 320, 3)
    assert pixels[20, 8].tolist() == [0, 160, 0] and pixels[4, 60].tolist() == [230, 0, 0]
    assert pixels[100, 8].tolist() == [0, 160, 0]  # the fifth stands in the second row
    assert pixels[20, 25].tolist() == [128, 128, 128]
    with pytest.raises(ValueError, match="expected as many of each"):
        draw_boxes(tmp_path / "c.png", images, truth, predicted[:2])
