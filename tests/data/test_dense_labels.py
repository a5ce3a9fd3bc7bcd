import numpy as np
import pytest
from PIL import Image

from regvit.data.decoding import UnreadableImage
from regvit.data.dense_labels import depth_problem, read_depth


def test_depth_files_are_millimetres_of_16_bits(tmp_path):
    Image.fromarray(np.array([[0, 1500], [65535, 1]], np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_depth(tmp_path / "a.png"), [[0, 1.5], [65.535, 0.001]], rtol=1e-6)


def test_files_that_are_no_depth_are_refused_with_the_reason(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(UnreadableImage, match=r"b\.png.*16 bits.*not mode L"):
        read_depth(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"torn")
    with pytest.raises(UnreadableImage, match=r"c\.png"):
        read_depth(tmp_path / "c.png")


def test_depth_must_fit_its_image_and_be_known_somewhere(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "rgb.png")
    Image.fromarray(np.full((2, 3), 700, np.uint16)).save(tmp_path / "right.png")
    Image.fromarray(np.full((3, 2), 700, np.uint16)).save(tmp_path / "turned.png")
    Image.fromarray(np.zeros((2, 3), np.uint16)).save(tmp_path / "empty.png")
    assert depth_problem(tmp_path / "right.png", tmp_path / "rgb.png") == ""
    assert "has 2 x 3 pixels, the image 3 x 2" in depth_problem(tmp_path / "turned.png", tmp_path / "rgb.png")
    assert "not known anywhere" in depth_problem(tmp_path / "empty.png", tmp_path / "rgb.png")
    assert "missing.png" in depth_problem(tmp_path / "missing.png", tmp_path / "rgb.png")
