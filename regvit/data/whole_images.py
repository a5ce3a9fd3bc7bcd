"""Whole images as square inputs, without a crop, and the way back to their own pixels.

A centre crop would cut off objects that boxes and masks speak of. Here the image is

- `squash`: resized to (s, s) whatever its shape, or
- `pad`: resized so that its longer side is s, and padded right and below with the transform's mean colour, which is 0
  after normalisation (as the published code of LOST pads).

Shape letters: s side of the input in pixels, c channel or class, p patch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from regvit.data.dense_labels import IGNORE, read_mask
from regvit.data.transform import Transform

FITS = ("squash", "pad")


@dataclass(frozen=True)
class Frame:
    """Where an image lies in the square input: its top left corner in the input's, the rest padding.

    Attributes:
        width, height: of the original, upright, in pixels.
        size: side of the input, pixels.
        content_width, content_height: of the image in the input, pixels.
    """

    width: int
    height: int
    size: int
    content_width: int
    content_height: int

    def to_original(self, boxes: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "... 4"]:
        """Boxes from pixels of the input to pixels of the original, clipped to the image."""
        scale = np.array([self.width / self.content_width, self.height / self.content_height] * 2)
        return (np.asarray(boxes, dtype=np.float64) * scale).clip(0, [self.width, self.height] * 2)

    def to_input(self, boxes: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "... 4"]:
        """Boxes from pixels of the original to pixels of the input."""
        scale = np.array([self.content_width / self.width, self.content_height / self.height] * 2)
        return np.asarray(boxes, dtype=np.float64) * scale

    def valid_patches(self, patch: int) -> Bool[np.ndarray, " p"]:
        """Which patches show at least a pixel of the image, in reading order; the others are padding alone."""
        starts = np.arange(0, self.size - self.size % patch, patch)
        return ((starts[:, None] < self.content_height) & (starts[None] < self.content_width)).ravel()

    def restore(self, maps: Float[Tensor, "c s s"], mode: str = "bilinear") -> Float[Tensor, "c height width"]:
        """Maps over the input, such as the logits of classes, on the pixels of the original.

        Args:
            mode: of torch's `interpolate`; `nearest-exact` for labels.
        Raises:
            ValueError: the maps are not as large as the input.
        """
        if maps.shape[1:] != (self.size, self.size):
            raise ValueError(f"maps are {tuple(maps.shape)}; expected (c, {self.size}, {self.size}), as the input")
        content = maps[None, :, : self.content_height, : self.content_width]
        smooth = {"align_corners": False} if mode in ("bilinear", "bicubic") else {}
        return F.interpolate(content, (self.height, self.width), mode=mode, **smooth)[0]


@dataclass(frozen=True)
class WholeTransform(Transform):
    """A transform that keeps the whole image; `crop_pct` has no meaning here.

    Attributes:
        fit: `squash` or `pad`, see the module.
    """

    fit: str = "squash"

    def __post_init__(self):
        super().__post_init__()
        if self.fit not in FITS:
            raise ValueError(f"fit {self.fit!r} is unknown; use one of {', '.join(FITS)}")

    @classmethod
    def of(cls, transform: Transform, fit: str = "squash") -> WholeTransform:
        """The same size, colours and interpolation without the crop.

        Raises:
            ValueError: `fit` is unknown.
        """
        known = {field.name: getattr(transform, field.name) for field in dataclasses.fields(Transform)}
        return cls(**known | {"crop_pct": 1.0, "fit": fit})

    def frame(self, width: int, height: int) -> Frame:
        """Where an image of this size, upright, comes to lie.

        Raises:
            ValueError: a side is below 1 pixel.
        """
        if min(width, height) < 1:
            raise ValueError(f"an image of {width} x {height} pixels has no place; expected 1 or more a side")
        if self.fit == "squash":
            return Frame(width, height, self.size, self.size, self.size)
        longer = max(width, height)
        shrunk = (max(1, round(side * self.size / longer)) for side in (width, height))
        return Frame(width, height, self.size, *shrunk)

    def crop(self, image: Image.Image) -> Image.Image:
        """The whole image as an input of (size, size); the name is the base class's, nothing is cut off."""
        frame = self.frame(*image.size)
        content = (frame.content_width, frame.content_height)
        image = self.resize(image, content)
        if content == (self.size, self.size):
            return image
        whole = Image.new("RGB", (self.size, self.size), tuple(round(255 * value) for value in self.mean))
        whole.paste(image, (0, 0))
        return whole

    def load_mask(self, path: Path | str) -> UInt8[np.ndarray, "s s"]:
        """A mask in the frame of the input, nearest neighbour; 255 (ignore) in the padding.

        Raises:
            UnreadableImage: as `read_mask`.
        """
        mask = Image.fromarray(read_mask(path))
        frame = self.frame(*mask.size)
        framed = np.full((self.size, self.size), IGNORE, dtype=np.uint8)
        content = mask.resize((frame.content_width, frame.content_height), Image.Resampling.NEAREST)
        framed[: frame.content_height, : frame.content_width] = np.asarray(content)
        return framed


def valid_patches(frames: list[Frame], patch: int) -> Bool[Tensor, "b p"] | None:
    """`Frame.valid_patches` of a batch as a tensor, or None where no patch is padding alone."""
    valid = torch.from_numpy(np.stack([frame.valid_patches(patch) for frame in frames]))
    return None if valid.all() else valid
