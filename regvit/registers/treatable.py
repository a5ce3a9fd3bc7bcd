"""Which models can be treated: those in which a token can be told from a patch, and one more be put between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regvit.models.hooks import blocks, inside
from regvit.models.tokens import TokenLayout

POSITION_BIASES = ("relative_position_bias_table", "rel_pos", "rel_pos_bias", "shared_rel_pos")


class _Entered(Exception):
    """Raised where the first block would run."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, where `torch.compile` has put a wrapper around it.

    Raises:
        ValueError: it is a function that torch.compile made, of a method or of a wrapper, in which no model can be found.
    """
    if hasattr(model, "_torchdynamo_orig_callable") and not isinstance(model, nn.Module):
        raise ValueError(
            "the model is a function that torch.compile made, as of model.forward_features; give the model itself and "
            "compile afterwards: add_test_time_registers(model, neurons), then torch.compile(model.forward_features)"
        )
    return inside(model)


def check_treatable(model: nn.Module) -> None:
    """Names the reason why a model cannot take test-time registers, nor be searched for their neurons.

    One blank image goes through the patch embedding, and no further.

    Raises:
        ValueError: its attention is tied to a number of tokens, it pools registers, it drops patches, or its blocks see
            other tokens than prefix + patches.
    """
    blocks(model)
    name, layout = type(model).__name__, TokenLayout.of(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{name} was traced or scripted, so no token can be inserted; use the model that it was made of"
        )
    if any(getattr(module, bias, None) is not None for module in model.modules() for bias in POSITION_BIASES):
        raise ValueError(
            f"{name} adds a relative position bias for a fixed number of tokens, so no token can be inserted; "
            "use a model with absolute or rotary position embeddings"
        )
    if getattr(model, "pool_include_prefix", False) and getattr(model, "attn_pool", None) is None:
        raise ValueError(
            f"{name} averages its prefix tokens (pool_include_prefix), so registers would enter the pooled feature"
        )
    if model.training and getattr(getattr(model, "patch_drop", None), "prob", 0):
        raise ValueError(
            f"{name} is in training mode and drops patches at random (patch_drop_rate {model.patch_drop.prob:g}), so they "
            "cannot be told from registers; call model.eval() first, or set model.patch_drop.prob = 0"
        )
    entering, num_patches = _tokens_entering_block_0(model)
    if entering != layout.prefix + num_patches:
        said = f"{entering} tokens" if entering else "no plain sequence of tokens"
        raise ValueError(
            f"{name} sends {said} into its first block where {layout.prefix} prefix tokens and {num_patches} "
            "patches were expected, so registers cannot be told apart from patches"
        )


@torch.no_grad()
def _tokens_entering_block_0(model: nn.Module) -> tuple[int, int]:
    """How many tokens enter block 0 (0 where that is no sequence), and how many of them the patch embedding made."""
    counts, embed_dim = {"entering": 0, "patches": 0}, model.embed_dim

    def embedded(_: nn.Module, __: tuple, out: Tensor | tuple) -> None:
        out = out[0] if isinstance(out, tuple) else out
        counts["patches"] = out.numel() // embed_dim

    def entering(_: nn.Module, args: tuple) -> None:
        if (
            len(args) == 1 or not isinstance(args[1], Tensor) or args[1].ndim != 3
        ):  # TNT's blocks see pixels and patches
            counts["entering"] = args[0].shape[1] if args[0].ndim == 3 else 0
        raise _Entered

    embed = getattr(model, "patch_embed", getattr(model, "embeds", None))
    if embed is None:
        raise ValueError(f"{type(model).__name__} has no patch embedding at `.patch_embed`; use a timm ViT")
    handles = [embed.register_forward_hook(embedded), blocks(model)[0].register_forward_pre_hook(entering)]
    try:
        with torch.compiler.set_stance("force_eager"):
            model.forward_features(_blank_image(model, embed))
    except _Entered:
        pass
    finally:
        for handle in handles:
            handle.remove()
    patches = counts["patches"]
    if embed is getattr(model, "embeds", None):  # NaFlex: the embedding already holds the prefix tokens
        patches -= model.num_prefix_tokens
    return counts["entering"], patches


def _blank_image(model: nn.Module, embed: nn.Module) -> Tensor:
    """One image of the model's size and number of channels."""
    size = getattr(embed, "img_size", None) or model.default_cfg["input_size"][1:]
    first = next((module for module in embed.modules() if isinstance(module, nn.Conv2d)), None)
    channels = model.default_cfg["input_size"][0] if first is None else first.in_channels
    parameter = next(model.parameters())
    return torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype)
