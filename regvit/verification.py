"""Holding a run against the model before planting: how far outliers spoil it, how far test-time registers cure it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .attention import watch_cls_attention
from .outliers import Detection, patch_norms
from .tokens import TokenLayout


@dataclass(frozen=True)
class Recovery:
    """One value an image; nan where the image has no outliers in the untreated model.

    Args:
        outlier_fraction: share of patches over the threshold in the run's model (defined for every image).
        cls_cosine: cosine of the last layer's CLS to the intact model's.
        patch_cosine: mean cosine of all patches.
        outlier_patch_cosine: mean cosine of the patches that are outliers in the untreated model.
        cls_attention_on_outliers: CLS attention on those patches, mean over heads and the blocks after the neurons.
        cls_attention_on_registers: CLS attention on test-time registers, likewise.
        intact_attention_on_outliers: CLS attention of the intact model on those patches, likewise.
    """

    outlier_fraction: Float[np.ndarray, " b"]
    cls_cosine: Float[np.ndarray, " b"]
    patch_cosine: Float[np.ndarray, " b"]
    outlier_patch_cosine: Float[np.ndarray, " b"]
    cls_attention_on_outliers: Float[np.ndarray, " b"]
    cls_attention_on_registers: Float[np.ndarray, " b"]
    intact_attention_on_outliers: Float[np.ndarray, " b"]


@torch.inference_mode()
def compare_with_intact(
    model: nn.Module,
    intact: nn.Module,
    outliers: Bool[np.ndarray, "b p"],
    detection: Detection,
    batches: Iterable[Float[Tensor, "b 3 h w"]],
    later: list[int],
) -> Recovery:
    """Compares a run's model with the intact one on the same images.

    Args:
        model: the run's model, with or without test-time registers.
        intact: the model before planting.
        outliers: which patches are outliers in the planted, untreated model; from `patch_norms` and its threshold.
        detection: layer and threshold of the untreated model.
        batches: normalised images in the row order of `outliers`; gone through more than once.
        later: blocks over which attention is averaged.
    Raises:
        ValueError: no image has an outlier.
    """
    if not outliers.any():
        raise ValueError(
            f"none of {len(outliers)} images has an outlier in the untreated model, so nothing can be compared"
        )
    run, base = TokenLayout.of(model), TokenLayout.of(intact)
    device = next(model.parameters()).device
    columns: dict[str, list[Tensor]] = {name: [] for name in Recovery.__annotations__ if name != "outlier_fraction"}
    start = 0
    for images in batches:
        images = images.to(device)
        mask = torch.from_numpy(outliers[start : start + len(images)]).to(device)
        start += len(images)
        ours, attention = _tokens_and_attention(model, images, later)
        theirs, before = _tokens_and_attention(intact, images, later)
        patch_cosine = F.cosine_similarity(run.patches(ours), base.patches(theirs), dim=-1)  # (b, p)
        values = {
            "cls_cosine": F.cosine_similarity(run.cls_token(ours), base.cls_token(theirs), dim=-1),
            "patch_cosine": patch_cosine.mean(1),
            "outlier_patch_cosine": (patch_cosine * mask).sum(1) / mask.sum(1).clamp_min(1),
        }
        values["cls_attention_on_outliers"] = (run.patches(attention)[..., 0] * mask).sum(1)
        values["cls_attention_on_registers"] = run.test_time_registers(attention)[..., 0].sum(1)
        values["intact_attention_on_outliers"] = (base.patches(before)[..., 0] * mask).sum(1)
        for name, value in values.items():
            columns[name].append(torch.where(mask.any(1), value, torch.nan).cpu())
    fraction = (patch_norms(model, batches, [detection.layer])[0] > detection.threshold).mean(1)
    return Recovery(fraction, **{name: torch.cat(column).numpy() for name, column in columns.items()})


def _tokens_and_attention(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], layers: list[int]
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n 1"]]:
    """Last-layer tokens, and CLS attention averaged over heads and `layers`, from one forward."""
    with watch_cls_attention(model, layers) as seen:
        tokens = model.forward_features(images)
    return tokens, torch.stack([seen[layer] for layer in layers]).mean(0)[..., None]
