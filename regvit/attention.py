"""CLS-to-token attention of each block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .hooks import blocks, watch_inputs
from .tokens import TokenLayout


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Makes every attention layer compute its weights in the open; the fused kernels are back afterwards."""
    layers = [module for module in model.modules() if isinstance(getattr(module, "fused_attn", None), bool)]
    before = [layer.fused_attn for layer in layers]
    for layer in layers:
        layer.fused_attn = False
    try:
        yield
    finally:
        for layer, fused in zip(layers, before, strict=True):
            layer.fused_attn = fused


@contextmanager
def watch_cls_attention(model: nn.Module, layers: list[int]) -> Iterator[dict[int, Float[Tensor, "b n"]]]:
    """Inside the `with` block, each forward leaves the CLS attention of `layers`, mean over heads, in the yielded dict.

    Raises:
        ValueError: the model has no CLS token, a layer is out of range, or a block has no softmax weights to read.
    """
    all_blocks = blocks(model)
    if not TokenLayout.of(model).cls:
        raise ValueError("this model has no CLS token, so there is no CLS attention")
    drops = {}
    for layer in layers:
        if not 0 <= layer < len(all_blocks):
            raise ValueError(f"layer {layer} is out of range: the model has {len(all_blocks)} blocks")
        drops[layer] = getattr(getattr(all_blocks[layer], "attn", None), "attn_drop", None)
        if drops[layer] is None:
            raise ValueError(f"block {layer} ({type(all_blocks[layer]).__name__}) has no attention weights to read")
    seen: dict[int, Tensor] = {}

    def see(layer: int, weights: Float[Tensor, "b h n n"]) -> None:
        seen[layer] = weights[:, :, 0].mean(1)  # (b, n)

    with unfused(model), watch_inputs(drops, see):
        yield seen


@torch.inference_mode()
def cls_attention(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], layers: list[int] | None = None
) -> Float[Tensor, "l b n"]:
    """Attention of CLS to every token, mean over heads.

    Args:
        images: normalised, on the model's device.
        layers: block indices, all by default.
    Returns: weights that sum to 1 over tokens, one row a layer, in the order of `layers`.
    Raises:
        ValueError: see `watch_cls_attention`.
    """
    layers = list(range(len(blocks(model)))) if layers is None else layers
    with watch_cls_attention(model, layers) as seen:
        model.forward_features(images)
    return torch.stack([seen[layer] for layer in layers])
