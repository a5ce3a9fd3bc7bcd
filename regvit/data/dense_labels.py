"""Truth of every pixel as data sets keep it: class masks and depth.

A mask is a PNG of 8 bits: 0 background, class index + 1, 255 ignore. Depth is a PNG of 16 bits in millimetres, 0 where
nothing is known.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from regvit.data.decoding import UnreadableImage, opened, original_size

IGNORE = 255  # in a mask: neither background nor a class, left out of every measurement
MASK_MODES = ("L", "P", "1")
MILLIMETRE = 0.001  # metres


def read_mask(path: Path | str, side: int | None = None) -> UInt8[np.ndarray, "h w"]:
    """The values of a mask; of a palette PNG the indices, not the colours.

    Args:
        side: of the square that its image was squashed to, pixels; None: as it is.
    Raises:
        UnreadableImage: the file is missing, broken, or has not one channel of at most 8 bits.
    """
    with opened(path) as image:
        if image.mode not in MASK_MODES:
            raise UnreadableImage(
                path, f"a mask has one channel of 8 bits (mode {', '.join(MASK_MODES)}), not mode {image.mode}"
            )
        image = image if side is None else image.resize((side, side), Image.Resampling.NEAREST)
        return np.asarray(image).astype(np.uint8)


def read_depth(path: Path | str) -> Float[np.ndarray, "h w"]:
    """Depth in metres; 0 where it is not known.

    Raises:
        UnreadableImage: the file is missing, broken, or has not one channel of 16 bits.
    """
    with opened(path) as image:
        if not (image.mode == "I" or image.mode.startswith("I;16")):
            raise UnreadableImage(
                path, f"depth has one channel of 16 bits, in millimetres (mode I or I;16), not mode {image.mode}"
            )
        return np.asarray(image).astype(np.float32) * np.float32(MILLIMETRE)


def mask_problem(mask: Path, image: Path, n_classes: int) -> str:
    """Why a mask cannot be used with its image, or ""."""
    try:
        values, (width, height) = read_mask(mask), original_size(image)
    except UnreadableImage as error:
        return str(error)
    if values.shape != (height, width):
        return f"its mask {mask.name} has {values.shape[1]} x {values.shape[0]} pixels, the image {width} x {height}"
    unknown = sorted(set(np.unique(values).tolist()) - {*range(n_classes + 1), IGNORE})
    return f"its mask {mask.name} holds {unknown[0]}, beyond {n_classes} classes; {IGNORE} is void" if unknown else ""


def depth_problem(depth: Path, image: Path) -> str:
    """Why a depth file cannot be used with its image, or ""."""
    try:
        values, (width, height) = read_depth(depth), original_size(image)
    except UnreadableImage as error:
        return str(error)
    if values.shape != (height, width):
        return f"its depth {depth.name} has {values.shape[1]} x {values.shape[0]} pixels, the image {width} x {height}"
    return "" if values.any() else f"its depth {depth.name} is not known anywhere"


def zero_is_ignored(folder: Path | str) -> bool:
    """Whether 0 in the masks of a data set's folder means "not annotated" rather than background."""
    about = json.loads((Path(folder) / "dataset.json").read_text(encoding="utf-8"))["about"]
    return about.get("mask", {}).get("zero") == "ignore"
