"""Pictures of what was found in images: class masks beside the truth, and matches drawn as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from regvit.data.dense_labels import IGNORE
from regvit.files import write_atomic
from regvit.stats.boxes import GREEN, RED

SIDE = 112  # of a tile, pixels
COLOURS = 64  # of a picture with photographs
GREY = (128, 128, 128)  # of what is not known


def draw_masks(
    path: Path,
    images: Sequence[Image.Image],
    truth: Sequence[UInt8[np.ndarray, "h w"]],
    guesses: Sequence[np.ndarray],
) -> None:
    """Writes a PNG with a column an image: the image, its true mask, and the classes found on any grid.

    Raises:
        ValueError: there are no images, or the numbers differ.
    """
    if not images or not len(images) == len(truth) == len(guesses):
        raise ValueError(f"{len(images)} images, {len(truth)} masks, {len(guesses)} guesses: expected as many of each")
    sheet = Image.new("RGB", (SIDE * len(images), 3 * SIDE))
    for column, (image, *masks) in enumerate(zip(images, truth, guesses, strict=True)):
        sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (column * SIDE, 0))
        for row, mask in enumerate(masks, 1):
            tile = Image.fromarray(class_colours(mask)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(tile, (column * SIDE, row * SIDE))
    _save(path, sheet)


def class_colours(mask: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """PASCAL VOC's colours: bit 3 i + j of the class is bit 7 − i of channel j. `IGNORE` is grey."""
    values = np.asarray(mask).astype(int)
    found = np.zeros((*values.shape, 3), dtype=np.uint8)
    for i in range(8):
        for j in range(3):
            found[..., j] |= ((values >> (3 * i + j) & 1) << (7 - i)).astype(np.uint8)
    found[values == IGNORE] = GREY
    return found


def draw_matches(
    path: Path,
    pairs: Sequence[tuple[Image.Image, Image.Image]],
    lines: Sequence[Float[np.ndarray, "m 4"]],
    right: Sequence[Bool[np.ndarray, " m"]],
    columns: int = 2,
) -> None:
    """Writes a PNG of pairs side by side with their matches as lines: green where right, red where wrong.

    Args:
        lines: x, y in the first image and x, y of what was found in the second, pixels of each image.
    Raises:
        ValueError: there are no pairs, or the numbers differ.
    """
    if not pairs or not len(pairs) == len(lines) == len(right):
        raise ValueError(f"{len(pairs)} pairs, lines of {len(lines)}, {len(right)} verdicts: expected as many of each")
    side = 3 * SIDE // 2
    sheet = Image.new("RGB", (columns * 2 * side, -(-len(pairs) // columns) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (pair, own, verdicts) in enumerate(zip(pairs, lines, right, strict=True)):
        left, top = number % columns * 2 * side, number // columns * side
        for half, image in enumerate(pair):
            sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left + half * side, top))
        scale = np.array([side / length for image in pair for length in image.size])
        for (x0, y0, x1, y1), hit in zip(own * scale, verdicts, strict=True):
            ends = (left + x0, top + y0, left + side + x1, top + y1)
            pen.line(ends, GREEN if hit else RED, 1)
            for x, y in (ends[:2], ends[2:]):
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), GREEN if hit else RED)
    _save(path, sheet)


def _save(path: Path, sheet: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(path) as beside:
        sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(beside)
