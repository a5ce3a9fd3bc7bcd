"""From an image to the input of a backbone: the uint8 tensor, and its float32 normalised on the device.

The geometry is that of timm's evaluation transform (shorter side to size / crop_pct, then a centre crop). Images are
resized by

    pillow  what timm's transform does, to the last bit
    torch   torch's uint8 kernel, which torchvision's transforms use on tensors: it takes 4 to 6 tenths of the time for
            reading and resizing a photograph, and moves some pixels in a thousand by 1 or 2 levels of 255. Its levels
            depend on the processor too (AVX2 or not), so that features made on two machines may differ in their last
            digits where Pillow's do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from regvit.data.decoding import read_rgb, to_rgb

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
RESIZINGS = ("pillow", "torch")
CROP_MODES = ("center", "squash")
TORCH_INTERPOLATIONS = ("bilinear", "bicubic")  # those that torch does with antialiasing
LONGEST = 100  # sides; of a longer image only the middle is resized: a line of 30,000 px would grow to gigabytes


@dataclass(frozen=True)
class Transform:
    """What turns an image into the input of a backbone.

    Attributes:
        size: side of the square crop, pixels.
        mean: of each channel, red, green, blue, on the scale 0 to 1.
        std: standard deviation of each channel, on the same scale.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        crop_pct: share of the resized shorter side that the crop keeps, in (0, 1].
        crop_mode: "center": the shorter side is resized, and the ends of the longer one are cut off; "squash": both sides
            are resized to the same length, whatever the image's shape. As in timm.
        resizing: "pillow" or "torch", see the module.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    resizing: str = "pillow"
    crop_mode: str = "center"

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))
        if self.size < 1:
            raise ValueError(f"size {self.size} must be at least 1 pixel")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} need three values each, std above 0")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown; use one of {', '.join(INTERPOLATIONS)}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct {self.crop_pct} must lie in (0, 1]")
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode {self.crop_mode!r} is unknown; use one of {', '.join(CROP_MODES)}")
        if self.resizing not in RESIZINGS:
            raise ValueError(f"resizing {self.resizing!r} is unknown; use one of {', '.join(RESIZINGS)}")
        if self.resizing == "torch" and self.interpolation not in TORCH_INTERPOLATIONS:
            raise ValueError(
                f"torch has no antialiased {self.interpolation} interpolation (only {', '.join(TORCH_INTERPOLATIONS)}); "
                "use resizing 'pillow'"
            )

    def to_dict(self) -> dict:
        """Plain values for JSON; `from_dict` is the inverse. `resizing` and `crop_mode` are left out where they are as by
        default, so that what was written before there was a choice stays as it is."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        for name, default in (("resizing", "pillow"), ("crop_mode", "center")):
            if values[name] == default:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping) -> Transform:
        """The transform that `to_dict` described.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        try:
            return cls(**values)
        except TypeError as error:
            keys = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"transform {dict(values)} does not fit; its keys are {keys}") from error

    def __call__(self, image: Image.Image | Path | str) -> Float[Tensor, "3 s s"]:
        """One image as a backbone's input: a PIL image, or the path of a file.

        Raises:
            UnreadableImage: as `load`.
        """
        image = to_rgb(image) if isinstance(image, Image.Image) else read_rgb(image)
        return self.normalise(torch.from_numpy(self._cropped(image))[None])[0]

    def load(self, path: Path | str, sha256: str = "") -> UInt8[Tensor, "3 s s"]:
        """Decode, resize and crop one image.

        Args:
            sha256: of the file (hex), as in the manifest; "" checks nothing.
        Raises:
            UnreadableImage: the file is missing, broken, or of a kind that has no RGB meaning.
            ChangedImage: its bytes are others than those of `sha256`.
        """
        return torch.from_numpy(self.pixels(path, sha256))

    def pixels(self, path: Path | str, sha256: str = "") -> UInt8[np.ndarray, "3 s s"]:
        """As `load`, for NumPy: its copies run on the calling thread alone, those of torch on a pool of each thread's own."""
        return self._cropped(read_rgb(path, sha256))

    def _cropped(self, image: Image.Image) -> UInt8[np.ndarray, "3 s s"]:
        return np.ascontiguousarray(np.asarray(self.crop(image)).transpose(2, 0, 1))  # (s, s, 3) -> (3, s, s)

    def crop(self, image: Image.Image) -> Image.Image:
        """Resize to size / crop_pct, as `crop_mode` says, and take the centre (size, size); timm's evaluation geometry."""
        short = math.floor(self.size / self.crop_pct)
        if self.crop_mode == "center":
            image = _middle(image)
        width, height = image.size
        # The longer side is cut down to an integer, as torchvision.transforms.Resize does.
        new = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        new = new if self.crop_mode == "center" else (short, short)
        image = self.resize(image, new)
        left, top = round((new[0] - self.size) / 2.0), round((new[1] - self.size) / 2.0)
        return image.crop((left, top, left + self.size, top + self.size))

    def whole(self) -> Transform:
        """The same without a crop: an image of any shape squashed to (size, size), as boxes, masks and depth speak of all."""
        return replace(self, crop_pct=1.0, crop_mode="squash")

    def resize(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """An RGB image resized to (width, height), by Pillow or by torch as `resizing` says."""
        if size == image.size:
            return image
        if self.resizing == "pillow":
            return image.resize(size, INTERPOLATIONS[self.interpolation])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, h, w), channels last in memory
        pixels = F.interpolate(pixels, size[::-1], mode=self.interpolation, antialias=True)
        return Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())

    def normalise(self, batch: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """(value / 255 - mean) / std per channel in float32, on the device of the batch.

        Raises:
            ValueError: the batch is not uint8 of shape (b, 3, s, s).
        """
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
            raise ValueError(f"batch is {batch.dtype} {tuple(batch.shape)}; expected torch.uint8 (b, 3, s, s)")
        mean, std = _channels(self.mean, batch.device), _channels(self.std, batch.device)
        return batch.float().div_(255).sub_(mean).div_(std)  # in place: a third of the memory


@lru_cache(maxsize=64)
def _channels(values: tuple[float, float, float], device: torch.device) -> Float[Tensor, "1 3 1 1"]:
    """One value a channel on a device, kept: to bring it there anew would wait for the GPU at each batch."""
    with torch.inference_mode(False):  # usable inside and outside of that mode, wherever it was made
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


def _middle(image: Image.Image) -> Image.Image:
    """An image without its ends where it is longer than LONGEST times its shorter side; a centre crop never sees them."""
    width, height = image.size
    kept = LONGEST * min(width, height)
    if max(width, height) <= kept:
        return image
    left, top = max(0, (width - kept) // 2), max(0, (height - kept) // 2)
    return image.crop((left, top, width - left, height - top))
