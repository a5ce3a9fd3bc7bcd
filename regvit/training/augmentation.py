"""Training batches: which images a step sees, and how they are cropped, mirrored and jittered (torchvision's v2).

Everything follows from seed and step, so that a training that is broken off goes on with the same pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from regvit.data.decoding import read_rgb
from regvit.data.manifest import Dataset
from regvit.data.prefetch import in_order
from regvit.data.transform import Transform
from regvit.training.recipe import Recipe


@dataclass(frozen=True)
class TrainingBatches:
    """Batches of a split whose images all have a label.

    Attributes:
        workers: decoding threads.
    Raises:
        ValueError: the split is empty, or an image has no label.
    """

    dataset: Dataset
    transform: Transform
    recipe: Recipe
    seed: int = 0
    workers: int = 0

    def __post_init__(self):
        if not len(self.dataset) or (self.dataset.labels() < 0).any():
            raise ValueError(
                f"data set {self.dataset.name} has no train images, or some without a label; label them all"
            )

    def from_step(self, first: int) -> Iterator[tuple[UInt8[Tensor, "b 3 s s"], Int[Tensor, " b"]]]:
        """Images and class indices of the steps from `first` on, to the last."""
        rows = [
            batch_of(len(self.dataset), self.recipe.batch_size, self.seed, step)
            for step in range(first, self.recipe.steps)
        ]
        digests, labels = self.dataset.rows.column("sha256"), torch.from_numpy(self.dataset.labels())
        augment = self._augment()

        def read(row: int) -> Image.Image:
            return read_rgb(self.dataset.image_path(row), digests[row])

        images = in_order(read, (int(row) for batch in rows for row in batch), self.workers, 2 * self.recipe.batch_size)
        for step, batch in enumerate(rows, first):
            with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
                torch.manual_seed(int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0]))
                pixels = torch.stack([augment(next(images)) for _ in batch])
            yield pixels, labels[torch.from_numpy(batch)]

    def _augment(self) -> v2.Compose:
        size, recipe, jitter = self.transform.size, self.recipe, self.recipe.colour_jitter
        how = InterpolationMode(self.transform.interpolation)
        crop = v2.RandomResizedCrop(size, scale=(recipe.crop_scale, 1.0), interpolation=how, antialias=True)
        flip = v2.RandomHorizontalFlip(0.5 if recipe.flip else 0.0)
        colours = [v2.ColorJitter(jitter, jitter, jitter)] if jitter else []
        return v2.Compose([crop if recipe.crop_scale < 1 else self.transform.crop, flip, *colours, v2.PILToTensor()])


def batch_of(n: int, size: int, seed: int, step: int) -> Int[np.ndarray, " b"]:
    """Rows of a step's batch: one random order after another, cut into equal lengths."""
    size = min(n, size)
    epoch, place = divmod(step, n // size)
    return np.random.default_rng([seed, epoch]).permutation(n)[place * size : (place + 1) * size]
