"""Pictures of what outliers do: patch norms and attention maps of the same images in several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor, nn

from .attention import cls_attention, query_names, watch_prefix_attention
from .hooks import blocks, watch_outputs
from .images import Transform
from .manifest import Dataset
from .tokens import TokenLayout


@dataclass(frozen=True)
class Maps:
    """One value a patch: L2 norm in one block's output, and CLS attention (mean over heads and blocks)."""

    norms: Float[np.ndarray, "b i j"]
    attention: Float[np.ndarray, "b i j"]


def first_images(dataset: Dataset, transform: Transform, count: int) -> UInt8[Tensor, "b 3 s s"]:
    """The first images of a data set, at most `count`, as they are drawn and normalised."""
    return torch.stack([transform.load(dataset.image_path(i)) for i in range(min(count, len(dataset)))])


def as_picture(pixels: UInt8[Tensor, "b 3 h w"]) -> Float[np.ndarray, "b h w 3"]:
    """Images with values from 0 to 1 and the channel last, as they are drawn."""
    return pixels.permute(0, 2, 3, 1).numpy() / 255


@torch.inference_mode()
def token_maps(model: nn.Module, images: Float[Tensor, "b 3 h w"], layer: int, attention_layers: list[int]) -> Maps:
    """Norm and attention maps on the patch grid.

    Args:
        images: normalised, on the model's device, square.
        layer: block whose output norms are taken.
        attention_layers: blocks over which CLS attention is averaged.
    """
    layout = TokenLayout.of(model)
    norms: list[Tensor] = []
    with watch_outputs({layer: blocks(model)[layer]}, lambda _, x: norms.append(layout.patches(x).norm(dim=-1))):
        attention = cls_attention(model, images, attention_layers).mean(0)[..., None]  # (b, n, 1)
    side = round(norms[0].shape[1] ** 0.5)

    def grid(values: Float[Tensor, "b p"]) -> np.ndarray:
        return values.reshape(-1, side, side).float().cpu().numpy()

    return Maps(grid(norms[0]), grid(layout.patches(attention)[..., 0]))


def draw_maps(path: Path, images: Float[np.ndarray, "b h w 3"], maps: Mapping[str, Maps], threshold: float) -> None:
    """Writes a PNG: a row an image; the image, then norms and attention of each model.

    Args:
        images: values from 0 to 1.
        maps: by the title of the model, in the order of the columns; the attention scale ends at the first one's maximum.
        threshold: norm over which a patch is an outlier; the norm scale ends there.
    """
    columns = ["image", *(f"patch norms\n{title}" for title in maps), *(f"CLS attention\n{title}" for title in maps)]
    figure = Figure(figsize=(1.4 * len(columns), 1.4 * len(images) + 0.4), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for row, image in enumerate(images):
        ceiling = next(iter(maps.values())).attention[row].max()
        panels = [{"X": image}]
        panels += [{"X": m.norms[row], "cmap": "magma", "vmin": 0, "vmax": threshold} for m in maps.values()]
        panels += [{"X": m.attention[row], "cmap": "viridis", "vmin": 0, "vmax": ceiling} for m in maps.values()]
        for column, (axis, panel) in enumerate(zip(axes[row], panels, strict=True)):
            axis.imshow(**panel, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(columns[column], fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})


@torch.inference_mode()
def attention_maps(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], layers: Sequence[int]
) -> dict[str, Float[np.ndarray, "b i j"]]:
    """Attention of each prefix token to the patches, mean over heads and `layers`, by the token's name.

    Args:
        images: normalised, on the model's device, square.
    Returns: in the order of `query_names`; empty for a model that has neither CLS nor registers.
    """
    layout = TokenLayout.of(model)
    if not layout.prefix:
        return {}
    with watch_prefix_attention(model, list(layers)) as seen:
        model.forward_features(images)
    maps = torch.stack([seen[layer] for layer in layers]).mean((0, 2))[..., layout.prefix :]  # (b, q, p)
    side = round(maps.shape[-1] ** 0.5)
    maps = maps.unflatten(-1, (side, side)).cpu().numpy()
    return {name: maps[:, q] for q, name in enumerate(query_names(layout))}


def draw_attention(
    path: Path, images: Float[np.ndarray, "b h w 3"], columns: Mapping[str, Float[np.ndarray, "b i j"]]
) -> None:
    """Writes a PNG: a row an image; the image, then the maps, each on a scale of its own from 0 to its maximum.

    Args:
        images: values from 0 to 1.
        columns: maps by their title, in the order in which they are drawn.
    Source of the layout: Darcet et al. 2024, arXiv:2309.16588, figure 9.
    """
    width = 1 + len(columns)
    figure = Figure(figsize=(1.25 * width, 1.25 * len(images) + 0.35), layout="constrained")
    axes = figure.subplots(len(images), width, squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image, interpolation="nearest")
        for axis, maps in zip(axes[row, 1:], columns.values(), strict=True):
            axis.imshow(maps[row], cmap="viridis", vmin=0, interpolation="nearest")
        for axis in axes[row]:
            axis.set_axis_off()
    for axis, title in zip(axes[0], ["image", *columns], strict=True):
        axis.set_title(title, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
