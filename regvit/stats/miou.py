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

from regvit.stats.bootstrap import RESAMPLES, of_sums
from regvit.stats.intervals import Difference, Estimate, Variance, difference, fraction


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
class PatchCounts:
    """Pixels (or points) in the square of each patch.

    Attributes:
        right: those that are predicted right.
        counted: all of them, ignored ones left out.
    """

    right: Int[np.ndarray, "b p"]
    counted: Int[np.ndarray, "b p"]


@dataclass(frozen=True)
class Counts(PatchCounts, ClassCounts):
    """Pixels by class and by patch."""


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


def miou_with_interval(counts: ClassCounts, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """mIoU with its 95 % interval over images."""
    drawn = of_sums(_mean_iou, _parts(counts), seed, resamples)
    return fraction(miou(counts), _variance(drawn, len(counts)), len(counts))


def class_ious_with_interval(counts: ClassCounts, seed: int = 0, resamples: int = RESAMPLES) -> list[Estimate | None]:
    """IoU of each class over the images, likewise; None where a class does not occur."""
    drawn = of_sums(_ious, _parts(counts), seed, resamples)  # (w, c)
    return [
        None if np.isnan(iou) else fraction(float(iou), _variance(column, len(counts)), int((actual > 0).sum()))
        for iou, column, actual in zip(class_ious(counts), drawn.T, counts.actual.T, strict=True)
    ]


def paired_miou_difference(a: ClassCounts, b: ClassCounts, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """mIoU of a minus mIoU of b on the same images in the same order; each resample takes the same images of both.

    Raises:
        ValueError: the masks of the two are not the same.
    """
    _check_same(a, b)
    mine, theirs = (of_sums(_mean_iou, _parts(each), seed, resamples) for each in (a, b))
    return difference(miou(a) - miou(b), _variance(mine - theirs, len(a)), len(a))


def accuracy(
    counts: PatchCounts, where: Bool[np.ndarray, "b p"] | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate | None:
    """Share of pixels that are predicted right, summed over images, with its interval.

    Args:
        where: the patches whose pixels count, such as the outliers of the untreated model; all by default.
    Returns: None where no pixel counts.
    """
    right, counted = _within(counts, where)
    has = counted > 0
    if not has.any():
        return None
    drawn = of_sums(np.divide, (right[has], counted[has]), seed, resamples)
    n = int(has.sum())
    return fraction(float(right.sum() / counted.sum()), _variance(drawn, n), n)


def _mean_iou(*sums: np.ndarray) -> Float[np.ndarray, " w"]:
    return np.nanmean(_ious(*sums), axis=-1)


def _parts(counts: ClassCounts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return counts.intersection, counts.predicted, counts.actual


def _variance(drawn: Float[np.ndarray, " w"], n: int) -> Variance:
    return Variance(float(np.nanvar(drawn, ddof=1)), df=max(1, n - 1))


def _ious(intersection: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> Float[np.ndarray, "... c"]:
    union = predicted + actual - intersection
    return np.where(actual > 0, intersection / np.maximum(union, 1), np.nan)


def _within(counts: PatchCounts, where: Bool[np.ndarray, "b p"] | None) -> tuple[np.ndarray, np.ndarray]:
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
