"""`interpolate_lof`: patches of the last block but one with the largest local outlier factor become means of their neighbours.

With N_k(p) the k nearest other patches of p in its image, d their Euclidean distances and k(p) the largest of these:

    reach(p, q) = max(k(q), d(p, q))      lrd(p) = 1 / mean of reach(p, q) over N_k(p)
    LOF(p) = mean of lrd(q) over N_k(p) / lrd(p)                              (Breunig et al. 2000)

The share `fraction` of each image's patches with the largest LOF are replaced as in `interpolate`, be they outliers by
their norm or not: it changes every image, and needs no detection.

Source: Bai et al. 2024 (SC-CLIP), arXiv:2411.15869, section 3 and `clip/model.py` of its code: k = 30, 5 %, last block but
one. That code takes squared distances, and the patch's own k(p) in place of k(q); here it is the published LOF, as in
scikit-learn. Its other parts (self-correlation attention, several layers) are of segmentation with CLIP and left out.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regvit.models.hooks import blocks
from regvit.models.tokens import TokenLayout
from regvit.registers.cures.given import Given
from regvit.registers.cures.interpolate import interpolated
from regvit.registers.cures.mixins import PatchEdit, edit_output


class _InterpolateLof(PatchEdit):
    def __init__(self, layout: TokenLayout, neighbours: int, fraction: float):
        super().__init__(layout)
        self.neighbours, self.fraction = neighbours, fraction

    def patches(self, x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        return interpolated(x, largest(local_outlier_factor(x.float(), self.neighbours), self.fraction))


def apply(model: nn.Module, given: Given, neighbours: int, fraction: float) -> None:
    """Interpolates after the last block but one.

    Raises:
        ValueError: the model has one block.
    """
    every = blocks(model)
    if len(every) < 2:
        raise ValueError(f"{type(model).__name__} has one block, so none before the last; interpolate_lof needs two")
    edit_output(every[-2], _InterpolateLof(TokenLayout.of(model), neighbours, fraction))


def local_outlier_factor(x: Float[Tensor, "b p d"], neighbours: int) -> Float[Tensor, "b p"]:
    """LOF of each patch among those of its image; of fewer patches, all others are its neighbours."""
    count = min(neighbours, x.shape[1] - 1)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance + torch.diag(torch.full_like(distance[0, :, 0], torch.inf))
    near, index = distance.topk(count, dim=2, largest=False)  # (b, p, k)
    farthest = near[..., -1]  # (b, p)

    def at_neighbours(values: Float[Tensor, "b p"]) -> Float[Tensor, "b p k"]:
        return values[:, None].expand_as(distance).gather(2, index)

    density = 1 / (torch.maximum(at_neighbours(farthest), near).mean(2) + 1e-10)
    return at_neighbours(density).mean(2) / density


def largest(values: Float[Tensor, "b p"], fraction: float) -> Bool[Tensor, "b p"]:
    """The share of each row, rounded up, that is largest."""
    count = math.ceil(fraction * values.shape[1] - 1e-9)
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(count, dim=1).indices, True)
