"""Scenes with known objects: emoji pasted on textures and photographs, with boxes and a class mask.

They are ground truth for object discovery and segmentation at no cost: what is pasted is known to the pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

SIZE = 224  # pixels, the usual input of the backbones
SIDES = (0.22, 0.55)  # smallest and largest side of a pasted emoji, share of the scene's side
OPAQUE = 128  # alpha from which on a pixel belongs to the object
TRIES = 25  # places tried at one size before the emoji is made a tenth smaller


@dataclass(frozen=True)
class Scene:
    """A composed image.

    Attributes:
        image: RGB.
        mask: 8-bit grey, 0 for background, class index + 1 on an object.
        boxes: (x0, y0, x1, y1) of each object in pixels, tight around the mask, x1 and y1 exclusive.
    """

    image: Image.Image
    mask: Image.Image
    boxes: tuple[tuple[int, int, int, int], ...]


def compose(
    background: Image.Image, stickers: Sequence[tuple[Image.Image, int]], generator: np.random.Generator
) -> Scene:
    """Paste emoji at random sizes and places, none touching another.

    Args:
        background: square RGB image; it is not changed.
        stickers: square RGBA images with the class index of each.
        generator: of sizes and places.
    Raises:
        ValueError: a sticker is fully transparent, or there are too many to find room for.
    """
    image, side = background.copy(), background.width
    mask = np.zeros((side, side), dtype=np.uint8)
    frames, boxes = [], []
    for sticker, label in stickers:
        size, left, top = _free_place(side, frames, generator)
        pasted = sticker.resize((size, size), Image.Resampling.BICUBIC)
        opaque = np.asarray(pasted.getchannel("A")) >= OPAQUE
        if not opaque.any():
            raise ValueError(f"sticker {len(frames)} is fully transparent; leave it out")
        image.paste(pasted, (left, top), pasted)
        mask[top : top + size, left : left + size][opaque] = label + 1
        rows, columns = np.flatnonzero(opaque.any(axis=1)), np.flatnonzero(opaque.any(axis=0))
        x0, x1, y0, y1 = (int(v) for v in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1))
        boxes.append((left + x0, top + y0, left + x1, top + y1))
        frames.append((left, top, left + size, top + size))
    return Scene(image, Image.fromarray(mask), tuple(boxes))


def _free_place(side: int, taken: list[tuple], generator: np.random.Generator) -> tuple[int, int, int]:
    """(size, left, top) of a square that meets none of `taken`, in pixels."""
    size = round(generator.uniform(*SIDES) * side)
    while size >= side * SIDES[0] / 2:
        for left, top in generator.integers(0, side - size + 1, size=(TRIES, 2)).tolist():
            if all(left >= x1 or left + size <= x0 or top >= y1 or top + size <= y0 for x0, y0, x1, y1 in taken):
                return size, left, top
        size = int(size * 0.9)
    raise ValueError(f"no room for another object beside {len(taken)} in {side} x {side} pixels; paste fewer")


def random_crop(picture: Image.Image, region: tuple[int, int, int, int], generator: np.random.Generator) -> Image.Image:
    """A random square of a region, mirrored half of the time, resized to (SIZE, SIZE).

    Args:
        region: (x0, y0, x1, y1) in pixels; its shorter side bounds the crop, whose side is at least half of that.
    """
    x0, y0, x1, y1 = region
    largest = min(x1 - x0, y1 - y0)
    side = int(generator.integers(largest // 2, largest + 1))
    left, top = x0 + int(generator.integers(0, x1 - x0 - side + 1)), y0 + int(generator.integers(0, y1 - y0 - side + 1))
    crop = picture.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else crop


def dye(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A picture in two random colours, a dark one for its shadows and a light one for its highlights."""
    dark, light = generator.integers(0, 120, 3).tolist(), generator.integers(136, 256, 3).tolist()
    return ImageOps.colorize(picture.convert("L"), black=tuple(dark), white=tuple(light))
