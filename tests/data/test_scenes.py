import numpy as np
import pytest
from PIL import Image

from regvit.data.synthetic.scenes import SIDES, SIZE, compose, dye, random_crop

BACKGROUND = Image.new("RGB", (100, 100), (0, 0, 0))
DISC = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
NARROW = Image.new("RGBA", (40, 40), (0, 0, 0, 0))  # opaque only in a column of a quarter of its width
NARROW.paste((0, 255, 0, 255), (0, 0, 10, 40))


@pytest.mark.parametrize("seed", range(20))
def test_masks_boxes_and_pixels_agree(seed):
    before = BACKGROUND.tobytes()
    scene = compose(BACKGROUND, [(DISC, 0), (NARROW, 4), (DISC, 6)], np.random.default_rng(seed))
    assert BACKGROUND.tobytes() == before
    pixels, mask = np.asarray(scene.image), np.asarray(scene.mask)
    assert len(scene.boxes) == 3
    covered = np.zeros_like(mask)
    for (x0, y0, x1, y1), value in zip(scene.boxes, (1, 5, 7), strict=True):
        inside = mask[y0:y1, x0:x1]
        assert np.all(inside == value)  # both stickers are rectangles, so a tight box is full
        assert not covered[y0:y1, x0:x1].any()
        covered[y0:y1, x0:x1] = value
    assert np.array_equal(covered, mask)
    assert np.all(pixels[mask == 1] == (255, 0, 0))
    assert np.all(pixels[mask == 0][:, 0] == 0)


def test_sizes_span_the_stated_range():
    widths = []
    for seed in range(200):
        ((x0, _, x1, _),) = compose(BACKGROUND, [(DISC, 0)], np.random.default_rng(seed)).boxes
        widths.append(x1 - x0)
    assert min(widths) >= round(SIDES[0] * 100) and max(widths) <= round(SIDES[1] * 100)
    assert max(widths) - min(widths) > 25


def test_a_transparent_sticker_is_refused():
    with pytest.raises(ValueError, match="sticker 0 is fully transparent"):
        compose(BACKGROUND, [(Image.new("RGBA", (4, 4)), 0)], np.random.default_rng(0))


def test_more_stickers_than_room_are_refused():
    with pytest.raises(ValueError, match="no room for another object beside"):
        compose(BACKGROUND, [(DISC, 0)] * 60, np.random.default_rng(0))


def test_crops_stay_inside_their_region():
    picture = Image.new("RGB", (300, 200), (255, 0, 0))
    picture.paste((0, 0, 255), (150, 0, 300, 200))
    for seed in range(30):
        crop = random_crop(picture, (152, 0, 300, 200), np.random.default_rng(seed))
        assert crop.size == (SIZE, SIZE)
        assert crop.getcolors() == [(SIZE * SIZE, (0, 0, 255))]


def test_dyeing_keeps_the_order_of_light_and_dark():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (2, 1))).convert("RGB")
    dyed = np.asarray(dye(ramp, np.random.default_rng(0))).astype(int)
    assert np.all(np.diff(dyed[0], axis=0) >= 0)
    assert np.all(dyed[0, 0] < 120) and np.all(dyed[0, 255] >= 136)
