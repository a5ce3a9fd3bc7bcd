"""Normalised batches of a data set that can be gone through more than once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from regvit.data.manifest import Dataset
from regvit.data.prefetch import in_order
from regvit.data.transform import Transform


@dataclass(frozen=True)
class Batches:
    """Iterates over a data set in row order, decoding anew each time, so that memory does not grow with it.

    Args:
        label: of the progress bar; None shows none.
    """

    dataset: Dataset
    transform: Transform
    batch_size: int = 8
    workers: int = 0
    device: str = "cpu"
    label: str | None = "images"

    def __iter__(self) -> Iterator[Float[Tensor, "b 3 s s"]]:
        with tqdm(total=len(self.dataset), desc=self.label, unit="image", disable=self.label is None) as bar:
            for images in load_batches(self.dataset, self.transform, self.batch_size, self.workers):
                yield self.transform.normalise(images.to(self.device))
                bar.update(len(images))

    def select(self, rows: Sequence[int]) -> Batches:
        """Batches of some of the images, by their row numbers, in that order."""
        return dataclasses.replace(self, dataset=dataclasses.replace(self.dataset, rows=self.dataset.rows.select(rows)))


def load_batches(
    dataset: Dataset, transform: Transform, batch_size: int, workers: int = 0
) -> Iterator[UInt8[Tensor, "b 3 s s"]]:
    """Decode a data set in row order.

    Args:
        batch_size: images a batch; the last may be smaller.
        workers: decoding threads (Pillow frees the interpreter while it decodes and resizes); 0 decodes in the caller.
            They never change a value or the order, and run at most two batches ahead.
    Raises:
        ValueError: batch_size below 1 or workers below 0.
        UnreadableImage: an image cannot be decoded.
        ChangedImage: an image file is not the one of the manifest, where that has its SHA-256.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0")
    digests = dataset.rows.column("sha256")

    def load(i: int) -> UInt8[Tensor, "3 s s"]:
        return transform.load(dataset.image_path(i), digests[i])

    return _stacked(in_order(load, range(len(dataset)), workers, ahead=2 * batch_size), batch_size)


def _stacked(images: Iterator[Tensor], batch_size: int) -> Iterator[Tensor]:
    while batch := list(islice(images, batch_size)):
        yield torch.stack(batch)


def sample(dataset: Dataset, split: str, count: int, seed: int) -> Dataset:
    """At most `count` images of a split, drawn without replacement, in random order (sorted folders hold one class first).

    Raises:
        ValueError: the split holds no image.
    """
    rows = dataset.split_rows(split)
    if not len(rows):
        raise ValueError(f"data set {dataset.name} has no {split} images; give it a {split} split")
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    return dataclasses.replace(dataset, rows=dataset.rows.select(rows[order]))
