"""`interpolate`: an outlier becomes the mean of those of its 3 × 3 neighbours that are none.

    x_p ← mean of x_q over q in N(p), q no outlier;   unchanged where there is no such q

`at: detection` does so where the detection block puts it out, so that all later blocks see the mean; `at: output` after
the last block (before the model's last norm), which cleans maps of features and leaves the attention to outliers as it is.
Images without outliers do not change by a bit. No source: the simplest foil; the mean is that of arXiv:2411.15869.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regvit.models.hooks import blocks
from regvit.models.tokens import TokenLayout
from regvit.registers.cures.given import Given
from regvit.registers.cures.mixins import PatchEdit, ToldOutliers, edit_output, tell_outliers


class _Interpolate(PatchEdit):
    """Outliers that were told become means."""

    def __init__(self, layout: TokenLayout, told: ToldOutliers):
        super().__init__(layout)
        self.told = told

    def patches(self, x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        return interpolated(x, self.told.patches)


def apply(model: nn.Module, given: Given, at: str) -> None:
    """Interpolates at the detection block, or after the last one."""
    every, told = blocks(model), tell_outliers(model, given.detection)
    block = every[given.detection.layer if at == "detection" else -1]
    edit_output(block, _Interpolate(TokenLayout.of(model), told))


def interpolated(x: Float[Tensor, "b p d"], outliers: Bool[Tensor, "b p"]) -> Float[Tensor, "b p d"]:
    """Patches, row by row of a square grid, with outliers replaced by the mean of their neighbours that are none.

    Raises:
        ValueError: the grid is no square.
    """
    side = math.isqrt(x.shape[1])
    if side**2 != x.shape[1]:
        raise ValueError(
            f"{x.shape[1]} patches form no square grid, so their neighbours are not known; use square images"
        )
    good = ~outliers[..., None]  # (b, p, 1)
    kept = torch.where(good, x, 0).float()

    def pooled(values: Float[Tensor, "b p m"]) -> Float[Tensor, "b p m"]:
        grid = values.mT.unflatten(2, (side, side))
        return F.avg_pool2d(grid, 3, stride=1, padding=1).flatten(2).mT

    share = pooled(good.float())
    mean = (pooled(kept) / share.clamp_min(1e-6)).to(x.dtype)
    return torch.where(good | (share == 0), x, mean)
