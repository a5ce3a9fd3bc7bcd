import numpy as np
import pytest
from PIL import Image

from regvit.data.decoding import UnreadableImage, original_size
from regvit.data.dense_labels import depth_problem, read_depth, read_mask


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


def test_a_mask_gives_indices_not_colours_and_lies_like_its_squashed_image(tmp_path):
    values = np.zeros((32, 128), np.uint8)
    values[:, 64:], values[0, 0] = 7, 255
    mask = Image.fromarray(values).convert("P")
    mask.putpalette([value for i in range(256) for value in (i * 7 % 256, i * 3 % 256, 255 - i)])
    mask.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png"), values)
    squashed = read_mask(tmp_path / "m.png", 64)
    assert squashed.shape == (64, 64) and (squashed[:, 32:] == 7).all() and set(np.unique(squashed)) <= {0, 7, 255}


def test_what_is_no_mask_is_refused(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "rgb.png")
    for name, said in (("rgb.png", "not mode RGB"), ("none.png", "FileNotFoundError")):
        with pytest.raises(UnreadableImage, match=said):
            read_mask(tmp_path / name)


def test_the_original_size_is_upright(tmp_path):
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.jpg")
    assert original_size(tmp_path / "turned.jpg") == (20, 30) and original_size(tmp_path / "plain.jpg") == (30, 20)
