"""Weights under the names that timm gives them.

Checkpoints of timm, DINOv2, DINOv3, OpenAI's and OpenCLIP's CLIP, EVA and others are translated by timm's own filters. Those
of the library transformers are first renamed here: `Dinov2Model` and `Dinov2WithRegistersModel` to DINOv2's own names,
`ViTModel` and `CLIPVisionModel` to timm's.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout

import timm
import torch
from torch import Tensor, nn

from regvit.models.checkpoints import Checkpoint
from regvit.models.positions import prefix_rows

BLOCK = r"(?:encoder\.)?layers?\.(\d+)\."
RENAMED = (  # name in transformers (behind the transformer's prefix) -> name; "" where it is no part of the image tower
    (r"embeddings\.(?:cls_token|class_embedding)", "cls_token"),
    (r"embeddings\.register_tokens", "register_tokens"),
    (r"embeddings\.mask_token", "mask_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.patch_embedding\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.position_ids", ""),
    (r"pooler\..*", ""),
    (r"pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),  # sic
    (r"(?:layernorm|post_layernorm)\.(weight|bias)", r"norm.\1"),
    (BLOCK + r"(?:norm1|layernorm_before|layer_norm1)\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (BLOCK + r"(?:norm2|layernorm_after|layer_norm2)\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (BLOCK + r"(?:attention\.attention\.(?:query)|self_attn\.q_proj)\.(weight|bias)", r"blocks.\1.attn.q.\2"),
    (BLOCK + r"(?:attention\.attention\.(?:key)|self_attn\.k_proj)\.(weight|bias)", r"blocks.\1.attn.k.\2"),
    (BLOCK + r"(?:attention\.attention\.(?:value)|self_attn\.v_proj)\.(weight|bias)", r"blocks.\1.attn.v.\2"),
    (BLOCK + r"(?:attention\.output\.dense|self_attn\.out_proj)\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (BLOCK + r"(?:mlp\.fc1|intermediate\.dense)\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (BLOCK + r"(?:mlp\.fc2|output\.dense)\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (BLOCK + r"mlp\.weights_in\.(weight|bias)", r"blocks.\1.mlp.w12.\2"),
    (BLOCK + r"mlp\.weights_out\.(weight|bias)", r"blocks.\1.mlp.w3.\2"),
)
PRETRAINING = ("decoder_", "dino_head.", "ibot_head.", "mask_token")  # beside an encoder, in files of its training
SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
SIZES |= {(1408, 40): "giant", (1536, 40): "giant", (4096, 40): "7b"}


def known_names(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights under names that timm, or one of its filters, knows."""
    if not checkpoint.names.startswith("transformers"):
        return dict(checkpoint.tensors)
    renamed: dict[str, Tensor] = {}
    for name, value in checkpoint.tensors.items():
        for pattern, new in RENAMED:
            if match := re.fullmatch(pattern, name):
                if new:
                    renamed[match.expand(new)] = value
                break
        else:
            renamed[name] = value
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [renamed.pop(name.replace(".q.", f".{part}."), None) for part in "qkv"]
        if all(part is not None for part in parts):
            renamed[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    for name in ("cls_token", "pos_embed"):  # of CLIP they are one and two axes
        if name in renamed:
            renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
    return renamed


def timm_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of a timm model, by timm's own filter of its family, without a classifier.

    Args:
        model: of the image size that the weights were trained at.
    """
    state = dict(state)
    if "register_tokens" in state:  # by the mask token, timm's filter knows DINOv2's files
        state.setdefault("mask_token", state["register_tokens"][:, :1])
    filters = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filters is not None:
        with redirect_stdout(io.StringIO()):  # it prints what it leaves out
            state = filters(state, model)
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    own = model.state_dict()
    return {
        name: value
        for name, value in state.items()
        if name in own or not (name.rpartition(".")[0] in heads or name.startswith(PRETRAINING))
    }


def described(state: Mapping[str, Tensor]) -> str:
    """What a file holds, and which architecture of timm would fit, as far as its weights tell; "" where they do not."""
    patch = next(
        (value for name, value in state.items() if name in ("patch_embed.proj.weight", "visual.conv1.weight")), None
    )
    if patch is None or patch.ndim != 4:
        names = ", ".join(sorted(state)[:3])
        return f"it holds no vision transformer that is known ({names}, …)"
    numbers = [re.search(r"(?:blocks|resblocks)\.(\d+)\.", name) for name in state]
    width, depth, side = patch.shape[0], 1 + max((int(n[1]) for n in numbers if n), default=-1), patch.shape[-1]
    registers = next((state[n].shape[1] for n in ("register_tokens", "reg_token", "storage_tokens") if n in state), 0)
    said = f"it holds a vision transformer {width} wide, of {depth} blocks and patches of {side} px"
    if registers:
        said += f", with {registers} registers"
    family = "clip" if "visual.conv1.weight" in state or "norm_pre.weight" in state else ""
    if "storage_tokens" in state:
        family = "dinov3"
    elif any(".ls1." in name for name in state) and side == 14:
        family = "dinov2"
    start = f"vit_{SIZES.get((width, depth), '*')}_patch{side}_"
    start += f"reg{registers}_{family}" if registers and family != "dinov3" else family
    fitting = sorted(timm.list_models(f"{start}*"), key=len)[:3]
    return said + (f"; {' or '.join(fitting)} would fit" if fitting else "")


def trained_size(state: Mapping[str, Tensor], patch: int) -> int | None:
    """Side of the images, in pixels, that the position table was trained for; None where there is no table.

    Raises:
        ValueError: it is not one of square images.
    """
    table = state.get("pos_embed", state.get("visual.positional_embedding"))
    if table is None or table.ndim not in (2, 3):
        return None
    rows = table.shape[-2]
    return round((rows - prefix_rows(rows)) ** 0.5) * patch
