"""mIoU from counts of pixels, with intervals over images.

    IoU of a class = Σ intersection / Σ (predicted + actual − intersection), sums over all images
    mIoU = mean over the classes that occur in the masks of these images

mmsegmentation averages over all classes with any union, so that a class which is predicted somewhere but occurs nowhere
counts as 0; here it only costs the classes whose pixels it takes. As mIoU is no mean over images, intervals resample
images and sum their counts anew.

Shape letters: b image, c class, p patch, s resample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from regvit.stats.metrics import Difference, Estimate


@dataclass(frozen=True)
class ClassCounts:
    """Pixels of each class in each image: enough for mIoU, its interval, and comparisons of runs in pairs.

    Attributes:
        intersection: those that are predicted right.
        predicted: those for which the class is predicted, ignored ones left out.
        actual: those that are of the class.
    """

    intersection: Int[np.ndarray, "b c"]
    predicted: Int[np.ndarray, "b c"]
    actual: Int[np.ndarray, "b c"]

    def __len__(self) -> int:
        return len(self.actual)


@dataclass(frozen=True)
class Counts(ClassCounts):
    """And in the square of each patch.

    Attributes:
        right: pixels that are predicted right.
        counted: pixels, ignored ones left out.
    """

    right: Int[np.ndarray, "b p"]
    counted: Int[np.ndarray, "b p"]


def class_ious(counts: ClassCounts) -> Float[np.ndarray, " c"]:
    """IoU of each class over all images; nan where a class does not occur in the masks."""
    return _ious(*(values.sum(0) for values in (counts.intersection, counts.predicted, counts.actual)))


def miou(counts: ClassCounts) -> float:
    """Mean IoU over the classes that occur in the masks."""
    return float(np.nanmean(class_ious(counts)))


def image_miou(counts: ClassCounts) -> Float[np.ndarray, " b"]:
    """Mean IoU over the classes that occur in each image; their mean is not `miou`. nan where all is ignored."""
    ious = _ious(counts.intersection, counts.predicted, counts.actual)
    occur = (counts.actual > 0).sum(1)
    return np.where(occur > 0, np.nansum(ious, axis=1) / np.maximum(occur, 1), np.nan)


def miou_with_interval(counts: ClassCounts, seed: int = 0, resamples: int = 1000) -> Estimate:
    """mIoU with the 95 % percentile interval of a bootstrap over images."""
    return _estimate(miou(counts), _resampled_miou(counts, seed, resamples), len(counts))


def class_ious_with_interval(counts: ClassCounts, seed: int = 0, resamples: int = 1000) -> list[Estimate | None]:
    """IoU of each class over the images, likewise; None where a class does not occur."""
    ious, sums = class_ious(counts), _resampled_sums(counts, seed, resamples)
    resampled = np.stack([_ious(*sum_) for sum_ in sums])
    return [
        None if np.isnan(iou) else _estimate(iou, column, int((actual > 0).sum()))
        for iou, column, actual in zip(ious, resampled.T, counts.actual.T, strict=True)
    ]


def paired_miou_difference(a: ClassCounts, b: ClassCounts, seed: int = 0, resamples: int = 1000) -> Difference:
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


def _ious(intersection: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> Float[np.ndarray, "... c"]:
    union = predicted + actual - intersection
    return np.where(actual > 0, intersection / np.maximum(union, 1), np.nan)


def _resampled_sums(counts: ClassCounts, seed: int, resamples: int) -> list[tuple[np.ndarray, ...]]:
    """Sums of intersection, predicted and actual over images drawn with replacement; the draws depend on b and seed."""
    rng, b = np.random.default_rng(seed), len(counts)
    weights = (np.bincount(rng.integers(b, size=b), minlength=b) for _ in range(resamples))
    parts = (counts.intersection, counts.predicted, counts.actual)
    return [tuple(weight @ part for part in parts) for weight in weights]


def _resampled_miou(counts: ClassCounts, seed: int, resamples: int) -> Float[np.ndarray, " s"]:
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


def _check_same(a: ClassCounts, b: ClassCounts) -> None:
    if a.actual.shape != b.actual.shape or not np.array_equal(a.actual, b.actual):
        raise ValueError(
            f"the two were counted on other masks ({a.actual.shape} and {b.actual.shape}, (image, class)); "
            "pair the same images of one data set in the same order"
        )
