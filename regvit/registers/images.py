"""Images as people have them, as the batches that a search goes through more than once.

The search returns to some images by their number. So what may come in another order the second time, or changed by
augmentation, is read once and kept, as long as that takes no more than `KEPT_BYTES`; beyond it, each image is held against
a checksum of what it was the first time.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from regvit.data.decoding import FORMATS

BATCH_SIZE = 32
FOLDER_IMAGES = 1_000  # of a folder, drawn at random; a hundred varied ones do
KEPT_BYTES = 2**30  # of images that are read once: 1,700 of 224 px
KEYS = ("image", "images", "pixel_values", "img", "x")  # of a batch that is a dict

Batches = Iterable[Float[Tensor, "b 3 h w"]]
Loading = Callable[[Image.Image | Path | str], Float[Tensor, "3 s s"]]


def batches_of(images: object, transform: Loading) -> Batches:
    """Batches of normalised images that can be gone through again.

    Args:
        images: a tensor or array (b, c, h, w); a list of tensors (c, h, w), of batches, of PIL images or of paths; a
            folder; or anything that yields batches: tensors, `(images, labels)` or dicts, as a DataLoader does. What has
            a method `select(rows)` is taken as it is.
        transform: of PIL images and files.
    Raises:
        ValueError: these are no images, or not normalised ones; the message says what to do.
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if isinstance(images, Tensor):
        return _checked(images).split(BATCH_SIZE)
    if hasattr(images, "select"):
        return images
    if isinstance(images, str | Path):
        images = _drawn(Path(images))
    if isinstance(images, Sequence) and len(images):
        first = images[0]
        if isinstance(first, Image.Image | str | Path):
            return _Loaded(images, transform)
        if isinstance(first, np.ndarray | Tensor) and first.ndim == 3:
            return _checked(torch.stack([torch.as_tensor(image) for image in images])).split(BATCH_SIZE)
        if isinstance(first, Tensor):
            _checked(first)
            return images
    if not isinstance(images, Iterable):
        raise ValueError(f"the images are a {type(images).__name__}; give a tensor, a list, a folder or a DataLoader")
    return _ReadOnce(images)


class _Loaded:
    """PIL images or files, each loaded anew when its number comes up."""

    def __init__(self, images: Sequence, transform: Loading):
        self._images, self._transform = images, transform

    def __iter__(self) -> Iterator[Float[Tensor, "b 3 s s"]]:
        return iter(self.select(range(len(self._images))))

    def select(self, rows: Sequence[int]) -> Iterator[Float[Tensor, "b 3 s s"]]:
        """Batches of these images."""
        for start in range(0, len(rows), BATCH_SIZE):
            yield torch.stack([self._transform(self._images[row]) for row in rows[start : start + BATCH_SIZE]])


class _ReadOnce:
    """Batches of a loader of which nothing is known: kept, or beyond `KEPT_BYTES` held against what they were."""

    def __init__(self, loader: Iterable):
        self._loader = loader
        self._kept: list[Tensor] = []
        self._sums: list[float] = []
        self._bytes, self._passes = 0, 0

    def __iter__(self) -> Iterator[Float[Tensor, "b 3 h w"]]:
        self._passes += 1
        return self._first() if self._passes == 1 else iter(self._kept) if self._kept else self._again()

    def _first(self) -> Iterator[Tensor]:
        keeping = True
        for batch in self._loader:
            images = _checked(_images_in(batch))
            self._bytes += images.numel() * images.itemsize
            if keeping and self._bytes > KEPT_BYTES:
                keeping, self._kept = False, []
                if iter(self._loader) is self._loader:
                    raise ValueError(
                        f"more than {KEPT_BYTES >> 20} MiB of images come that can be gone through only once, and the "
                        "search goes back to some; give fewer (a few hundred do), a list, or a DataLoader"
                    )
            self._kept += [images] if keeping else []
            self._sums += _sums(images)
            yield images

    def _again(self) -> Iterator[Tensor]:
        start = 0
        for batch in self._loader:
            images = _images_in(batch)
            if _sums(images) != self._sums[start : start + len(images)]:
                raise ValueError(
                    "the images come in another order or changed when they are gone through again, so what was seen of "
                    "them cannot be matched; give a DataLoader with shuffle=False and without augmentation, or fewer images"
                )
            start += len(images)
            yield images


def _images_in(batch: object) -> Float[Tensor, "b 3 h w"]:
    """The images of what a loader yields."""
    if isinstance(batch, Mapping):
        known = [key for key in KEYS if key in batch]
        if not known:
            raise ValueError(
                f"a batch has the keys {', '.join(map(str, batch))}; its images are looked for under {', '.join(KEYS)}"
            )
        batch = batch[known[0]]
    elif isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ValueError(
            f"a batch holds a {type(batch).__name__}; expected a tensor, (images, labels) or a dict of them"
        )
    return batch


def _checked(images: Tensor) -> Float[Tensor, "b 3 h w"]:
    """Images that look as a model expects them."""
    if images.ndim != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (images, channels, height, width)")
    if images.shape[-1] in (1, 3, 4) and images.shape[1] > 16:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, as if their channels came last; give images.permute(0, 3, 1, 2)"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} and not normalised; give transform.normalise(images) of the backbone's transform, "
            "or the PIL images or files themselves"
        )
    if images.numel() and images.min() >= 0 and images.max() > 0:
        warnings.warn(
            f"no value of the images is below 0 (largest {images.max():.3g}), as if they were not normalised; a model "
            "sees other features then",
            stacklevel=3,
        )
    return images


def _sums(images: Tensor) -> list[float]:
    """A number for each image that another image, or its mirror image, hardly has."""
    flat = images.detach().flatten(1).double().cpu()
    return (flat @ torch.linspace(1, 2, flat.shape[1], dtype=torch.float64)).tolist()


def _drawn(folder: Path) -> list[Path]:
    """Images of a folder and those below it, in random order: sorted ones would be of one class."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that holds images")
    Image.init()
    suffixes = {suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS}
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no images; their names end in one of {', '.join(sorted(suffixes))}")
    return random.Random(0).sample(files, min(len(files), FOLDER_IMAGES))
