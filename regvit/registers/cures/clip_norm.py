"""`clip_norm`: no patch leaves the detection block with a norm over its threshold τ.

    x ← x · min(1, τ (1 − ε) / |x|)     ε = 1e-6, as a norm of just τ would round to an outlier now and then

Other patches do not change by a bit. No source: what everybody tries first.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.hooks import blocks
from regvit.models.tokens import TokenLayout
from regvit.registers.cures.given import Given
from regvit.registers.cures.mixins import PatchEdit, edit_output

BELOW = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # ε of coarse numbers


class _Clip(PatchEdit):
    def __init__(self, layout: TokenLayout, threshold: float):
        super().__init__(layout)
        self.threshold = threshold

    def patches(self, x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        norm = x.float().norm(dim=-1, keepdim=True)
        wanted = self.threshold * (1 - BELOW.get(x.dtype, 1e-6))
        return torch.where(norm > wanted, (x.float() * (wanted / norm)).to(x.dtype), x)


def apply(model: nn.Module, given: Given) -> None:
    """Clips at the detection block."""
    edit_output(blocks(model)[given.detection.layer], _Clip(TokenLayout.of(model), given.detection.threshold))
