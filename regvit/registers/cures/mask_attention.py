"""`mask_attention`: after the detection block, no token attends to an outlier.

    A[i, j] = softmax_j(q_i · k_j + m_ij),    m_ij = −∞ where j is an outlier, in all later blocks, else 0

`queries: cls` masks for the CLS query alone. The outliers themselves stay in the sequence, with their norm: whoever reads
patches still finds them. Without outliers the mask lets everything through, and only the kernel's rounding differs.

Source: Lu et al. 2025, arXiv:2507.16018, proposes a mask against massive and artifact tokens; which blocks and queries it
masks could not be read there, so both variants are offered.
"""

from __future__ import annotations

import inspect

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regvit.models.attention import attention_of
from regvit.models.hooks import blocks
from regvit.models.tokens import TokenLayout
from regvit.registers.cures.given import Given
from regvit.registers.cures.mixins import CureMixin, tell_outliers
from regvit.registers.mixed_class import mix

Mask = Bool[Tensor, "b 1 q n"] | Float[Tensor, "b h q n"]


class _Masked(CureMixin):
    """An attention whose keys at outliers are masked."""

    holds = ("told", "layout", "cls_only")

    def forward(
        self, x: Float[Tensor, "b n d"], *args: object, attn_mask: Mask | None = None, **kwargs: object
    ) -> Tensor:
        allowed = visible(self.told.patches, self.layout.prefix)
        if self.cls_only:
            others = torch.arange(x.shape[1], device=x.device)[:, None] >= self.layout.cls  # (n, 1)
            allowed = allowed | others
        return super().forward(x, *args, attn_mask=both(attn_mask, allowed), **kwargs)


def apply(model: nn.Module, given: Given, queries: str) -> None:
    """Masks in all blocks after the detection block.

    Raises:
        ValueError: an attention takes no mask, or there is no CLS token whose query could be masked alone.
    """
    layout = TokenLayout.of(model)
    if queries == "cls" and not layout.cls:
        raise ValueError(f"{type(model).__name__} has no CLS token; mask_attention needs queries: all there")
    attentions = maskable(model, given.detection.layer + 1)
    told = tell_outliers(model, given.detection)
    for attention in attentions:
        mix(attention, _Masked, told=told, layout=layout, cls_only=queries == "cls")


def maskable(model: nn.Module, first: int) -> list[nn.Module]:
    """The attentions of the blocks from `first` on.

    Raises:
        ValueError: one takes no mask.
    """
    found = [attention_of(block) for block in blocks(model)[first:]]
    for attention in found:
        if "attn_mask" not in inspect.signature(attention.forward).parameters:
            raise ValueError(
                f"{type(attention).__name__} of {type(model).__name__} takes no attn_mask, so it cannot be masked"
            )
    return found


def visible(outliers: Bool[Tensor, "b p"], before: int) -> Bool[Tensor, "b 1 1 n"]:
    """The keys that may be attended to: `before` tokens before the patches, and all patches but outliers.

    Where every key would be masked, none is.
    """
    keys = torch.cat([torch.ones_like(outliers[:, :1]).expand(-1, before), ~outliers], dim=1)
    return (keys | ~keys.any(1, keepdim=True))[:, None, None]


def both(given: Mask | None, allowed: Bool[Tensor, "b 1 q n"]) -> Mask:
    """A mask under which only what both let through is seen."""
    if given is None:
        return allowed
    return given & allowed if given.dtype == torch.bool else torch.where(allowed, given, -torch.inf)
