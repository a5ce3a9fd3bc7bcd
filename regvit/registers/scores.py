"""Scores of MLP neurons as running sums, whose memory does not grow with the number of images.

    activation_u  = mean over images of the mean |a_u| at the image's outliers        (Jiang et al. 2025)
    attribution_u = (E_out[a_u] - E_rest[a_u]) * (s * W[:, u]) . e / |e|^2,    e = E_out[x] - E_rest[x]

Products with 0, 1 and 1/n are taken where the activations are, sums in float64. An image can be taken back, or its
outliers be changed, by giving its activations again: a sum takes what is new less what is old.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regvit.models.hooks import output_projection, residual_scale


class NoOutliers(ValueError):
    """No patch is an outlier, so there is nothing to score."""


@dataclass(frozen=True)
class Scores:
    """Scores of all neurons up to the detection layer, (l, k) each; attribution is None where it is not defined."""

    activation: Float[Tensor, "l k"]
    attribution: Float[Tensor, "l k"] | None


class Sums:
    """Sums over outlier patches and over all of them.

    Args:
        depth: blocks up to the detection layer.
        width: neurons of a block.
        device: of the activations.
    """

    def __init__(self, depth: int, width: int, device: torch.device):
        self._few = (
            device.type == "cpu"
        )  # picking the outliers' rows would make a GPU wait, so there all rows are taken
        self._exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=self._exact, device=device)

        self._absolute, self._out, self._all = zeros(depth, width), zeros(depth, width), zeros(depth, width)
        self._residual_out, self._residual_all = zeros(1), zeros(1)  # (d,) from the first batch on
        self._images, self._n_out, self._n_all = zeros(1), zeros(1), zeros(1)

    def add(
        self,
        activations: Sequence[Float[Tensor, "b p k"]],
        residual: Float[Tensor, "b p d"],
        outliers: Bool[Tensor, "b p"],
        before: Bool[Tensor, "b p"] | None = None,
        fresh: Bool[Tensor, " b"] | None = None,
        sparse: Sequence[Bool[Tensor, "b k"]] | None = None,
    ) -> None:
        """Adds a batch; nothing here waits for a GPU.

        Args:
            activations: input of the MLP's output projection at the patches, of each block up to the detection layer.
            residual: the patches at the detection layer.
            outliers: which patches are outliers.
            before: which were when the image was added; none where it was not.
            fresh: which images are new; all by default.
            sparse: of each block, the neurons that may score by activation in an image; all by default.
        """
        before = torch.zeros_like(outliers) if before is None else before
        fresh = torch.ones_like(outliers[:, 0]) if fresh is None else fresh
        rows = (outliers | before).nonzero(as_tuple=True) if self._few else ...
        dtype = self._exact if self._few else torch.float32  # of few rows, float64 costs nothing
        change = (outliers.to(dtype) - before.to(dtype))[rows]
        mean = (_shares(outliers, dtype) - _shares(before, dtype))[rows]
        for layer, a in enumerate(activations):
            hot = a[rows]
            weight = mean[..., None]
            if sparse is not None:
                weight = weight * (sparse[layer][rows[0]] if self._few else sparse[layer][:, None])
            self._absolute[layer] += self._total(hot.abs() * weight)
            self._out[layer] += self._total(hot * change[..., None])
            self._all[layer] += self._whole(a, fresh)
        self._residual_out = self._residual_out + self._total(residual[rows] * change[..., None])
        self._residual_all = self._residual_all + self._whole(residual, fresh)
        self._n_out += outliers.sum() - before.sum()
        self._n_all += fresh.sum() * outliers.shape[1]
        self._images += outliers.any(1).sum() - before.any(1).sum()

    @property
    def everywhere(self) -> bool:
        """Whether every patch is an outlier, so that there is nothing to compare them with."""
        return bool(self._n_out == self._n_all)

    def scores(self, blocks: Sequence[nn.Module], attribution: bool = True) -> Scores:
        """The scores of what was added, on the CPU.

        Args:
            blocks: those up to the detection layer.
            attribution: False leaves that score out (for models in which it is not defined).
        Raises:
            NoOutliers: no patch is an outlier.
            ValueError: attribution is wanted and every patch is one, or it is not defined for the blocks.
        """
        n_out, n_all = int(self._n_out), int(self._n_all)
        if not n_out:
            raise NoOutliers(f"none of the {n_all} patches is an outlier, so no neuron can be scored")
        activation = (self._absolute / self._images).cpu()
        if not attribution:
            return Scores(activation, None)
        if n_out == n_all:
            raise ValueError(
                f"all of the {n_all} patches are outliers, so nothing is left to compare them with; give a larger threshold"
            )
        n_rest = n_all - n_out
        excess = self._residual_out / n_out - (self._residual_all - self._residual_out) / n_rest  # (d,)
        gap = self._out / n_out - (self._all - self._out) / n_rest  # (l, k)
        writes = torch.stack(
            [(excess * residual_scale(b)) @ output_projection(b).weight.detach().to(excess) for b in blocks]
        )  # (l, k)
        return Scores(activation, (gap * writes / excess.square().sum()).cpu())

    def _total(self, values: Float[Tensor, "... k"]) -> Float[Tensor, " k"]:
        return values.sum(tuple(range(values.ndim - 1)), dtype=self._exact)

    def _whole(self, values: Float[Tensor, "b p k"], fresh: Bool[Tensor, " b"]) -> Float[Tensor, " k"]:
        """Sum over the patches of the new images: of an image in float32, over images in float64."""
        return self._total(values.sum(1, dtype=torch.float32) * fresh[:, None])


def _shares(mask: Bool[Tensor, "b p"], dtype: torch.dtype) -> Float[Tensor, "b p"]:
    """One over the image's number of outliers at each of them, zero elsewhere."""
    return mask.to(dtype) / mask.sum(1, keepdim=True).clamp_min(1).to(dtype)
