"""Segmentation in context: patches take the labels of their nearest neighbours in a memory of labelled patches.

For a patch of unit feature x and the k patches of the memory most similar to it, of unit features xᵢ and labels yᵢ, the
shares of the classes among the pixels of patch i:

    wᵢ = exp(x · xᵢ / T) / Σⱼ exp(x · xⱼ / T),    y = Σ wᵢ yᵢ

y is upsampled (bilinear) to the mask's own size, and the class of a pixel is its largest entry. Nothing is trained, so
that a few spoilt tokens cannot be washed out. Published: k = 30, T = 0.02, a memory of 10,240,000 patches.

Where the memory is smaller than the training set, every image gives as many patches, those of the smallest u · Σ_c f_c:
f_c is the number of the image's patches that show class c, the sum is over the classes of the patch, and u is uniform in
[0, 1], so that rare classes are kept first.

Deviations: pixels of `IGNORE` take no part in labels (the public code counts them as background); images are seen once,
without augmentation.

Sources: Balažević et al. 2023, arXiv:2306.01667, section 3 and appendix; the choice of patches as in the public code
`open-hummingbird-eval`. Shape letters: b image, p patch, n patch of the memory, d channel, c class, k neighbour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from regvit.data.dense_labels import IGNORE
from regvit.measures.dense.dense_heads import PatchTokens, on_grid, pixels_of_patches
from regvit.probing.neighbours import nearest


@dataclass(frozen=True)
class InContext:
    """How labels are looked up.

    Args:
        memory: patches held at most, as many of each image; None: all.
        neighbours: k.
        temperature: T.
        seed: of the patches that are held.
    Raises:
        ValueError: a number is out of range.
    """

    memory: int | None = None
    neighbours: int = 30
    temperature: float = 0.02
    seed: int = 0

    def __post_init__(self):
        if self.neighbours < 1 or not self.temperature > 0 or (self.memory is not None and self.memory < 1):
            raise ValueError(f"{self}: expected at least 1 neighbour, a temperature above 0 and a memory of at least 1")


@dataclass(frozen=True)
class Memory:
    """Labelled patches, and the labels that they give to others.

    Attributes:
        features: as the model gave them.
        labels: shares of the classes among the known pixels of each patch; rows sum to 1.
    """

    features: Float[np.ndarray, "n d"]
    labels: Float[np.ndarray, "n c"]
    how: InContext
    device: str = "cpu"

    @torch.inference_mode()
    def __call__(self, patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b c g g"]:
        """Shares of the classes at each patch, on the grid of a square image."""
        b, p, _ = patches.shape
        labels = torch.from_numpy(self.labels).to(self.device)
        k = min(self.how.neighbours, len(labels))
        found = torch.empty(b * p, labels.shape[1], device=self.device)
        for rows, cosines, places in nearest(self.features, patches.flatten(0, 1).cpu().numpy(), k, self.device):
            weights = (cosines / self.how.temperature).softmax(1)
            found[rows] = torch.einsum("bk,bkc->bc", weights, labels[places])
        return on_grid(found.unflatten(0, (b, p)))


def remember(
    tokens: PatchTokens,
    mask: Callable[[int], UInt8[np.ndarray, "h w"]],
    n_classes: int,
    how: InContext,
    device: str = "cpu",
) -> Memory:
    """The memory of some rows of a store.

    Args:
        mask: of a row, values 0 to n_classes − 1 or `IGNORE`.
    Raises:
        ValueError: no pixel of the masks is known.
    """
    generator, features, labels = np.random.default_rng(how.seed), [], []
    each = tokens.side**2 if how.memory is None else max(1, how.memory // len(tokens))
    for rows, patches in tokens.in_order():
        for row, own in zip(rows, patches.numpy(), strict=True):
            pixels = patch_pixels(mask(row), tokens.side, n_classes)
            kept = rarest(pixels, each, generator)
            features.append(own[kept])
            labels.append((pixels[kept] / pixels[kept].sum(1, keepdims=True)).astype(np.float32))
    if not any(map(len, labels)):
        raise ValueError(f"the {len(tokens)} masks know no pixel; give the training split masks with classes")
    return Memory(np.concatenate(features), np.concatenate(labels), how, device)


def patch_pixels(mask: UInt8[np.ndarray, "h w"], side: int, n_classes: int) -> Float[np.ndarray, "p c"]:
    """How many pixels of each class lie in the square of each patch; those of `IGNORE` are left out."""
    patch = pixels_of_patches(np.arange(side**2), *mask.shape)
    known = mask != IGNORE
    cells = patch[known] * n_classes + mask[known]
    return np.bincount(cells, minlength=side**2 * n_classes).reshape(side**2, n_classes).astype(float)


def rarest(pixels: Float[np.ndarray, "p c"], most: int, generator: np.random.Generator) -> np.ndarray:
    """The patches of an image that go into the memory, at most so many, ascending; none without a known pixel."""
    present = pixels > 0
    known = np.flatnonzero(present.any(1))
    if len(known) <= most:
        return known
    scores = (present @ present.sum(0))[known] * generator.random(len(known))
    return np.sort(known[np.argsort(scores, kind="stable")[:most]])
