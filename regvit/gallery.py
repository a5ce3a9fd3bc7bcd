"""Pictures of what outliers do: patch norms and CLS attention of the same images in several models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from .attention import cls_attention
from .hooks import blocks, watch_outputs
from .tokens import TokenLayout


@dataclass(frozen=True)
class Maps:
    """One value a patch: L2 norm in one block's output, and CLS attention (mean over heads and blocks)."""

    norms: Float[np.ndarray, "b i j"]
    attention: Float[np.ndarray, "b i j"]


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
