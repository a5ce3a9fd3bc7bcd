"""Semantic segmentation by a linear layer on patch tokens; what it gets right is counted for `regvit.stats.miou`.

A mask holds 0 for background, class index + 1 on an object, and 255 where nothing is asked (`IGNORE`). Class k of the
layer is mask value k; background is a class like the others.

Training minimises the cross-entropy of the logits that are upsampled (bilinear) to each mask's own size. Of each image
in a batch `PIXELS` are drawn at random: an unbiased estimate of the mean over all pixels, at a fiftieth of its cost
(neighbouring pixels say nearly the same). Testing looks at every pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from regvit.data.dense_labels import IGNORE, read_mask
from regvit.measures.dense.dense_heads import (
    Batch,
    DenseHeads,
    DenseTraining,
    LinearLayer,
    PatchTokens,
    at_pixels,
    best_head,
    pixels_of_patches,
    train_heads,
)
from regvit.stats.bootstrap import mean_over_images
from regvit.stats.figures import Figure
from regvit.stats.miou import (
    Counts,
    PatchCounts,
    accuracy,
    class_ious_with_interval,
    image_miou,
    miou,
    miou_with_interval,
)

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
    training: DenseTraining,
) -> Segmenter:
    """Trains a head for each learning rate and weight decay, and keeps the one of largest mIoU on the validation split.

    Args:
        tokens, val: of the training and the validation split.
        mask: of a row of the store, see `read_classes`.
        n_classes: background included.
    Raises:
        ValueError: all heads diverged.
    """
    generator = np.random.default_rng(training.seed)
    heads = train_heads(tokens, mask, n_classes, training, lambda heads, batch, _: _losses(heads, batch, generator))
    layers = [heads.layer(head) for head in range(len(heads))]
    mious = [miou(count(layer.to(training.device), val, mask, n_classes, training.device)) for layer in layers]
    best = best_head(heads, [-value for value in mious], "segmentation")
    return Segmenter(layers[best], dict(zip(heads.settings, mious, strict=True)))


def _losses(heads: DenseHeads, batch: Batch[np.ndarray], generator: np.random.Generator) -> Float[Tensor, " h"]:
    """Mean cross-entropy of each head over the pixels drawn."""
    masks, device = batch.targets, batch.patches.device
    sizes = np.array([mask.shape for mask in masks])
    places = generator.integers(0, sizes.prod(1)[:, None], (len(masks), PIXELS))
    rows, columns = places // sizes[:, 1:], places % sizes[:, 1:]
    labels = np.stack([mask[r, c] for mask, r, c in zip(masks, rows, columns, strict=True)]).astype(np.int64)
    rows, columns, sizes, labels = (torch.from_numpy(v).to(device) for v in (rows, columns, sizes, labels))
    logits = at_pixels(heads(batch.patches), rows, columns, sizes)  # (b, hc, m)
    logits = logits.unflatten(1, (len(heads), heads.outputs)).movedim(2, 1)  # (b, c, h, m)
    labels = labels[:, None].expand(-1, len(heads), -1)  # (b, h, m)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return losses.sum((0, 2)) / (labels[:, :1] != IGNORE).sum().clamp_min(1)


@torch.inference_mode()
def count(
    layer: Callable[[Float[Tensor, "b p d"]], Float[Tensor, "b c g g"]],
    tokens: PatchTokens,
    mask: Callable[[int], UInt8[np.ndarray, "h w"]],
    n_classes: int,
    device: torch.device | str = "cpu",
) -> Counts:
    """Counts of every image of `tokens`, in order, at the full size of its mask.

    Args:
        layer: a value for each class at each patch, of patch tokens on the device.
    """

    def found() -> Iterator[tuple[np.ndarray, Tensor]]:
        for rows, patches in tokens.in_order():
            yield from zip(map(mask, rows), layer(patches.to(device)), strict=True)

    return count_maps(found(), n_classes, tokens.side)


def count_maps(
    found: Iterable[tuple[UInt8[np.ndarray, "h w"], Float[Tensor, "c i j"]]], n_classes: int, side: int
) -> Counts:
    """Counts of masks and of the classes' values on any grid, upsampled (bilinear) to each mask's own size.

    Args:
        side: of the patch grid, by whose squares right pixels are counted.
    """
    names = ("intersection", "predicted", "actual", "right", "counted")
    counted: dict[str, list[np.ndarray]] = {name: [] for name in names}
    squares = np.arange(side**2)
    for truth, maps in found:
        upsampled = F.interpolate(maps[None], truth.shape, mode="bilinear", align_corners=False)[0]
        guess = upsampled.argmax(0).cpu().numpy()
        asked = truth != IGNORE
        truth, guess, patch = truth[asked], guess[asked], pixels_of_patches(squares, *truth.shape)[asked]
        right = truth == guess
        counted["intersection"].append(np.bincount(truth[right], minlength=n_classes))
        counted["predicted"].append(np.bincount(guess, minlength=n_classes))
        counted["actual"].append(np.bincount(truth, minlength=n_classes))
        counted["right"].append(np.bincount(patch[right], minlength=len(squares)))
        counted["counted"].append(np.bincount(patch, minlength=len(squares)))
    return Counts(**{name: np.stack(values) for name, values in counted.items()})


def figures(segmenter: Segmenter, counts: Counts, outliers: Bool[np.ndarray, "b p"], seed: int = 0) -> list[Figure]:
    """`count_figures`, and what was chosen on the validation split."""
    layer = segmenter.layer
    return [
        *count_figures(counts, outliers, seed),
        Figure("val_miou", max(segmenter.val_miou.values())),
        Figure("learning_rate", layer.learning_rate),
        Figure("weight_decay", layer.weight_decay),
    ]


def count_figures(counts: Counts, outliers: Bool[np.ndarray, "b p"], seed: int = 0) -> list[Figure]:
    """mIoU and pixel accuracy with their intervals over images; without a value at outliers where there is none.

    Args:
        outliers: patches of the untreated model.
    """
    return [
        Figure.of("miou", miou_with_interval(counts, seed)),
        *place_figures("pixel_accuracy", counts, outliers, seed),
        Figure.of("miou_by_image", mean_over_images(image_miou(counts), seed)),
    ]


def place_figures(name: str, counts: PatchCounts, outliers: Bool[np.ndarray, "b p"], seed: int = 0) -> list[Figure]:
    """Share that is right over all patches, at outliers, and elsewhere in the images that have some."""
    elsewhere = ~outliers & outliers.any(1, keepdims=True)
    found = {"": None, "_at_outliers": outliers, "_elsewhere": elsewhere}
    return [Figure.of(f"{name}{where}", accuracy(counts, chosen, seed)) for where, chosen in found.items()]


def image_columns(counts: Counts, outliers: Bool[np.ndarray, "b p"]) -> dict[str, np.ndarray]:
    """One value an image, by which runs are paired."""
    return {"miou_by_image": image_miou(counts)} | place_columns("pixel_accuracy", counts, outliers)


def place_columns(name: str, counts: PatchCounts, outliers: Bool[np.ndarray, "b p"]) -> dict[str, np.ndarray]:
    """One value an image; `<name>_weight` is the number of pixels by which an image counts, as pixels are pooled."""
    columns = {}
    for where, chosen in (("", np.ones_like(outliers)), ("_at_outliers", outliers)):
        right, counted = ((values * chosen).sum(1) for values in (counts.right, counts.counted))
        columns[f"{name}{where}"] = np.where(counted > 0, right / np.maximum(counted, 1), np.nan)
        columns[f"{name}{where}_weight"] = counted
    return columns


def class_table(counts: Counts, names: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """IoU of each class that occurs, with its interval and the images that have it."""
    found = zip(names, class_ious_with_interval(counts, seed), strict=True)
    rows = [(name, e.value, e.lo, e.hi, e.n) for name, e in found if e is not None]
    return pd.DataFrame(rows, columns=["class", "iou", "iou_lo", "iou_hi", "images"])


def pixel_table(counts: Counts, names: Sequence[str], image_ids: Sequence[str]) -> pd.DataFrame:
    """Pixels of each class in each image, where there are any: with them runs are compared in pairs."""
    by_class = np.stack([counts.intersection, counts.predicted, counts.actual], axis=2)  # (b, c, 3)
    image, value = np.nonzero(by_class.any(2))
    right, predicted, actual = by_class[image, value].T
    keys = {"image_id": np.array(image_ids)[image], "class": np.array(names)[value], "mask_value": value}
    return pd.DataFrame({**keys, "right": right, "predicted": predicted, "actual": actual})
