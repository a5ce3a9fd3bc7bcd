"""Semantic segmentation by a linear layer on patch tokens; what it gets right is counted for `regvit.stats.miou`.

A mask holds 0 for background, class index + 1 on an object, and 255 where nothing is asked (`IGNORE`). Class k of the
layer is mask value k; background is a class like the others.

Training minimises the cross-entropy of the logits that are upsampled (bilinear) to each mask's own size. Of each image
in a batch `PIXELS` are drawn at random: an unbiased estimate of the mean over all pixels, at a fiftieth of its cost
(neighbouring pixels say nearly the same). Testing looks at every pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from regvit.data.dense_labels import IGNORE, read_mask
from regvit.measures.dense import (
    DenseHeads,
    LinearLayer,
    PatchTokens,
    at_pixels,
    batches,
    best_head,
    pixels_of_patches,
    statistics,
)
from regvit.stats.miou import Counts, accuracy, miou, miou_with_interval

PIXELS = 1024  # drawn of each image of a batch


@dataclass(frozen=True)
class Segmenter:
    """A trained layer, and how the heads fared on the validation split.

    Attributes:
        layer: takes raw patch tokens; output k is mask value k.
        val_miou: by (learning rate, weight decay).
    """

    layer: LinearLayer
    val_miou: dict[tuple[float, float], float]


def read_classes(path: Path | str, n_classes: int, zero_is_ignored: bool = False) -> UInt8[np.ndarray, "h w"]:
    """A mask of a data set, its values checked.

    Args:
        n_classes: background included; values are 0 to n_classes - 1, or `IGNORE`.
        zero_is_ignored: whether 0 means that nothing is known (ADE20k) instead of background.
    Raises:
        UnreadableImage: as `read_mask`.
        ValueError: a value is no class.
    """
    mask = read_mask(path)
    strange = mask[(mask >= n_classes) & (mask != IGNORE)]
    if strange.size:
        raise ValueError(
            f"mask {path} holds {strange[0]}, expected 0 to {n_classes - 1} (0 for background, class index + 1 on an "
            f"object) or {IGNORE} where nothing is known"
        )
    return np.where(mask == 0, np.uint8(IGNORE), mask) if zero_is_ignored else mask


def train(
    tokens: PatchTokens,
    val: PatchTokens,
    mask: Callable[[int], UInt8[np.ndarray, "h w"]],
    n_classes: int,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] | None = None,
) -> Segmenter:
    """Trains a head for each learning rate and weight decay, and keeps the one of largest mIoU on the validation split.

    Args:
        tokens, val: of the training and the validation split.
        mask: of a row of the store, see `read_classes`.
        n_classes: background included.
        steps, batch_size: updates, and images an update.
        on_step: called with 1 after each step.
    Raises:
        ValueError: settings are out of range, or all heads diverged.
    """
    generator = np.random.default_rng(seed)
    heads = DenseHeads(statistics(tokens), n_classes, learning_rates, weight_decays, steps, seed, device)
    drawn = batches(tokens, mask, batch_size, generator, device)
    for _ in range(steps):
        batch = next(drawn)
        heads.step(_losses(heads, batch.patches, batch.targets, generator))
        if on_step is not None:
            on_step(1)
    layers = [heads.layer(head) for head in range(len(heads))]
    mious = [miou(count(layer, val, mask, n_classes, device)) for layer in layers]
    best = best_head(heads, [-value for value in mious], "segmentation")
    return Segmenter(layers[best], dict(zip(heads.settings, mious, strict=True)))


def _losses(
    heads: DenseHeads, patches: Tensor, masks: list[UInt8[np.ndarray, "h w"]], generator: np.random.Generator
) -> Float[Tensor, " h"]:
    """Mean cross-entropy of each head over the pixels drawn."""
    device = patches.device
    sizes = np.array([mask.shape for mask in masks])
    places = generator.integers(0, sizes.prod(1)[:, None], (len(masks), PIXELS))
    rows, columns = places // sizes[:, 1:], places % sizes[:, 1:]
    labels = np.stack([mask[r, c] for mask, r, c in zip(masks, rows, columns, strict=True)]).astype(np.int64)
    rows, columns, sizes, labels = (torch.from_numpy(v).to(device) for v in (rows, columns, sizes, labels))
    logits = at_pixels(heads(patches), rows, columns, sizes)  # (b, hc, m)
    logits = logits.unflatten(1, (len(heads), heads.outputs)).movedim(2, 1)  # (b, c, h, m)
    labels = labels[:, None].expand(-1, len(heads), -1)  # (b, h, m)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return losses.sum((0, 2)) / (labels[:, :1] != IGNORE).sum().clamp_min(1)


@torch.inference_mode()
def count(
    layer: LinearLayer,
    tokens: PatchTokens,
    mask: Callable[[int], UInt8[np.ndarray, "h w"]],
    n_classes: int,
    device: torch.device | str = "cpu",
) -> Counts:
    """Counts of every image of `tokens`, in order, at the full size of its mask."""
    layer = layer.to(device)
    names = ("intersection", "predicted", "actual", "right", "counted")
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    squares = np.arange(tokens.side**2)
    for rows, patches in tokens.in_order():
        for row, maps in zip(rows, layer(patches.to(device)), strict=True):
            truth = mask(row)
            upsampled = F.interpolate(maps[None], truth.shape, mode="bilinear", align_corners=False)[0]
            guess = upsampled.argmax(0).cpu().numpy()
            asked = truth != IGNORE
            truth, guess, patch = truth[asked], guess[asked], pixels_of_patches(squares, *truth.shape)[asked]
            right = truth == guess
            found["intersection"].append(np.bincount(truth[right], minlength=n_classes))
            found["predicted"].append(np.bincount(guess, minlength=n_classes))
            found["actual"].append(np.bincount(truth, minlength=n_classes))
            found["right"].append(np.bincount(patch[right], minlength=len(squares)))
            found["counted"].append(np.bincount(patch, minlength=len(squares)))
    return Counts(**{name: np.stack(values) for name, values in found.items()})


def summary(
    segmenter: Segmenter, counts: Counts, outliers: Bool[np.ndarray, "b p"] | None, seed: int = 0
) -> dict[str, float | int | None]:
    """What goes into the metrics file; values at outliers are None where the untreated model has none."""
    where = np.zeros(counts.counted.shape, dtype=bool) if outliers is None else outliers
    at_outliers = accuracy(counts, where, seed)
    found = {
        "miou": miou_with_interval(counts, seed),
        "accuracy": accuracy(counts, None, seed),
        "accuracy_at_outliers": at_outliers,
        "accuracy_elsewhere": None
        if at_outliers is None
        else accuracy(counts, ~where & where.any(1, keepdims=True), seed),
    }
    metrics: dict[str, float | int | None] = {"n": len(counts), "n_with_outliers": int(where.any(1).sum())}
    for name, estimate in found.items():
        named = dict.fromkeys((name, f"{name}_lo", f"{name}_hi")) if estimate is None else estimate.named(name)
        metrics |= {key: None if value is None else round(value, 6) for key, value in named.items()}
    layer = segmenter.layer
    return metrics | {
        "val_miou": round(max(segmenter.val_miou.values()), 6),
        "learning_rate": layer.learning_rate,
        "weight_decay": layer.weight_decay,
    }
