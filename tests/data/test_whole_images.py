import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from regvit.data.decoding import UnreadableImage, original_size
from regvit.data.dense_labels import read_mask
from regvit.data.transform import Transform
from regvit.data.whole_images import WholeTransform

BASE = Transform(64, (0.2, 0.4, 0.6), (0.5, 0.5, 0.5), crop_pct=0.875)


@pytest.fixture
def wide(tmp_path):
    """100 x 50 pixels: left half red, right half blue."""
    pixels = np.zeros((50, 100, 3), np.uint8)
    pixels[:, :50, 0] = pixels[:, 50:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def test_nothing_is_cropped(wide):
    squashed = WholeTransform.of(BASE).load(wide)
    assert squashed.shape == (3, 64, 64) and squashed.dtype == torch.uint8
    assert squashed[0, :, :30].min() == 255 and squashed[2, :, 34:].min() == 255


def test_a_square_image_is_the_same_as_without_a_crop(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = dataclasses.replace(BASE, crop_pct=1.0).load(tmp_path / "x.png")
    assert torch.equal(WholeTransform.of(BASE).load(tmp_path / "x.png"), expected)


def test_the_transform_says_what_it_does():
    made = WholeTransform.of(BASE)
    assert made.to_dict() == BASE.to_dict() | {"crop_pct": 1.0} and WholeTransform.from_dict(made.to_dict()) == made


def test_masks_lie_like_their_images(tmp_path):
    mask = np.zeros((32, 128), np.uint8)
    mask[:, 64:], mask[0, 0] = 7, 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    squashed = WholeTransform.of(BASE).load_mask(tmp_path / "m.png")
    assert squashed.shape == (64, 64) and (squashed[:, 32:] == 7).all() and set(np.unique(squashed)) <= {0, 7, 255}


def test_a_palette_mask_gives_indices_not_colours(tmp_path):
    mask = Image.fromarray(np.array([[0, 1], [20, 255]], np.uint8)).convert("P")
    mask.putpalette([value for i in range(256) for value in (i * 7 % 256, i * 3 % 256, 255 - i)])
    mask.save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == "P"
    assert read_mask(tmp_path / "m.png").tolist() == [[0, 1], [20, 255]]


def test_what_is_no_mask_is_refused(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "rgb.png")
    with pytest.raises(UnreadableImage, match="not mode RGB"):
        read_mask(tmp_path / "rgb.png")
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        read_mask(tmp_path / "none.png")


def test_the_original_size_is_upright(tmp_path):
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.jpg")
    assert original_size(tmp_path / "turned.jpg") == (20, 30) and original_size(tmp_path / "plain.jpg") == (30, 20)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"broken.jpg cannot be read"):
        original_size(tmp_path / "broken.jpg")
