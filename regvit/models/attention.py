"""Attention to all tokens, by block and head: of CLS and registers, or of any rows (`watch_attention`).

Where a block attends through torch's fused kernel, its weights are never made: `watch_attention` looks at the
queries q and keys k that the kernel is called with, after whatever the block did to them (normalised queries and keys,
rotary positions, a bias a head), and computes just the rows that are asked for:

    A[i, j] = softmax_j(scale * q_i . k_j + mask_ij),   j any token

For the prefix tokens that is (prefix, n) numbers a head instead of (n, n). Blocks without the kernel, and those which
subtract one softmax from another, are made to compute their weights in the open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regvit.models.hooks import blocks, watch_inputs
from regvit.models.tokens import TokenLayout


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
        ValueError: the model has no CLS token; see also `watch_prefix_attention`.
    """
    layers = list(range(len(blocks(model)))) if layers is None else layers
    with watch_prefix_attention(model, layers) as seen:
        model.forward_features(images)
    return cls_rows(model, seen, layers)


def cls_rows(
    model: nn.Module, seen: Mapping[int, Float[Tensor, "b h q n"]], layers: Sequence[int]
) -> Float[Tensor, "l b n"]:
    """Attention of CLS, mean over heads, of what `watch_prefix_attention` left in its dict.

    Raises:
        ValueError: the model has no CLS token.
    """
    layout = TokenLayout.of(model)
    if not layout.cls:
        raise ValueError("this model has no CLS token, so there is no CLS attention")
    cls = query_names(layout).index("cls")
    return torch.stack([seen[layer][:, :, cls].mean(1) for layer in layers])


@contextmanager
def watch_prefix_attention(
    model: nn.Module, layers: list[int] | None = None
) -> Iterator[dict[int, Float[Tensor, "b h q n"]]]:
    """Inside the `with` block, each forward leaves the attention of the prefix tokens in the yielded dict, by layer.

    Query q is the prefix token at place q of the sequence (see `query_names`). The weights
    are float32, before dropout, and sum to 1 over the n tokens; to less where a cure adds keys that are no tokens (an
    attention with `added_keys`: their place and number), which are left out. Differential attention subtracts one softmax from
    another: both are given, as twice the heads.

    Args:
        layers: block indices, all by default.
    Raises:
        ValueError: the model has no prefix token, a layer is out of range, or a block has no softmax weights to read.
    """
    queries = TokenLayout.of(model).prefix
    if not queries:
        raise ValueError("this model has neither CLS nor registers, so no prefix token attends to anything")
    seen: dict[int, Tensor] = {}
    with watch_attention(model, layers, lambda layer, rows: seen.update({layer: rows[:queries]})):
        yield seen


class AttentionRows:
    """The attention matrix of a block, of which rows are computed when they are asked for: `rows[i:j]` is (b, h, q, n).

    Args:
        shape: (b, h, n).
        read: gives the rows of a slice or of their numbers, in float32.
    """

    def __init__(self, shape: tuple[int, int, int], read: Callable[[slice | Int[Tensor, " q"]], Tensor]):
        self.shape, self._read = shape, read

    def __getitem__(self, queries: slice | Int[Tensor, " q"]) -> Float[Tensor, "b h q n"]:
        return self._read(queries)


@contextmanager
def watch_attention(
    model: nn.Module, layers: list[int] | None, look: Callable[[int, AttentionRows], object]
) -> Iterator[None]:
    """Inside the `with` block, `look(layer, rows)` is called for each block that attends; `rows` is good for that call alone.

    Args:
        layers: block indices, all by default.
    Raises:
        ValueError: a layer is out of range, or a block has no softmax weights to read.
    """
    all_blocks = blocks(model)
    layers = list(range(len(all_blocks))) if layers is None else layers
    in_the_open, fused = {}, {}
    for layer in layers:
        if not 0 <= layer < len(all_blocks):
            raise ValueError(f"layer {layer} is out of range: the model has {len(all_blocks)} blocks")
        owner = attention_of(all_blocks[layer])
        if getattr(owner, "fused_attn", False) and not hasattr(owner, "lambda_init"):  # lambda_init: differential
            fused[layer] = all_blocks[layer]
        elif isinstance(getattr(owner, "attn_drop", None), nn.Module):
            in_the_open[layer] = owner
        else:
            raise ValueError(f"block {layer} ({type(all_blocks[layer]).__name__}) has no attention weights to read")

    owners = {layer: attention_of(all_blocks[layer]) for layer in layers}

    def show(layer: int, shape: tuple, read: Callable[[slice | Tensor], Tensor]) -> None:
        look(layer, AttentionRows(shape, lambda queries: _of_tokens(owners[layer], read(queries), -1)))

    def of_weights(layer: int, a: Float[Tensor, "b h n n"]) -> None:
        a = _of_tokens(owners[layer], a, 2)
        show(layer, a.shape[:3], lambda queries: a[:, :, queries].float())

    def of_kernel(layer: int, q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> None:
        q = _of_tokens(owners[layer], q, 2)
        show(layer, q.shape[:3], lambda queries: _rows(queries, q, k, mask, scale))

    with ExitStack() as stack:
        for owner in in_the_open.values():
            stack.enter_context(unfused(owner))
        drops = {layer: owner.attn_drop for layer, owner in in_the_open.items()}
        stack.enter_context(watch_inputs(drops, of_weights))
        reader = stack.enter_context(_KernelCalls(of_kernel))
        stack.enter_context(_inside(fused, reader))
        yield


def query_names(layout: TokenLayout) -> tuple[str, ...]:
    """Names of the prefix tokens in their order: `cls` (`cls_1` for a distillation token), `register_0`, …"""
    classes = ["cls", *(f"cls_{i}" for i in range(1, layout.cls))][: layout.cls]
    return (*classes, *(f"register_{i}" for i in range(layout.num_registers)))


@torch.inference_mode()
def prefix_attention(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], layers: list[int] | None = None
) -> Float[Tensor, "l b h q n"]:
    """Attention of CLS and registers to every token, by block and head; see `watch_prefix_attention`.

    Args:
        images: normalised, on the model's device.
        layers: block indices, all by default.
    Raises:
        ValueError: as `watch_prefix_attention`.
    """
    layers = list(range(len(blocks(model)))) if layers is None else layers
    with watch_prefix_attention(model, layers) as seen:
        model.forward_features(images)
    return torch.stack([seen[layer] for layer in layers])


class _KernelCalls(TorchFunctionMode):
    """Shows `reader(layer, q, k, mask, scale)` every call of the fused kernel that block `layer` makes."""

    def __init__(self, reader: Callable[..., None]):
        super().__init__()
        self.layer: int | None = None  # the block that is running; None between blocks
        self._reader = reader

    def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self.layer is not None:
            self._show(*args, **kwargs)
        return function(*args, **kwargs)

    def _show(  # the kernel's own signature
        self,
        query: Float[Tensor, "b h n c"],
        key: Float[Tensor, "b h n c"],
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if is_causal or enable_gqa:
            raise ValueError(
                f"block {self.layer} attends {'causally' if is_causal else 'with grouped queries'}, which is not read "
                "here; leave the block out of layers"
            )
        self._reader(self.layer, query, key, attn_mask, scale)


@contextmanager
def _inside(watched: dict[int, nn.Module], reader: _KernelCalls) -> Iterator[None]:
    """Tells the reader which block is running."""

    def tell(layer: int | None) -> Callable:
        return lambda *_: setattr(reader, "layer", layer)

    handles = []
    try:
        for layer, block in watched.items():
            handles.append(block.register_forward_pre_hook(tell(layer)))
            handles.append(block.register_forward_hook(tell(None), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(
    queries: slice | Int[Tensor, " q"],
    q: Float[Tensor, "b h n c"],
    k: Float[Tensor, "b h n c"],
    mask: Bool[Tensor, "... n n"] | Float[Tensor, "... n n"] | None,
    scale: float | None,
) -> Float[Tensor, "b h q n"]:
    """Rows of the attention matrix, in float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q[:, :, queries].float() * scale) @ k.float().mT  # (b, h, q, n)
    if mask is not None:
        rows = mask if mask.shape[-2] == 1 else mask[..., queries, :]
        logits = logits.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else logits + rows.float()
    return logits.softmax(-1)


def _of_tokens(owner: nn.Module, x: Shaped[Tensor, ...], dim: int) -> Shaped[Tensor, ...]:
    """What is of tokens alone, along a dimension of queries or keys."""
    place, count = getattr(owner, "added_keys", (0, 0))
    if not count:
        return x
    end = x.shape[dim] - place - count
    return torch.cat([x.narrow(dim, 0, place), x.narrow(dim, place + count, end)], dim)


def attention_of(block: nn.Module) -> nn.Module:
    """The module that attends: the block itself where attention and MLP run side by side."""
    return getattr(block, "attn", block)
