"""Patch features from inside a vision transformer: keys, queries, values and block outputs of chosen blocks.

    k, q, v   what a block's attention projects its (normalised) input to, all heads side by side, as the published code
              of LOST reads them: before query-key norms and rotary embeddings
    token     the block's output after the model's last norm, as DINOv2's `get_intermediate_layers` gives it

CLS and register tokens are left out by `TokenLayout`. Letters used for shapes: b image, p patch, n token, d channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.hooks import blocks, watch_inputs, watch_outputs
from regvit.models.tokens import TokenLayout

KINDS = ("k", "q", "v", "token")
PLACE = {"q": 0, "k": 1, "v": 2}  # in a fused projection


class Feature(NamedTuple):
    """Which feature of a patch: its kind, and the block that it is read in (0 is the first)."""

    kind: str
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}{self.layer}"


def last_layers(model: nn.Module, count: int, kinds: Iterable[str] = KINDS) -> tuple[Feature, ...]:
    """Every kind in each of the last `count` blocks (all blocks of a shallower model), kind by kind, layers ascending.

    Raises:
        ValueError: the count is below 1.
    """
    if count < 1:
        raise ValueError(f"count of layers is {count}; expected 1 or more")
    depth = len(blocks(model))
    return tuple(Feature(kind, layer) for kind in kinds for layer in range(max(0, depth - count), depth))


@contextmanager
def watch_patch_features(
    model: nn.Module, features: Iterable[Feature]
) -> Iterator[dict[Feature, Float[Tensor, "b p d"]]]:
    """Inside the `with` block, each forward leaves the patches' features in the yielded dict, in place of the last ones.

    Args:
        model: a timm vision transformer, with or without registers.
        features: what to read; each costs at most one projection more than the bare forward.
    Raises:
        ValueError: a kind is unknown, a layer is out of range, or a block has no projections that can be told apart.
    """
    wanted, all_blocks, layout = list(features), blocks(model), TokenLayout.of(model)
    for kind, layer in wanted:
        if kind not in KINDS:
            raise ValueError(f"feature kind is {kind!r}; expected one of {', '.join(KINDS)}")
        if not 0 <= layer < len(all_blocks):
            raise ValueError(f"layer {layer} is out of range: the model has {len(all_blocks)} blocks")
    norm = getattr(model, "norm", None)
    norm = norm if isinstance(norm, nn.Module) else nn.Identity()
    projections = {layer: [kind for kind, at in wanted if at == layer and kind != "token"] for _, layer in wanted}
    attentions = {layer: _attention(all_blocks[layer], layer) for layer, kinds in projections.items() if kinds}
    outputs = {layer: all_blocks[layer] for kind, layer in wanted if kind == "token"}
    seen: dict[Feature, Tensor] = {}

    def see_attention(layer: int, x: Float[Tensor, "b n d"]) -> None:
        patches = layout.patches(x)
        for kind in projections[layer]:
            seen[Feature(kind, layer)] = project(attentions[layer], patches, kind)

    def see_output(layer: int, x: Float[Tensor, "b n d"]) -> None:
        seen[Feature("token", layer)] = norm(layout.patches(x))

    with ExitStack() as stack:
        stack.enter_context(watch_inputs(attentions, see_attention))
        stack.enter_context(watch_outputs(outputs, see_output))
        yield seen


@torch.inference_mode()
def patch_features(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], features: Iterable[Feature]
) -> dict[Feature, Float[Tensor, "b p d"]]:
    """The features of one batch, from one forward.

    Args:
        images: normalised, on the model's device.
    Returns: in the order of `features`, patches in reading order.
    Raises:
        ValueError: see `watch_patch_features`.
    """
    wanted = list(features)
    with watch_patch_features(model, wanted) as seen:
        model.forward_features(images)
    return {feature: seen[feature] for feature in wanted}


def project(attention: nn.Module, x: Float[Tensor, "b n d"], kind: str) -> Float[Tensor, "b n d"]:
    """The query, key or value of tokens, all heads side by side; the projection alone, without norms or rotation.

    Args:
        attention: with one fused `qkv` layer (its bias may stand apart, as in EVA) or with `q_proj`, `k_proj`, `v_proj`.
        x: the attention's input.
        kind: `q`, `k` or `v`.
    """
    fused = getattr(attention, "qkv", None)
    if fused is None:
        return getattr(attention, f"{kind}_proj")(x)
    width = fused.weight.shape[0] // 3
    rows = slice(PLACE[kind] * width, (PLACE[kind] + 1) * width)
    bias = fused.bias if fused.bias is None else fused.bias[rows]
    if bias is None:
        bias = getattr(attention, f"{kind}_bias", None)
    return F.linear(x, fused.weight[rows], bias)


def _attention(block: nn.Module, layer: int) -> nn.Module:
    """The block's attention, if its query, key and value can be told apart."""
    attention = getattr(block, "attn", None)
    if isinstance(getattr(attention, "qkv", None), nn.Linear):
        return attention
    if all(isinstance(getattr(attention, f"{kind}_proj", None), nn.Linear) for kind in PLACE):
        return attention
    raise ValueError(
        f"block {layer} ({type(block).__name__}) has neither attn.qkv nor attn.q_proj, attn.k_proj, attn.v_proj as "
        "linear layers, so its queries, keys and values cannot be read; use the feature kind token"
    )
