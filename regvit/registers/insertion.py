"""Zero tokens after the prefix of a model, without a weight being touched.

Where the model's own `_pos_embed` puts `reg_token` (or `dist_token`) last before the patches, two names show more than the
weights hold: that token ends with K zero rows, and `pos_embed` has K zero rows after the prefix where it covers it. timm's
code then inserts the tokens itself. In other models the first block does so. The weights stay what they are, under their
names, in `state_dict()`, for optimisers and for `.to()`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.hooks import blocks
from regvit.registers.mixed_class import Mixed, mix


def insert_zero_tokens(model: nn.Module, prefix: int, count: int) -> None:
    """Lets `count` zero tokens follow the `prefix` tokens of a model, in place."""
    embed = getattr(type(model), "_pos_embed", None)
    used = () if embed is None else embed.__code__.co_names
    for name, mixin in (("reg_token", _AfterRegToken), ("dist_token", _AfterDistToken)):
        if name in used and hasattr(model, name):
            mix(model, mixin, zero_tokens=(prefix, count))
            break
    else:
        mix(blocks(model)[0], _BeforeFirstBlock, zero_tokens=(prefix, count))
    # Attention pooling sees prefix tokens in timm's EVA always, in its ViT and NaFlex with `pool_include_prefix`.
    if getattr(model, "attn_pool", None) is not None and getattr(model, "pool_include_prefix", True):
        mix(model.attn_pool, _WithoutZeroTokens, zero_tokens=(prefix, count))


def padded(x: Float[Tensor, "b n d"], zero_tokens: tuple[int, int]) -> Float[Tensor, "b n2 d"]:
    """A sequence with zero tokens after its prefix."""
    prefix, count = zero_tokens
    return torch.cat([x[:, :prefix], x.new_zeros(x.shape[0], count, x.shape[2]), x[:, prefix:]], dim=1)


def unpadded(x: Float[Tensor, "b n2 d"], zero_tokens: tuple[int, int]) -> Float[Tensor, "b n d"]:
    """A sequence without the tokens that `padded` added, whatever they hold now."""
    prefix, count = zero_tokens
    return torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)


class OfRegisters(Mixed):
    """What test-time registers make of a module."""


class _AfterLastToken(OfRegisters):
    """A model whose `pos_embed` has rows of zeros for the tokens that follow its last prefix token."""

    zero_tokens: tuple[int, int]

    @property
    def pos_embed(self) -> Float[Tensor, "1 n d"] | None:
        table = _held(self, "pos_embed")
        return table if table is None or self.no_embed_class else padded(table, self.zero_tokens)

    def set_input_size(self, *args: object, **kwargs: object) -> None:
        """As the model's own, which here resamples what `pos_embed` shows, and puts it in the weight's place."""
        before = _held(self, "pos_embed")
        super().set_input_size(*args, **kwargs)
        table = _held(self, "pos_embed")
        if table is not before and not self.no_embed_class:
            rows = unpadded(table.detach(), self.zero_tokens)
            self._parameters["pos_embed"] = nn.Parameter(rows, requires_grad=before.requires_grad)


class _AfterRegToken(_AfterLastToken):
    @property
    def reg_token(self) -> Float[Tensor, "1 r d"]:
        return _lengthened(self, "reg_token")

    @property
    def num_reg_tokens(self) -> int:
        return self.reg_token.shape[1]


class _AfterDistToken(_AfterLastToken):
    @property
    def dist_token(self) -> Float[Tensor, "1 r d"]:
        return _lengthened(self, "dist_token")


class _BeforeFirstBlock(OfRegisters):
    """A block that puts the zero tokens in front of itself."""

    def forward(self, x: Float[Tensor, "b n d"], *args: object, **kwargs: object) -> Float[Tensor, "b n2 d"]:
        return super().forward(padded(x, self.zero_tokens), *args, **kwargs)


class _WithoutZeroTokens(OfRegisters):
    """An attention pooling that does not see them."""

    def forward(self, x: Float[Tensor, "b n2 d"], *args: object, **kwargs: object) -> Float[Tensor, "b d"]:
        return super().forward(unpadded(x, self.zero_tokens), *args, **kwargs)


def _lengthened(model: nn.Module, name: str) -> Float[Tensor, "1 r d"]:
    """A prefix token followed by zero rows; the rows alone where the model has none."""
    token = _held(model, name)
    like = next(model.parameters()) if token is None else token
    zeros = like.new_zeros(1, model.zero_tokens[1], model.embed_dim)
    return zeros if token is None else torch.cat([token, zeros], dim=1)


def _held(model: nn.Module, name: str) -> Tensor | None:
    """A weight by its name, as the model holds it."""
    for kept in (model._parameters, model._buffers):
        if kept.get(name) is not None:
            return kept[name]
    return None
