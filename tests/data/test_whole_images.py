import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from regvit.data.decoding import UnreadableImage, original_size
from regvit.data.dense_labels import read_mask
from regvit.data.transform import Transform
from regvit.data.whole_images import WholeTransform, valid_patches

BASE = Transform(64, (0.2, 0.4, 0.6), (0.5, 0.5, 0.5), crop_pct=0.875)
sides = st.integers(1, 900)


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
    padded = WholeTransform.of(BASE, "pad").load(wide)
    assert padded[0, :32, :30].min() == 255 and padded[2, :32, 34:].min() == 255
    assert padded[:, 32:].flatten(1).unique(dim=1).tolist() == [[51], [102], [153]]  # the mean colour


def test_padding_is_zero_after_normalisation(wide):
    transform = WholeTransform.of(BASE, "pad")
    normalised = transform.normalise(transform.load(wide)[None])
    assert normalised[:, :, 32:].abs().max() < 0.5 / 255 / 0.5


def test_a_square_image_is_the_same_either_way_and_as_without_a_crop(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = [WholeTransform.of(BASE, fit).load(tmp_path / "x.png") for fit in ("squash", "pad")]
    assert torch.equal(*found)
    assert torch.equal(found[0], dataclasses.replace(BASE, crop_pct=1.0).load(tmp_path / "x.png"))


def test_the_transform_says_what_it_does():
    made = WholeTransform.of(BASE, "pad")
    assert made.to_dict() == BASE.to_dict() | {"crop_pct": 1.0, "fit": "pad"}
    assert WholeTransform.from_dict(made.to_dict()) == made
    with pytest.raises(ValueError, match="fit 'crop' is unknown; use one of squash, pad"):
        WholeTransform.of(BASE, "crop")


def test_boxes_come_back_to_the_pixels_of_the_image():
    squash, pad = (WholeTransform.of(BASE, fit).frame(128, 32) for fit in ("squash", "pad"))
    assert squash.to_original(np.array([[0, 0, 64, 64], [16, 32, 32, 48]])).tolist() == [
        [0, 0, 128, 32], [32, 16, 64, 24]]  # fmt: skip
    assert (pad.content_width, pad.content_height) == (64, 16)
    assert pad.to_original(np.array([16, 8, 32, 16])).tolist() == [32, 16, 64, 32]
    assert pad.to_original(np.array([16, 8, 32, 64])).tolist() == [32, 16, 64, 32]  # what lies in the padding is cut


@given(sides, sides, st.sampled_from(["squash", "pad"]), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_boxes_go_there_and_back(width, height, fit, shares):
    frame = WholeTransform.of(BASE, fit).frame(width, height)
    (x0, x1), (y0, y1) = sorted(shares[:2]), sorted(shares[2:])
    box = np.array([x0 * width, y0 * height, x1 * width, y1 * height])
    there = frame.to_input(box)
    assert (there <= 64 + 1e-9).all() and np.allclose(frame.to_original(there), box)


@given(sides, sides)
def test_padding_keeps_the_aspect_to_half_a_pixel(width, height):
    frame = WholeTransform.of(BASE, "pad").frame(width, height)
    assert max(frame.content_width, frame.content_height) == 64
    scale = 64 / max(width, height)
    assert abs(frame.content_width - max(width * scale, 1)) <= 0.5 + 1e-9
    assert abs(frame.content_height - max(height * scale, 1)) <= 0.5 + 1e-9


def test_patches_of_padding_alone_are_told_apart():
    transform = WholeTransform.of(BASE, "pad")
    wide, square = transform.frame(640, 330), transform.frame(10, 10)  # content 64 x 33: the fifth row has a pixel
    assert wide.valid_patches(8).reshape(8, 8).all(1).tolist() == [True] * 5 + [False] * 3
    assert square.valid_patches(8).all()
    assert valid_patches([wide, square], 8).sum(1).tolist() == [40, 64]
    assert valid_patches([square, square], 8) is None


def test_maps_come_back_to_the_pixels_of_the_image():
    frame = WholeTransform.of(BASE, "pad").frame(128, 32)
    maps = torch.full((2, 64, 64), -9.0)
    maps[0, :16, :32], maps[0, :16, 32:], maps[1, :16] = 1.0, 3.0, 2.0
    restored = frame.restore(maps, "nearest-exact")
    assert restored.shape == (2, 32, 128)
    assert (restored[0, :, :64] == 1).all() and (restored[0, :, 64:] == 3).all() and (restored[1] == 2).all()
    assert frame.restore(maps).min() >= 1  # nothing of the padding leaks in
    with pytest.raises(ValueError, match=r"maps are \(2, 8, 8\); expected \(c, 64, 64\)"):
        frame.restore(torch.zeros(2, 8, 8))


def test_masks_are_framed_like_their_images(tmp_path):
    mask = np.zeros((32, 128), np.uint8)
    mask[:, 64:], mask[0, 0] = 7, 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    padded = WholeTransform.of(BASE, "pad").load_mask(tmp_path / "m.png")
    assert (padded[16:] == 255).all() and (padded[:16, 32:] == 7).all() and (padded[1:16, :32] == 0).all()
    squashed = WholeTransform.of(BASE).load_mask(tmp_path / "m.png")
    assert (squashed[:, 32:] == 7).all() and set(np.unique(squashed)) <= {0, 7, 255}


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


def test_an_image_without_pixels_has_no_place():
    with pytest.raises(ValueError, match="an image of 0 x 5 pixels has no place"):
        WholeTransform.of(BASE).frame(0, 5)
