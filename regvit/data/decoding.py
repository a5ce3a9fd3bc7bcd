"""Decoding images: from a file to the uint8 tensor that a backbone expects, and from there to its float32 input.

The geometry is that of timm's evaluation transform (shorter side to size / crop_pct, then a centre crop); images stay
uint8 until they are on the device, where `normalise` makes them float32. Files are always read by Pillow, so that which
images are refused, and why, depends on nothing else. They are resized by

    pillow  what timm's transform does, to the last bit
    torch   torch's uint8 kernel, which torchvision's transforms use on tensors: it takes 4 to 6 tenths of the time for
            reading and resizing a photograph, and moves some pixels in a thousand by 1 or 2 levels of 255. Its levels
            depend on the processor too (AVX2 or not), so that features made on two machines may differ in their last
            digits where Pillow's do not.

A file is a stranger's: only decoders that work within this process are asked, files that are no regular ones or too
large are not read, and whatever a decoder raises means that this one image cannot be read.
"""

import hashlib
import io
import math
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from regvit.data.manifest import Dataset

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
# Pillow's names of what is opened: images of pixels, decoded by Pillow and its libraries alone. Its reader of PostScript
# would start Ghostscript on the file, whatever its name ends in. TGA has no mark at its beginning, so it comes last.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "ICO", "PCX", "QOI", "SGI", "SUN", "TGA"
)  # fmt: skip
MAX_BYTES = 1 << 30  # of an image file; the largest image that Pillow's guard lets pass has 0.72 GB, not compressed
BLOCK = 1 << 22  # pixels brought to RGB at once where that takes memory beyond that of the result
EIGHT_BITS = ((np.arange(1 << 16) * 255 + 32767) // 65535).astype(np.uint8)  # level of 255 for each of 65535, rounded
BROKEN = (Exception,)  # what a decoder may raise on a broken file: decoders have bugs, and one file must not stop a run


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names the path and the reason."""

    message = "{path} cannot be read as an image: {reason}; replace the file or take it out of the data set"

    def __init__(self, path: Path | str, reason: str):
        super().__init__(self.message.format(path=path, reason=reason))
        self.path, self.reason = Path(path), reason

    def __reduce__(
        self,
    ):  # the default calls the class with the message alone; raised in another process it must come back
        return type(self), (self.path, self.reason)


class ChangedImage(UnreadableImage):
    """An image file whose bytes are not those that the manifest was written for."""

    message = (
        "{path} is not the file that the data set was made of: {reason}; put that file back, or run download again"
    )


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
        image = self.crop(read_rgb(path, sha256))
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


def read_rgb(path: Path | str, sha256: str = "") -> Image.Image:
    """The file at `path` as an RGB image, see `decode_rgb`; read once, also where its digest is checked.

    Args:
        sha256: of the file (hex), as in the manifest; "" checks nothing.
    Raises:
        UnreadableImage: as `read_file` and `decode_rgb`.
        ChangedImage: its bytes are others than those of `sha256`.
    """
    content = read_file(path)
    if sha256 and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ChangedImage(path, f"its SHA-256 is {found}, that in the manifest {sha256}")
    return decode_rgb(content, path)


def read_file(path: Path | str) -> bytes:
    """The bytes of an image file, not decoded.

    Raises:
        UnreadableImage: as `check_file`, or the file is missing or may not be read.
    """
    try:
        check_file(path)
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(path, error.strerror or str(error)) from error


def check_file(path: Path | str) -> None:
    """Holds a file to what can be opened without harm.

    Raises:
        OSError: there is no such file.
        UnreadableImage: it is no regular one (a pipe would wait for ever), or it has more than MAX_BYTES.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImage(path, "not a regular file")
    if status.st_size > MAX_BYTES:
        raise UnreadableImage(path, f"it has {status.st_size} bytes; an image file may have {MAX_BYTES}")


def open_image(file: Path | str | BinaryIO) -> Image.Image:
    """Pillow's `Image.open` for files of strangers: by the decoders of FORMATS alone, whatever the file's name.

    Raises:
        UnidentifiedImageError: none of them knows the file.
    """
    return Image.open(file, formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this version of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_rgb(content: bytes, path: Path | str) -> Image.Image:
    """The bytes of an image file as an RGB image: upright (EXIF), on white where it is transparent, grey made three
    equal channels, 16-bit grey scaled to 8 bits.

    Args:
        content: of the file.
        path: to be named if the bytes are no image.
    Raises:
        UnreadableImage: the bytes are broken, too large for Pillow's guard, of none of FORMATS, or have float pixels.
    """
    try:
        with open_image(io.BytesIO(content)) as image:
            ImageOps.exif_transpose(image, in_place=True)  # decodes; in place it does not copy what is upright
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, "empty file" if not content else "not an image of a known format") from error
    except BROKEN as error:
        raise UnreadableImage(path, f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, composited on white.

    Raises:
        ValueError: float pixels, whose range is not known, or whole numbers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; store it with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        low, high = image.getextrema() if image.mode == "I" else (0, 65535)
        if low < 0 or high > 65535:
            raise ValueError(f"its grey values span {low} to {high}, beyond 16 bits")
        return _by_rows(image, lambda part: Image.fromarray(EIGHT_BITS[np.asarray(part)]).convert("RGB"))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _by_rows(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _by_rows(image: Image.Image, rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `rgb`, which treats each pixel alone, makes of an image, of BLOCK pixels (or one row) at a time."""
    rows = max(1, BLOCK // image.width)
    if rows >= image.height:
        return rgb(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        whole.paste(rgb(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return whole


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
        ChangedImage: an image file is not the one of the manifest, where that has its SHA-256.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0")

    def load(i: int) -> UInt8[Tensor, "3 s s"]:
        return transform.load(dataset.image_path(i), dataset.rows[i].sha256)

    return _batches(in_order(load, range(len(dataset)), workers, ahead=2 * batch_size), batch_size)


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
