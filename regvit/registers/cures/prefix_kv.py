"""`prefix_kv`: fixed sinks before the patches of the later blocks, and no attention to the outliers that are left.

Of calibration images the patches of largest norm at the detection block are taken, and what the attention of each later
block saw of them. These enter as further keys and values, right after the prefix tokens and without a position; as
queries they are dropped. Keys at outliers are masked as by `mask_attention`: for other tokens that is as if they were
deleted, and every patch keeps its place in the maps. It changes every image.

Source: Kim et al. 2025 (RegCache), arXiv:2510.04547: registers curated in the middle layers, their keys and values cached,
remaining sinks deleted. There the layer is the most sensitive one to quantisation, here it is the detection block; the
number of registers could not be read, and one is the default.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.hooks import blocks, watch_inputs, watch_outputs
from regvit.models.tokens import TokenLayout
from regvit.registers.cures.given import Given
from regvit.registers.cures.mask_attention import maskable, visible
from regvit.registers.cures.mixins import CureMixin, ToldOutliers, tell_outliers
from regvit.registers.mixed_class import mix


class Sinks(nn.Module):
    """Tokens that an attention sees besides its own, after the first `place` ones."""

    def __init__(self, tokens: Float[Tensor, "m d"], place: int, told: ToldOutliers):
        super().__init__()
        self.place, self.told = place, told
        self.register_buffer("tokens", tokens, persistent=False)


class _Prefixed(CureMixin):
    """An attention with further keys and values."""

    holds = ("sinks",)

    @property
    def added_keys(self) -> tuple[int, int]:
        """Where keys stand that are no tokens, and how many; see `regvit.models.attention`."""
        return self.sinks.place, len(self.sinks.tokens)

    @property
    def num_prefix_tokens(self) -> int:
        """With the sinks: rotary positions start after them."""
        if "num_prefix_tokens" not in self.__dict__:
            raise AttributeError("num_prefix_tokens")
        return self.__dict__["num_prefix_tokens"] + len(self.sinks.tokens)

    def forward(self, x: Float[Tensor, "b n d"], *args: object, attn_mask: None = None, **kwargs: object) -> Tensor:
        place, count = self.added_keys
        if attn_mask is not None:
            raise ValueError("prefix_kv masks its own keys and takes no attn_mask; leave it out, or take another cure")
        sinks = self.sinks.tokens.to(x.dtype).expand(x.shape[0], -1, -1)
        seen = torch.cat([x[:, :place], sinks, x[:, place:]], dim=1)
        mask = visible(self.sinks.told.patches, place + count)
        out = super().forward(seen, *args, attn_mask=mask, **kwargs)
        return torch.cat([out[:, :place], out[:, place + count :]], dim=1)


@torch.inference_mode()
def calibrate(
    model: nn.Module, batches: Iterable[Float[Tensor, "b 3 h w"]], given: Given, tokens: int
) -> dict[str, Tensor]:
    """What the attentions of the later blocks see of the strongest outliers: `sinks` (l, tokens, d).

    Raises:
        ValueError: the images have fewer outliers than tokens are wanted.
    """
    every, layout, first = blocks(model), TokenLayout.of(model), given.detection.layer + 1
    attentions = _prefixable(model, first)
    norms: list[Tensor] = []
    inputs: dict[int, Tensor] = {}
    strongest = torch.zeros(0)
    sinks = None
    parameter = next(model.parameters())
    with (
        watch_outputs({0: every[first - 1]}, lambda _, x: norms.append(layout.patches(x).float().norm(dim=-1))),
        watch_inputs(dict(enumerate(attentions)), lambda at, x: inputs.update({at: layout.patches(x).float()})),
    ):
        for images in batches:
            model.forward_features(images.to(parameter.device, parameter.dtype))
            seen = torch.stack([inputs[at] for at in range(len(attentions))]).flatten(1, 2).cpu()  # (l, bp, d)
            sinks = seen if sinks is None else torch.cat([sinks, seen], dim=1)
            strongest = torch.cat([strongest, norms.pop().flatten().cpu()])
            order = strongest.argsort(descending=True, stable=True)[:tokens]
            strongest, sinks = strongest[order], sinks[:, order]
    if not (strongest > given.detection.threshold).sum() == tokens:
        raise ValueError(
            f"the images have fewer than {tokens} outliers to take sinks from; calibrate on more, or set tokens lower"
        )
    return {"sinks": sinks}


def apply(model: nn.Module, given: Given, tokens: int) -> None:
    """Adds the sinks that were measured to all blocks after the detection block.

    Raises:
        ValueError: an attention takes no mask, or is no module of its own.
    """
    layout, first = TokenLayout.of(model), given.detection.layer + 1
    attentions, device = _prefixable(model, first), next(model.parameters()).device
    told = tell_outliers(model, given.detection)
    for attention, sinks in zip(attentions, given.measured["sinks"].to(device), strict=True):
        mix(attention, _Prefixed, sinks=Sinks(sinks, layout.prefix, told))


def _prefixable(model: nn.Module, first: int) -> list[nn.Module]:
    for block in blocks(model)[first:]:
        if not isinstance(getattr(block, "attn", None), nn.Module):
            raise ValueError(
                f"{type(block).__name__} of {type(model).__name__} attends without a module of its own at .attn, so no key "
                "can be put before the patches"
            )
    return maskable(model, first)
