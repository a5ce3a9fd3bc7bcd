"""Depth as data sets keep it: PNG files of 16 bits, in millimetres, 0 where nothing is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from regvit.data.decoding import BROKEN, UnreadableImage, check_file, open_image
from regvit.data.whole_images import original_size

MILLIMETRE = 0.001  # metres


def read_depth(path: Path | str) -> Float[np.ndarray, "h w"]:
    """Depth in metres; 0 where it is not known.

    Raises:
        UnreadableImage: the file is missing, broken, or has not one channel of 16 bits.
    """
    try:
        check_file(path)
        with open_image(path) as image:
            if not (image.mode == "I" or image.mode.startswith("I;16")):
                raise UnreadableImage(
                    path, f"depth has one channel of 16 bits, in millimetres (mode I or I;16), not mode {image.mode}"
                )
            return np.asarray(image).astype(np.float32) * np.float32(MILLIMETRE)
    except UnreadableImage:
        raise
    except BROKEN as error:
        raise UnreadableImage(path, f"{type(error).__name__}: {error}") from error


def depth_problem(depth: Path, image: Path) -> str:
    """Why a depth file cannot be used with its image, or ""."""
    try:
        values, (width, height) = read_depth(depth), original_size(image)
    except UnreadableImage as error:
        return str(error)
    if values.shape != (height, width):
        found = f"{values.shape[1]} x {values.shape[0]}"
        return f"its depth {depth.name} has {found} pixels, the image {width} x {height}"
    return "" if values.any() else f"its depth {depth.name} is not known anywhere"
