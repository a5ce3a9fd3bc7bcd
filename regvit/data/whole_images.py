"""Whole images as square inputs, without a crop: a centre crop would cut off objects that boxes, masks and depth speak of.

An image of any shape is squashed to (s, s). Shape letters: s side of the input in pixels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from regvit.data.dense_labels import read_mask
from regvit.data.transform import Transform


@dataclass(frozen=True)
class WholeTransform(Transform):
    """A transform that keeps the whole image; `crop_pct` has no meaning here."""

    @classmethod
    def of(cls, transform: Transform) -> WholeTransform:
        """The same size, colours and interpolation without the crop."""
        known = {field.name: getattr(transform, field.name) for field in dataclasses.fields(Transform)}
        return cls(**known | {"crop_pct": 1.0})

    def crop(self, image: Image.Image) -> Image.Image:
        """The whole image as an input of (size, size); the name is the base class's, nothing is cut off."""
        return self.resize(image, (self.size, self.size))

    def load_mask(self, path: Path | str) -> UInt8[np.ndarray, "s s"]:
        """A mask in the place of its image, nearest neighbour.

        Raises:
            UnreadableImage: as `read_mask`.
        """
        mask = Image.fromarray(read_mask(path))
        return np.asarray(mask.resize((self.size, self.size), Image.Resampling.NEAREST))
