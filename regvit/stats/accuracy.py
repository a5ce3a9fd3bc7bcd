"""Accuracies with intervals over images and probe seeds, and paired differences of them. All are fractions in [0, 1].

Shape letters: b image, c class, k class of another set, s probe seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from regvit.stats.intervals import Difference, Estimate, Variance, difference, fraction


@dataclass(frozen=True)
class PairedDifference(Difference):
    """A difference of accuracies: `only_a` and `only_b` count what just this one gets right, over images and seeds."""

    only_a: int
    only_b: int


def top1_correct(
    logits: Float[np.ndarray, "b c"], labels: Int[np.ndarray, " b"], among: Sequence[int] | None = None
) -> Bool[np.ndarray, " b"]:
    """Whether the largest logit is the label's, per image; of equal logits the first class counts.

    Args:
        logits: one column a class.
        labels: class index of each image.
        among: class indices that may be predicted (a data set that has only some of the classes, as ImageNet-A and -R);
            None allows all.
    Raises:
        ValueError: the lengths differ, a label is no class index or not among those allowed, or a logit is NaN.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} do not fit; expected (b, c) and (b,)")
    if np.isnan(logits).any():
        raise ValueError(f"{int(np.isnan(logits).any(1).sum())} of {len(logits)} images have NaN logits; train again")
    allowed = np.arange(logits.shape[1]) if among is None else np.unique(np.asarray(among, dtype=np.int64))
    if len(allowed) and not (allowed[0] >= 0 and allowed[-1] < logits.shape[1]):
        raise ValueError(f"classes {among} are out of range (0 to {logits.shape[1] - 1})")
    if strange := sorted(set(labels.tolist()) - set(allowed.tolist())):
        raise ValueError(
            f"label {strange[0]} is not one of the {len(allowed)} classes that may be predicted; "
            "leave unlabelled images out, and map labels to the probe's classes by name"
        )
    return allowed[logits[:, allowed].argmax(1)] == labels if len(labels) else np.zeros(0, dtype=bool)


def class_indices(classes: Sequence[str], known: Sequence[str]) -> Int[np.ndarray, " k"]:
    """Place among the `known` classes (a probe's) of each of `classes` (another data set's), matched by name.

    Raises:
        ValueError: a class is not known.
    """
    place = {name: i for i, name in enumerate(known)}
    if strange := [name for name in classes if name not in place]:
        raise ValueError(
            f"{len(strange)} of {len(classes)} classes are unknown to the probe ({', '.join(map(repr, strange[:5]))}); "
            f"it knows {', '.join(known[:8])}{', …' if len(known) > 8 else ''}: rename them in the data set, or give it "
            "the role anomaly"
        )
    return np.array([place[name] for name in classes], dtype=np.int64)


def accuracy(
    correct: Bool[np.ndarray, " b"] | Bool[np.ndarray, "s b"], groups: Shaped[np.ndarray, " b"] | None = None
) -> Estimate:
    """Share of True with a 95 % interval over images and probe seeds (`intervals`); with one seed, Wilson's own.

    It does not use that splits are stratified by class, and so is a little too wide where the accuracy differs much
    between classes.

    Args:
        correct: one row a seed, all on the same images; or the single row.
        groups: of images that are not independent (one emoji in several drawing styles); None: every image for itself.
    Raises:
        ValueError: there is no image, or `correct` is not boolean.
    """
    correct = _correctness(correct, "correct")
    n, value = correct.shape[1], float(correct.mean())
    totals, sizes = _by_group(correct.astype(np.float64), groups)
    together, single = (
        float(((each - sizes * share) ** 2).sum(-1).mean()) / n**2
        for each, share in ((totals.mean(0), value), (totals, correct.mean(1, keepdims=True)))
    )
    return fraction(value, Variance.of_seeds(correct.mean(1), together, single), n, len(sizes))


def paired_accuracy_difference(
    correct_a: Bool[np.ndarray, " b"] | Bool[np.ndarray, "s b"],
    correct_b: Bool[np.ndarray, " b"] | Bool[np.ndarray, "s b"],
    groups: Shaped[np.ndarray, " b"] | None = None,
) -> PairedDifference:
    """Accuracy of a minus accuracy of b on the same images, in the same order, and with the same seeds.

    Only images on which the two disagree carry evidence, so the interval is much narrower than that of the difference
    of two unpaired accuracies. With dᵢ the difference on image i, averaged over the seeds, it stands around
    d̃ = Σᵢ dᵢ / (n + 2), and the variance over the images is Σᵢ (dᵢ − d̃)² / (n + 2)² with two images more than there are,
    one with d = 1 and one with −1: with one seed this is the interval of Bonett and Price 2012
    (doi:10.3102/1076998611411915). `intervals` has what seeds add.

    Args:
        correct_a, correct_b: one row a seed, or the single row of a classifier without seeds.
        groups: of images that are not independent (one emoji in several drawing styles): dᵢ are then summed by group in
            the variance. None: every image stands for itself.
    Raises:
        ValueError: the lengths or numbers of seeds differ, there is no image, or an array is not boolean.
    """
    a, b = _correctness(correct_a, "correct_a"), _correctness(correct_b, "correct_b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"correct_a has {a.shape[1]} images and correct_b {b.shape[1]}; pair the same images in the same order"
        )
    if a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0]):
        raise ValueError(f"correct_a has {a.shape[0]} seeds and correct_b {b.shape[0]}; pair the same seeds")
    differences = a.astype(np.int64) - b  # (s, b)
    n = differences.shape[1]
    of_groups, sizes = _by_group(differences.astype(np.float64), groups)  # (s, g)
    value = float(differences.mean())
    centre = value * n / (n + 2)
    added = (1 - centre) ** 2 + (1 + centre) ** 2  # of the two images more
    together, single = (
        float((((each - sizes * centre) ** 2).sum(-1) + added).mean()) / (n + 2) ** 2
        for each in (of_groups.mean(0), of_groups)
    )
    found = difference(value, Variance.of_seeds(differences.mean(1), together, single), n, centre)
    only_a, only_b = int((differences > 0).sum()), int((differences < 0).sum())
    return PairedDifference(found.value, found.lo, found.hi, found.p, n, only_a, only_b)


def _by_group(
    values: Float[np.ndarray, "s b"], groups: Shaped[np.ndarray, " b"] | None
) -> tuple[Float[np.ndarray, "s g"], Int[np.ndarray, " g"]]:
    """Sums over the images of each group, and how many they are."""
    n = values.shape[1]
    if groups is None:
        return values, np.ones(n, dtype=np.int64)
    if np.shape(groups) != (n,):
        raise ValueError(f"groups have shape {np.shape(groups)}; expected one for each of the {n} images")
    _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.stack([np.bincount(place, row) for row in values]), sizes


def _correctness(values: np.ndarray, name: str) -> Bool[np.ndarray, "s b"]:
    values = np.asarray(values)
    if values.dtype != bool or values.ndim not in (1, 2):
        raise ValueError(
            f"{name} is {values.dtype} of shape {values.shape}; expected one boolean per image, or (seeds, images)"
        )
    if not values.size:
        raise ValueError(f"{name} is empty; an accuracy needs at least one image: is the split empty?")
    return np.atleast_2d(values)
