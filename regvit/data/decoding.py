"""Decoding image files of strangers: only decoders that work within this process are asked, files that are no regular ones
or too large are not read, and whatever a decoder raises means that this one image cannot be read.

Images come out as RGB: upright (EXIF), on white where they are transparent, grey made three equal channels, 16-bit grey
scaled to 8 bits. Always Pillow reads, so which images are refused, and why, depends on nothing else.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's names of what is opened: images of pixels, decoded by Pillow and its libraries alone. Its reader of PostScript
# would start Ghostscript on the file, whatever its name ends in. TGA has no mark at its beginning, so it comes last.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "ICO", "PCX", "QOI", "SGI", "SUN", "TGA"
)  # fmt: skip
MAX_BYTES = 1 << 30  # of an image file; the largest image that Pillow's guard lets pass has 0.72 GB, not compressed
BLOCK = 1 << 22  # pixels brought to RGB at once where that takes memory beyond that of the result
EIGHT_BITS = ((np.arange(1 << 16) * 255 + 32767) // 65535).astype(np.uint8)  # level of 255 for each of 65535, rounded
ORIENTATION = 0x0112  # EXIF tag; values from 5 on swap the sides


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names the path and the reason."""

    message = "{path} cannot be read as an image: {reason}; replace the file or take it out of the data set"

    def __init__(self, path: Path | str, reason: str):
        super().__init__(self.message.format(path=path, reason=reason))
        self.path, self.reason = Path(path), reason

    def __reduce__(self):  # the default would call the class with the message alone, in another process
        return type(self), (self.path, self.reason)


class ChangedImage(UnreadableImage):
    """An image file whose bytes are not those that the manifest was written for."""

    message = (
        "{path} is not the file that the data set was made of: {reason}; put that file back, or run download again"
    )


def read_rgb(path: Path | str, sha256: str = "") -> Image.Image:
    """The file at `path` as an RGB image; read once, also where its digest is checked.

    Args:
        sha256: of the file (hex), as in the manifest; "" checks nothing.
    Raises:
        UnreadableImage: as `read_file` and `decode_rgb`.
        ChangedImage: its bytes are others than those of `sha256`.
    """
    content = read_file(path)
    if sha256 and (actual := hashlib.sha256(content).hexdigest()) != sha256:
        raise ChangedImage(path, f"its SHA-256 is {actual}, that in the manifest {sha256}")
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


def image_suffixes() -> tuple[str, ...]:
    """Suffixes, in lower case, of the files that can be decoded."""
    known = Image.registered_extensions().items()
    return (*sorted(suffix for suffix, name in known if name in FORMATS), ".mpo")  # MPO: JPEGs of two lenses


def usual_suffix(content: bytes) -> str:
    """Suffix of the format that these bytes of a decodable image file are in."""
    with open_image(io.BytesIO(content)) as image:
        return {"JPEG": ".jpg", "TIFF": ".tif"}.get(image.format, f".{image.format.lower()}")


@contextmanager
def opened(path: Path | str) -> Iterator[Image.Image]:
    """The image of a file, its pixels not decoded yet.

    Raises:
        UnreadableImage: the file is missing or broken; also where that shows only within the block.
    """
    try:
        check_file(path)
        with open_image(path) as image:
            yield image
    except UnreadableImage:
        raise
    except Exception as error:  # decoders have bugs, and one file must not stop a run
        raise UnreadableImage(path, f"{type(error).__name__}: {error}") from error


def original_size(path: Path | str) -> tuple[int, int]:
    """Width and height of an image, upright as EXIF says, from its header alone.

    Raises:
        UnreadableImage: the file is missing or has no header that is known.
    """
    with opened(path) as image:
        return image.size[::-1] if image.getexif().get(ORIENTATION, 1) >= 5 else image.size


def decode_rgb(content: bytes, path: Path | str) -> Image.Image:
    """The bytes of an image file as an RGB image, as the module says.

    Args:
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
    except Exception as error:  # as in `opened`
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
