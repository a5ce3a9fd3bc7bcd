"""Normalised batches of a data set that can be gone through more than once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from regvit.data.decoding import Transform, load_batches
from regvit.data.manifest import Dataset
from regvit.data.progress import progress


@dataclass(frozen=True)
class Batches:
    """Iterates over a data set in row order, decoding anew each time, so that memory does not grow with it.

    Args:
        label: what the progress line says.
    """

    dataset: Dataset
    transform: Transform
    batch_size: int = 8
    workers: int = 0
    device: str = "cpu"
    label: str = "images"

    def __iter__(self) -> Iterator[Float[Tensor, "b 3 s s"]]:
        with progress(len(self.dataset), self.label) as bar:
            for _, images in load_batches(self.dataset, self.transform, self.batch_size, self.workers):
                yield self.transform.normalise(images.to(self.device))
                bar.advance(len(images))

    def select(self, rows: Sequence[int]) -> Batches:
        """Batches of some of the images, by their row numbers, in that order."""
        return dataclasses.replace(self, dataset=dataclasses.replace(self.dataset, rows=self.dataset.rows.select(rows)))


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
