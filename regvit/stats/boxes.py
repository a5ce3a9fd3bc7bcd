"""Boxes in pixels, their overlap, and CorLoc.

A box is [x0, y0, x1, y1], x1 and y1 exclusive, so that its area is (x1 − x0)(y1 − y0) and boxes that share an edge do
not overlap. CorLoc (Deselaers et al. 2010) is the share of images whose one predicted box has an intersection over union
of at least ½ with any true box. Shape letters: b image, m box.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from regvit.data.manifest import Dataset
from regvit.files import write_atomic

GREEN, RED, BLUE = (0, 160, 0), (230, 0, 0), (0, 90, 255)
COLOURS = 40  # of a picture's photographs
HIT = 0.5  # intersection over union from which on an object counts as found


def true_boxes(dataset: Dataset) -> list[Float[np.ndarray, "m 4"]]:
    """The boxes of each row, in pixels of its image; an empty array where a row has none."""
    return [
        np.array(json.loads(boxes or "[]"), dtype=np.float64).reshape(-1, 4) for boxes in dataset.rows.column("boxes")
    ]


def best_iou(predicted: Float[np.ndarray, "b 4"], truth: Sequence[Float[np.ndarray, "m 4"]]) -> Float[np.ndarray, " b"]:
    """The largest overlap of each image's one predicted box with its true boxes; 0 where it has none.

    Raises:
        ValueError: the numbers of images differ, an array is not one of boxes, or a box ends before it begins.
    """
    predicted = np.asarray(predicted, dtype=np.float64)
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predicted boxes do not fit the true boxes of {len(truth)} images")
    if not len(truth):
        return np.zeros(0)
    # All pairs in one go: a sweep compares the same truth some hundred times.
    counts = np.array([len(boxes) for boxes in truth])
    owner = np.repeat(np.arange(len(truth)), counts)
    every, own = _boxes(np.concatenate(truth), "truth"), _boxes(predicted, "predicted")[owner]
    shared = (np.minimum(own[:, 2:], every[:, 2:]) - np.maximum(own[:, :2], every[:, :2])).clip(min=0).prod(1)
    union = _areas(own) + _areas(every) - shared
    best = np.zeros(len(truth))
    np.maximum.at(best, owner, np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))
    return best


def draw_boxes(
    path: Path,
    images: Sequence[Image.Image],
    truth: Sequence[Float[np.ndarray, "m 4"]],
    predicted: Sequence[Float[np.ndarray, "n 4"]],
    columns: int = 4,
    side: int = 160,
) -> None:
    """Writes a PNG of images with their boxes: true ones green, predicted ones red (the first) and blue (the others).

    Args:
        images: RGB; each is shrunk or enlarged into a tile.
        predicted: boxes in pixels of the image; the first counts, others are shown beside it.
        side: of a tile, pixels.
    Raises:
        ValueError: there are no images, or the numbers differ.
    """
    if not images or not len(images) == len(truth) == len(predicted):
        raise ValueError(
            f"{len(images)} images, {len(truth)} sets of true boxes and {len(predicted)} of predicted ones: "
            "expected as many of each, and at least one"
        )
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), "white")
    corners = [(number % columns * side, number // columns * side) for number in range(len(images))]
    scales = [side / max(image.size) for image in images]
    for image, corner, scale in zip(images, corners, scales, strict=True):
        size = [max(1, round(length * scale)) for length in image.size]
        sheet.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    # A palette of few colours keeps the file small; those of the boxes are added to it, so that they stay as they are.
    sheet = sheet.quantize(COLOURS, dither=Image.Dither.NONE)
    palette = sheet.getpalette()[: 3 * COLOURS]
    palette += [0] * (3 * COLOURS - len(palette))
    sheet.putpalette([*palette, *GREEN, *RED, *BLUE])
    green, red, blue = range(COLOURS, COLOURS + 3)
    pen = ImageDraw.Draw(sheet)
    for true, found, (left, top), scale in zip(truth, predicted, corners, scales, strict=True):
        drawn = [(box, green) for box in true] + [(box, blue) for box in found[1:]] + [(box, red) for box in found[:1]]
        for box, colour in drawn:
            x0, y0, x1, y1 = (round(float(value) * scale) for value in box)
            edges = (left + x0, top + y0, left + max(x0, x1 - 1), top + max(y0, y1 - 1))
            pen.rectangle(edges, outline=colour, width=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(path) as beside:
        sheet.save(beside, optimize=True)


def _boxes(boxes: np.ndarray, name: str) -> Float[np.ndarray, "m 4"]:
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} has shape {boxes.shape}; expected (m, 4): one [x0, y0, x1, y1] a row")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        at = int((boxes[:, 2:] < boxes[:, :2]).any(1).argmax())
        raise ValueError(f"{name}[{at}] is {boxes[at].tolist()}; expected x0 <= x1 and y0 <= y1")
    return boxes


def _areas(boxes: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, " m"]:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
