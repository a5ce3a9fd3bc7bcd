"""Semantic segmentation by a linear layer on patch tokens, and mIoU with intervals over images.

A mask holds 0 for background, class index + 1 on an object, and 255 where nothing is asked (`IGNORE`). Class k of the
layer is mask value k; background is a class like the others.

Training minimises the cross-entropy of the logits that are upsampled (bilinear) to each mask's own size. Of each image
in a batch `PIXELS` are drawn at random: an unbiased estimate of the mean over all pixels, at a fiftieth of its cost
(neighbouring pixels say nearly the same). Testing looks at every pixel.

    IoU of a class = Σ intersection / Σ (predicted + actual − intersection), sums over all images
    mIoU = mean over the classes that occur in the masks of these images

mmsegmentation averages over all classes with any union, so that a class which is predicted somewhere but occurs nowhere
counts as 0; here it only costs the classes whose pixels it takes. As mIoU is no mean over images, intervals resample
images and sum their counts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from .dense import DenseHeads, LinearLayer, PatchTokens, at_pixels, batches, best_head, pixels_of_patches, statistics
from .metrics import Difference, Estimate
from .whole_images import IGNORE, read_mask

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


@dataclass(frozen=True)
class Counts:
    """What was found in each image: enough for mIoU, its intervals, and comparisons of runs in pairs.

    Attributes:
        intersection: pixels of each class that are predicted right.
        predicted: pixels for which each class is predicted, ignored ones left out.
        actual: pixels of each class.
        right: pixels predicted right in the square of each patch.
        counted: pixels in the square of each patch, ignored ones left out.
    """

    intersection: Int[np.ndarray, "b c"]
    predicted: Int[np.ndarray, "b c"]
    actual: Int[np.ndarray, "b c"]
    right: Int[np.ndarray, "b p"]
    counted: Int[np.ndarray, "b p"]

    def __len__(self) -> int:
        return len(self.actual)


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


def class_ious(counts: Counts) -> Float[np.ndarray, " c"]:
    """IoU of each class over all images; nan where a class does not occur in the masks."""
    return _ious(*(values.sum(0) for values in (counts.intersection, counts.predicted, counts.actual)))


def miou(counts: Counts) -> float:
    """Mean IoU over the classes that occur in the masks."""
    return float(np.nanmean(class_ious(counts)))


def image_miou(counts: Counts) -> Float[np.ndarray, " b"]:
    """Mean IoU over the classes that occur in each image; their mean is not `miou`. nan where all is ignored."""
    ious = _ious(counts.intersection, counts.predicted, counts.actual)
    occur = (counts.actual > 0).sum(1)
    return np.where(occur > 0, np.nansum(ious, axis=1) / np.maximum(occur, 1), np.nan)


def miou_with_interval(counts: Counts, seed: int = 0, resamples: int = 1000) -> Estimate:
    """mIoU with the 95 % percentile interval of a bootstrap over images."""
    return _estimate(miou(counts), _resampled_miou(counts, seed, resamples), len(counts))


def class_ious_with_interval(counts: Counts, seed: int = 0, resamples: int = 1000) -> list[Estimate | None]:
    """IoU of each class over the images, likewise; None where a class does not occur."""
    ious, sums = class_ious(counts), _resampled_sums(counts, seed, resamples)
    resampled = np.stack([_ious(*sum_) for sum_ in sums])
    return [
        None if np.isnan(iou) else _estimate(iou, column, int((actual > 0).sum()))
        for iou, column, actual in zip(ious, resampled.T, counts.actual.T, strict=True)
    ]


def paired_miou_difference(a: Counts, b: Counts, seed: int = 0, resamples: int = 1000) -> Difference:
    """mIoU of a minus mIoU of b on the same images in the same order; each resample takes the same images of both.

    Raises:
        ValueError: the masks of the two are not the same.
    """
    _check_same(a, b)
    return _difference(
        miou(a) - miou(b), _resampled_miou(a, seed, resamples) - _resampled_miou(b, seed, resamples), len(a)
    )


def accuracy(
    counts: Counts, where: Bool[np.ndarray, "b p"] | None = None, seed: int = 0, resamples: int = 1000
) -> Estimate | None:
    """Share of pixels that are predicted right, summed over images, with its interval.

    Args:
        where: the patches whose pixels count, such as the outliers of the untreated model; all by default.
    Returns: None where no pixel counts.
    """
    right, counted = _within(counts, where)
    if not counted.sum():
        return None
    n = int((counted > 0).sum())
    return _estimate(right.sum() / counted.sum(), _resampled_ratio(right, counted, seed, resamples), n)


def paired_accuracy_difference(
    a: Counts, b: Counts, where: Bool[np.ndarray, "b p"] | None = None, seed: int = 0, resamples: int = 1000
) -> Difference | None:
    """Accuracy of a minus that of b over the pixels of the same patches, resampling images; None where there are none.

    Raises:
        ValueError: the masks of the two are not the same.
    """
    _check_same(a, b)
    (right_a, counted), (right_b, _) = _within(a, where), _within(b, where)
    if not counted.sum():
        return None
    gained, n = right_a - right_b, int((counted > 0).sum())
    return _difference(gained.sum() / counted.sum(), _resampled_ratio(gained, counted, seed, resamples), n)


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


def _ious(intersection: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> Float[np.ndarray, "... c"]:
    union = predicted + actual - intersection
    return np.where(actual > 0, intersection / np.maximum(union, 1), np.nan)


def _resampled_sums(counts: Counts, seed: int, resamples: int) -> list[tuple[np.ndarray, ...]]:
    """Sums of intersection, predicted and actual over images drawn with replacement; the draws depend on b and seed."""
    rng, b = np.random.default_rng(seed), len(counts)
    weights = (np.bincount(rng.integers(b, size=b), minlength=b) for _ in range(resamples))
    parts = (counts.intersection, counts.predicted, counts.actual)
    return [tuple(weight @ part for part in parts) for weight in weights]


def _resampled_miou(counts: Counts, seed: int, resamples: int) -> Float[np.ndarray, " s"]:
    return np.array([np.nanmean(_ious(*sums)) for sums in _resampled_sums(counts, seed, resamples)])


def _resampled_ratio(
    numerators: Int[np.ndarray, " b"], denominators: Int[np.ndarray, " b"], seed: int, resamples: int
) -> Float[np.ndarray, " s"]:
    """Ratio of sums over images drawn with replacement among those that have a denominator."""
    has = denominators > 0
    numerators, denominators = numerators[has], denominators[has]
    rng, b = np.random.default_rng(seed), int(has.sum())
    draws = rng.integers(b, size=(resamples, b))
    return numerators[draws].sum(1) / denominators[draws].sum(1)


def _estimate(value: float, resampled: Float[np.ndarray, " s"], n: int) -> Estimate:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high), n)


def _difference(value: float, resampled: Float[np.ndarray, " s"], n: int) -> Difference:
    """p is twice the share of resamples on the rarer side of 0, one more in both counts, at most 1."""
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    rarer = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return Difference(float(value), float(low), float(high), min(1.0, 2 * (1 + int(rarer)) / (1 + len(resampled))), n)


def _within(counts: Counts, where: Bool[np.ndarray, "b p"] | None) -> tuple[np.ndarray, np.ndarray]:
    """Right and counted pixels of each image in the patches chosen."""
    if where is None:
        return counts.right.sum(1), counts.counted.sum(1)
    if where.shape != counts.counted.shape:
        raise ValueError(
            f"patches are chosen by an array of shape {where.shape}, and the counts have {counts.counted.shape} "
            "(image, patch); take outliers of the same images at the same size"
        )
    return (counts.right * where).sum(1), (counts.counted * where).sum(1)


def _check_same(a: Counts, b: Counts) -> None:
    if a.actual.shape != b.actual.shape or not np.array_equal(a.actual, b.actual):
        raise ValueError(
            f"the two were counted on other masks ({a.actual.shape} and {b.actual.shape}, (image, class)); "
            "pair the same images of one data set in the same order"
        )
