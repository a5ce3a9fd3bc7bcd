"""Decoding images: from a file to the uint8 tensor that a backbone expects, and from there to its float32 input.

The geometry is that of timm's evaluation transform (shorter side to size / crop_pct, then a centre crop); images stay
uint8 until they are on the device, where `normalise` makes them float32. Files are always read by Pillow, so that which
images are refused, and why, depends on nothing else. They are resized by

    pillow  what timm's transform does, to the last bit
    torch   torch's uint8 kernel, which torchvision's transforms use on tensors: it takes 4 to 6 tenths of the time for
            reading and resizing a photograph, and moves some pixels in a thousand by 1 or 2 levels of 255. Its levels
            depend on the processor too (AVX2 or not), so that features made on two machines may differ in their last
            digits where Pillow's do not.
"""

import io
import math
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .manifest import Dataset

A = TypeVar("A")
B = TypeVar("B")

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
RESIZINGS = ("pillow", "torch")
TORCH_INTERPOLATIONS = ("bilinear", "bicubic")  # those that torch does with antialiasing
LONGEST = 100  # sides; of a longer image only the middle is resized: a line of 30,000 px would grow to gigabytes
# What Pillow's decoders raise on broken files, each meaning the same here.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names the path and the reason."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(
            f"{path} cannot be read as an image: {reason}; replace the file or take it out of the data set"
        )
        self.path, self.reason = Path(path), reason

    def __reduce__(
        self,
    ):  # the default calls the class with the message alone; raised in another process it must come back
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class Transform:
    """What turns an image into the input of a backbone.

    Attributes:
        size: side of the square crop, pixels.
        mean: of each channel, red, green, blue, on the scale 0 to 1.
        std: standard deviation of each channel, on the same scale.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        crop_pct: share of the resized shorter side that the crop keeps, in (0, 1].
        resizing: "pillow" or "torch", see the module.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    resizing: str = "pillow"

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
        if self.resizing not in RESIZINGS:
            raise ValueError(f"resizing {self.resizing!r} is unknown; use one of {', '.join(RESIZINGS)}")
        if self.resizing == "torch" and self.interpolation not in TORCH_INTERPOLATIONS:
            raise ValueError(
                f"torch has no antialiased {self.interpolation} interpolation (only {', '.join(TORCH_INTERPOLATIONS)}); "
                "use resizing 'pillow'"
            )

    def to_dict(self) -> dict:
        """Plain values for JSON; `from_dict` is the inverse. `resizing` is left out where it is Pillow's."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if self.resizing == "pillow":  # so that what was written before there was a choice stays as it is
            del values["resizing"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping) -> "Transform":
        """The transform that `to_dict` described.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        try:
            return cls(**values)
        except TypeError as error:
            keys = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"transform {dict(values)} does not fit; its keys are {keys}") from error

    def load(self, path: Path | str) -> UInt8[Tensor, "3 s s"]:
        """Decode, resize and crop one image.

        Raises:
            UnreadableImage: the file is missing, broken, or of a kind that has no RGB meaning.
        """
        return torch.from_numpy(self.pixels(path))

    def pixels(self, path: Path | str) -> UInt8[np.ndarray, "3 s s"]:
        """As `load`, for NumPy: its copies run on the calling thread alone, those of torch on a pool of each thread's own."""
        image = self.crop(read_rgb(path))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (s, s, 3) -> (3, s, s)

    def crop(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side to size / crop_pct and take the centre (size, size); timm's evaluation geometry."""
        image = _middle(image)
        short = math.floor(self.size / self.crop_pct)
        width, height = image.size
        # The longer side is cut down to an integer, as torchvision.transforms.Resize does.
        new = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = self.resize(image, new)
        left, top = round((new[0] - self.size) / 2.0), round((new[1] - self.size) / 2.0)
        return image.crop((left, top, left + self.size, top + self.size))

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
        mean = torch.tensor(self.mean, device=batch.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=batch.device).view(1, 3, 1, 1)
        return batch.float().div_(255).sub_(mean).div_(std)  # in place: a third of the memory


def _middle(image: Image.Image) -> Image.Image:
    """An image without its ends where it is longer than LONGEST times its shorter side; a centre crop never sees them."""
    width, height = image.size
    kept = LONGEST * min(width, height)
    if max(width, height) <= kept:
        return image
    left, top = max(0, (width - kept) // 2), max(0, (height - kept) // 2)
    return image.crop((left, top, width - left, height - top))


def read_rgb(path: Path | str) -> Image.Image:
    """The file at `path` as an RGB image, see `decode_rgb`.

    Raises:
        UnreadableImage: the file is missing, broken, too large for Pillow's guard, or has float pixels.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(path, error.strerror or str(error)) from error
    return decode_rgb(content, path)


def decode_rgb(content: bytes, path: Path | str) -> Image.Image:
    """The bytes of an image file as an RGB image: upright (EXIF), on white where it is transparent, grey made three
    equal channels, 16-bit grey scaled to 8 bits.

    Args:
        content: of the file.
        path: to be named if the bytes are no image.
    Raises:
        UnreadableImage: the bytes are broken, too large for Pillow's guard, or have float pixels.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            ImageOps.exif_transpose(image, in_place=True)  # decodes; in place it does not copy what is upright
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, "empty file" if not content else "not an image of a known format") from error
    except BROKEN as error:
        raise UnreadableImage(path, f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, composited on white.

    Raises:
        ValueError: float pixels, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; store it with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image, dtype=np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"its grey values span {grey.min()} to {grey.max()}, beyond 16 bits")
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def load_batches(
    dataset: Dataset, transform: Transform, batch_size: int, workers: int = 0
) -> Iterator[tuple[int, UInt8[Tensor, "b 3 s s"]]]:
    """Decode a data set in row order.

    Args:
        batch_size: images a batch; the last may be smaller.
        workers: decoding threads (Pillow frees the interpreter while it decodes and resizes); 0 decodes in the caller.
            They never change a value or the order, and run at most two batches ahead.
    Yields:
        (index of the first row, batch of shape (b, 3, s, s)).
    Raises:
        ValueError: batch_size below 1 or workers below 0.
        UnreadableImage: an image cannot be decoded.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0")
    paths = [dataset.image_path(i) for i in range(len(dataset))]
    return _batches(in_order(transform.load, paths, workers, ahead=2 * batch_size), batch_size)


def _batches(images: Iterator[Tensor], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    start = 0
    while batch := list(islice(images, batch_size)):
        yield start, torch.stack(batch)
        start += len(batch)


def in_order(function: Callable[[A], B], items: Iterable[A], workers: int, ahead: int) -> Iterator[B]:
    """`map` on `workers` threads (0: in the caller), results in order, at most `ahead` of them computed in advance.

    When the caller stops early, or a call raises, what has not begun is not begun any more.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="in_order")
    try:
        waiting, remaining = deque(), iter(items)
        waiting.extend(pool.submit(function, item) for item in islice(remaining, ahead))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
    finally:
        pool.shutdown(cancel_futures=True)
