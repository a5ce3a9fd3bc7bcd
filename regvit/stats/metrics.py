"""Accuracy and anomaly metrics, intervals of accuracies over images and probe seeds, paired differences of accuracies.

All values are fractions in [0, 1]. Anomaly scores are larger for anomalies. Two conventions of FPR at 95 % stand in the
literature, and both are here under their own names:

- `fpr95`: ID is positive (Liu et al. 2020, arXiv:2010.03759): the share of anomalies that are accepted as ID by the
  strictest threshold that accepts at least 95 % of ID;
- `fpr95_ood_positive`: anomalies are positive (OpenOOD v1.5, arXiv:2306.09301): the share of ID that is flagged by the
  strictest threshold that flags at least 95 % of the anomalies.

AUPR is average precision, Σ (Rᵢ − Rᵢ₋₁) Pᵢ over the distinct scores, as in scikit-learn: `aupr_in` with ID positive,
`aupr_out` with anomalies positive. Equal scores count half in AUROC and are never split by a threshold. Infinite scores
are ordinary scores: they stand at the ends of the order and tie with each other. NaN is an error.

Accuracies and their differences carry intervals in closed form; those of the anomaly metrics come from `bootstrap`.

Shape letters: b image, a anomaly, s probe seed, w weighting (a resample), u distinct score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Z_95 = 1.959963984540054  # 97.5 % point of the standard normal distribution: two-sided 95 %
EXACT_FLIPS = 20_000  # disagreements up to which the sign-flip test is exact: half a second, and the normal law is near


@dataclass(frozen=True)
class Estimate:
    """A fraction with its 95 % interval and the number of images behind it."""

    value: float
    lo: float
    hi: float
    n: int

    def named(self, name: str) -> dict[str, float]:
        """As `{name: value, name_lo: lo, name_hi: hi}`, the form of the metrics files (`n` is written once beside)."""
        return {name: self.value, f"{name}_lo": self.lo, f"{name}_hi": self.hi}


@dataclass(frozen=True)
class Difference:
    """How far two classifiers, or two detectors, differ on the same images.

    Attributes:
        value: metric of a minus metric of b, in [−1, 1].
        lo, hi: its 95 % interval.
        p: two-sided p-value of "both are equally good".
        n: images.
    """

    value: float
    lo: float
    hi: float
    p: float
    n: int

    def named(self, name: str) -> dict[str, float]:
        """As `{name, name_lo, name_hi, name_p}` (`n` is written once beside)."""
        return {name: self.value, f"{name}_lo": self.lo, f"{name}_hi": self.hi, f"{name}_p": self.p}


@dataclass(frozen=True)
class PairedDifference(Difference):
    """A difference of accuracies: `only_a` and `only_b` count what just this one gets right, over images and seeds."""

    only_a: int
    only_b: int


# --- accuracy -------------------------------------------------------------------------------------------------------


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


def accuracy(correct: Bool[np.ndarray, " b"] | Bool[np.ndarray, "s b"]) -> Estimate:
    """Share of True with a 95 % interval over images and probe seeds.

    With x̄ᵢ the share of seeds that get image i right, p̂ₛ the accuracy of seed s, and p̂ the mean of both:

        v = Σᵢ (x̄ᵢ − p̂)² / n²  +  Σₛ (p̂ₛ − p̂)² / (S (S − 1)),    n* = min(p̂ (1 − p̂) / v, n S),

    and the interval is Wilson's (1927) for n* images (the effective sample size of survey statistics, Korn and
    Graubard 1998). With one seed n* = n, so that it is Wilson's own. It does not use that splits are stratified by
    class, and so is a little too wide where the accuracy differs much between classes.

    Args:
        correct: one row a seed, all on the same images; or the single row.
    Raises:
        ValueError: there is no image, or `correct` is not boolean.
    """
    correct = _correctness(correct, "correct")
    seeds, n = correct.shape
    p, by_seed = float(correct.mean()), correct.mean(1)
    variance = float(((correct.mean(0) - p) ** 2).sum()) / n**2
    if seeds > 1:
        variance += float(by_seed.var(ddof=1)) / seeds
    most = n * seeds
    size = n if seeds == 1 or p in (0, 1) else min(most, p * (1 - p) / variance) if variance else most
    centre = (p + Z_95**2 / (2 * size)) / (1 + Z_95**2 / size)
    half = Z_95 / (1 + Z_95**2 / size) * math.sqrt(p * (1 - p) / size + Z_95**2 / (4 * size**2))
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def paired_accuracy_difference(
    correct_a: Bool[np.ndarray, " b"] | Bool[np.ndarray, "s b"],
    correct_b: Bool[np.ndarray, " b"] | Bool[np.ndarray, "s b"],
    groups: Shaped[np.ndarray, " b"] | None = None,
) -> PairedDifference:
    """Accuracy of a minus accuracy of b on the same images, in the same order, and with the same seeds.

    Only images on which the two disagree carry evidence, so the interval is much narrower than that of the difference
    of two unpaired accuracies. With dᵢ the difference on image i, averaged over the S seeds, and δₛ that of seed s,
    averaged over the images, the interval is

        d̃ ± 1.96 √(Σᵢ (dᵢ − d̃)² / (n + 2)²  +  Σₛ (δₛ − δ̄)² / (S (S − 1))),    d̃ = Σᵢ dᵢ / (n + 2),

    where the first sum has two images more than there are, one with d = 1 and one with −1: with one seed this is the
    interval of Bonett and Price 2012 (doi:10.3102/1076998611411915). The p-value is of the sign-flip permutation test of
    the dᵢ, exact up to 20,000 disagreements and by the normal law beyond; with one seed it is exact McNemar. It exchanges
    images and not seeds, and so speaks of these seeds: where seeds differ much, the interval is the more cautious.

    Args:
        correct_a, correct_b: one row a seed, or the single row of a classifier without seeds.
        groups: of images that are not independent (one emoji in several drawing styles): dᵢ are then summed by group in
            the variance, and the test flips whole groups. None: every image stands for itself.
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
    seeds, n = differences.shape
    if groups is None:
        sizes, totals = np.ones(n, dtype=np.int64), differences.sum(0)
    else:
        if np.shape(groups) != (n,):
            raise ValueError(f"groups have shape {np.shape(groups)}; expected one for each of the {n} images")
        _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        totals = np.zeros(len(sizes), dtype=np.int64)
        np.add.at(totals, place, differences.sum(0))
    value = float(totals.sum()) / (n * seeds)
    centre = value * n / (n + 2)
    squares = ((totals / seeds - sizes * centre) ** 2).sum() + (1 - centre) ** 2 + (1 + centre) ** 2
    variance = float(squares) / (n + 2) ** 2
    if seeds > 1:
        variance += float(differences.mean(1).var(ddof=1)) / seeds
    half = Z_95 * math.sqrt(variance)
    only_a, only_b = int((differences > 0).sum()), int((differences < 0).sum())
    lo, hi = max(-1.0, centre - half), min(1.0, centre + half)
    return PairedDifference(value, lo, hi, _sign_flip(totals), n, only_a, only_b)


def _sign_flip(totals: Int[np.ndarray, " g"]) -> float:
    """P(|Σ ± totals| ≥ |Σ totals|) over fair signs: Y = Σ size · heads of each size's coins, by convolution."""
    observed, sizes = abs(int(totals.sum())), np.abs(totals[totals != 0])
    if not observed:
        return 1.0
    whole = int(sizes.sum())
    if whole > EXACT_FLIPS:
        return math.erfc(observed / math.sqrt(2 * float((sizes.astype(np.float64) ** 2).sum())))
    chances = np.ones(1)
    for size, coins in zip(*np.unique(sizes, return_counts=True), strict=True):
        heads = np.arange(1, coins + 1, dtype=np.float64)
        log_choose = np.concatenate([[0.0], np.cumsum(np.log((coins - heads + 1) / heads))])
        longer = np.zeros(len(chances) + int(size * coins))
        for j, chance in enumerate(np.exp(log_choose - coins * math.log(2))):
            if chance:
                longer[j * size : j * size + len(chances)] += chance * chances
        chances = longer
    return min(1.0, 2 * float(chances[: (whole - observed) // 2 + 1].sum()))  # symmetric: both tails


def _correctness(values: np.ndarray, name: str) -> Bool[np.ndarray, "s b"]:
    values = np.asarray(values)
    if values.dtype != bool or values.ndim not in (1, 2):
        raise ValueError(
            f"{name} is {values.dtype} of shape {values.shape}; expected one boolean per image, or (seeds, images)"
        )
    if not values.size:
        raise ValueError(f"{name} is empty; an accuracy needs at least one image: is the split empty?")
    return np.atleast_2d(values)


# --- anomaly metrics ------------------------------------------------------------------------------------------------


class Separation:
    """How scores of ID images and of anomalies interleave: sorted once, measured under any weighting of the images.

    A weighting is how often each image counts, as a resample draws it; all weightings of a side have the same sum.
    Sorting and searching is done when first needed: AUROC alone takes a third of the time of all five.

    Args:
        id_scores: of ID images; larger means more anomalous.
        anomaly_scores: of anomalies.
    Raises:
        ValueError: a side is empty or not one-dimensional, or a score is NaN.
    """

    def __init__(self, id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]):
        self._id, self._anomalies = _side(id_scores, "id_scores"), _side(anomaly_scores, "anomaly_scores")

    @property
    def id_scores(self) -> Float[np.ndarray, " b"]:
        """As they were given."""
        return self._id

    @property
    def anomaly_scores(self) -> Float[np.ndarray, " a"]:
        """As they were given."""
        return self._anomalies

    @cached_property
    def _id_order(self) -> np.ndarray:
        return np.argsort(self._id, kind="stable")

    @cached_property
    def _anomaly_order(self) -> np.ndarray:
        return np.argsort(self._anomalies, kind="stable")

    @cached_property
    def _id_sorted(self) -> np.ndarray:
        return np.sort(self._id)

    @cached_property
    def _anomalies_sorted(self) -> np.ndarray:
        return np.sort(self._anomalies)

    # For each anomaly (each ID image), in ascending order, how many of a side score below it, or at most as high.

    @cached_property
    def _id_below(self) -> Int[np.ndarray, " a"]:
        return np.searchsorted(self._id_sorted, self._anomalies_sorted, "left")

    @cached_property
    def _id_upto(self) -> Int[np.ndarray, " a"]:
        return np.searchsorted(self._id_sorted, self._anomalies_sorted, "right")

    @cached_property
    def _anomalies_upto(self) -> Int[np.ndarray, " b"]:
        return np.searchsorted(self._anomalies_sorted, self._id_sorted, "right")

    @cached_property
    def _own_upto(self) -> Int[np.ndarray, " b"]:
        return np.searchsorted(self._id_sorted, self._id_sorted, "right")

    @cached_property
    def _own_below(self) -> Int[np.ndarray, " a"]:
        return np.searchsorted(self._anomalies_sorted, self._anomalies_sorted, "left")

    @cached_property
    def _ties_across(self) -> bool:
        return not np.array_equal(self._id_below, self._id_upto)

    def measure(
        self,
        metrics: Sequence[str] | None = None,
        id_counts: Int[np.ndarray, "w b"] | None = None,
        anomaly_counts: Int[np.ndarray, "w a"] | None = None,
    ) -> dict[str, Float[np.ndarray, " w"]]:
        """Metrics under each weighting.

        Args:
            metrics: names, of `ANOMALY_METRICS`; None: all.
            id_counts, anomaly_counts: how often each image counts, whole numbers, in the order of the scores given;
                None: each once.
        """
        weighed = _Weighed(
            *_cumulated(id_counts, lambda: self._id_order, len(self._id)),
            *_cumulated(anomaly_counts, lambda: self._anomaly_order, len(self._anomalies)),
        )
        return {name: ANOMALY_METRICS[name](self, weighed) for name in metrics or ANOMALY_METRICS}

    def _auroc(self, w: _Weighed) -> Float[np.ndarray, " w"]:
        """Σ over anomalies of ID below + ½ ID equal, over all pairs; whole numbers up to the division, so exact."""
        twice = np.take(w.id_upto, self._id_below, axis=1)
        twice = twice + (np.take(w.id_upto, self._id_upto, axis=1) if self._ties_across else twice)
        return np.einsum("wa,wa->w", w.anomalies, twice) / (2 * w.n_id * w.n_anomalies)

    def _fpr95(self, w: _Weighed) -> Float[np.ndarray, " w"]:
        """Accept as ID what scores at most the k-th lowest ID score, k = ⌈0.95 n⌉; share of anomalies accepted."""
        needed = -(-95 * w.n_id // 100)  # in whole numbers: 0.95 has no exact binary form
        threshold = (w.id_upto[:, 1:] >= needed).argmax(1)
        accepted = np.take_along_axis(w.anomalies_upto, self._anomalies_upto[threshold][:, None], 1)[:, 0]
        return accepted / w.n_anomalies

    def _fpr95_ood_positive(self, w: _Weighed) -> Float[np.ndarray, " w"]:
        """Flag what scores at least the k-th highest anomaly's score, k = ⌈0.95 n⌉; share of ID flagged."""
        needed = -(-95 * w.n_anomalies // 100)
        threshold = (w.anomalies_upto <= w.n_anomalies - needed).sum(1) - 1  # the last one that leaves enough above
        below = np.take_along_axis(w.id_upto, self._id_below[threshold][:, None], 1)[:, 0]
        return (w.n_id - below) / w.n_id

    def _aupr_in(self, w: _Weighed) -> Float[np.ndarray, " w"]:
        """ID images are found from the lowest score up."""
        true = np.take(w.id_upto, self._own_upto, axis=1)
        false = np.take(w.anomalies_upto, self._anomalies_upto, axis=1)
        return _average_precision(w.id, true, false, w.n_id)

    def _aupr_out(self, w: _Weighed) -> Float[np.ndarray, " w"]:
        """Anomalies are found from the highest score down."""
        true = w.n_anomalies - np.take(w.anomalies_upto, self._own_below, axis=1)
        false = w.n_id - np.take(w.id_upto, self._id_below, axis=1)
        return _average_precision(w.anomalies, true, false, w.n_anomalies)


ANOMALY_METRICS: dict[str, Callable[[Separation, _Weighed], np.ndarray]] = {
    "auroc": Separation._auroc,
    "fpr95": Separation._fpr95,
    "fpr95_ood_positive": Separation._fpr95_ood_positive,
    "aupr_in": Separation._aupr_in,
    "aupr_out": Separation._aupr_out,
}


@dataclass(frozen=True)
class _Weighed:
    """Counts of both sides in ascending order of score, and their cumulated sums with a 0 first."""

    id: Int[np.ndarray, "w b"]
    id_upto: Int[np.ndarray, "w b+1"]
    anomalies: Int[np.ndarray, "w a"]
    anomalies_upto: Int[np.ndarray, "w a+1"]

    @property
    def n_id(self) -> int:
        return int(self.id_upto[0, -1])

    @property
    def n_anomalies(self) -> int:
        return int(self.anomalies_upto[0, -1])


def _cumulated(counts: np.ndarray | None, order: Callable[[], np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    if counts is None:
        return np.ones((1, n), dtype=np.int64), np.arange(n + 1)[None]
    counts = np.take(counts, order(), axis=1)
    upto = np.zeros((len(counts), n + 1), dtype=np.int64)
    np.cumsum(counts, axis=1, out=upto[:, 1:])
    return counts, upto


def _average_precision(positives: np.ndarray, true: np.ndarray, false: np.ndarray, n: int) -> Float[np.ndarray, " w"]:
    """Σ (Rᵢ − Rᵢ₋₁) Pᵢ; where nothing is found yet there is no positive either, so the term is 0."""
    return np.einsum("wi,wi->w", positives, true / np.maximum(true + false, 1)) / n


def _side(scores: np.ndarray, name: str) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} has shape {scores.shape}; expected one score per image, and at least one image")
    if np.isnan(scores).any():
        raise ValueError(
            f"{name} holds {int(np.isnan(scores).sum())} NaN among {len(scores)} scores, which no threshold can "
            "order; look for infinite or NaN logits"
        )
    return scores


def auroc(id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """P(an anomaly scores above an ID image) + ½ P(they score the same). Raises as `Separation`."""
    return _point("auroc", id_scores, anomaly_scores)


def fpr95(id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """Share of anomalies accepted as ID where at least 95 % of ID is accepted. Raises as `Separation`."""
    return _point("fpr95", id_scores, anomaly_scores)


def fpr95_ood_positive(id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """Share of ID flagged where at least 95 % of the anomalies are flagged. Raises as `Separation`."""
    return _point("fpr95_ood_positive", id_scores, anomaly_scores)


def aupr_in(id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """Average precision with ID positive. Raises as `Separation`."""
    return _point("aupr_in", id_scores, anomaly_scores)


def aupr_out(id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """Average precision with anomalies positive. Raises as `Separation`."""
    return _point("aupr_out", id_scores, anomaly_scores)


def _point(metric: str, id_scores: np.ndarray, anomaly_scores: np.ndarray) -> float:
    return float(Separation(id_scores, anomaly_scores).measure([metric])[metric][0])


@dataclass(frozen=True)
class RocCurve:
    """ROC with ID positive: `tpr` is the share of ID accepted, `fpr` that of anomalies accepted; from (0, 0) to (1, 1).

    `fpr95` is read off where `tpr` first reaches 0.95.
    """

    fpr: Float[np.ndarray, " t"]
    tpr: Float[np.ndarray, " t"]


def roc_curve(
    id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"], points: int = 200
) -> RocCurve:
    """The ROC at its distinct scores, thinned to at most `points` that stand evenly along the curve, ends included.

    Raises:
        ValueError: as `Separation`, or `points` is below 2.
    """
    if points < 2:
        raise ValueError(f"points is {points}; a curve needs its two ends, so at least 2")
    sides = _side(id_scores, "id_scores"), _side(anomaly_scores, "anomaly_scores")
    distinct = np.unique(np.concatenate(sides))
    accepted = [np.searchsorted(np.sort(side), distinct, "right") / len(side) for side in sides]
    tpr, fpr = (np.concatenate([[0.0], share]) for share in accepted)
    if len(tpr) > points:
        way = tpr + fpr  # length along the curve in the 1-norm: grows from 0 to 2
        keep = np.unique(np.searchsorted(way, np.linspace(0.0, 2.0, points)).clip(max=len(way) - 1))
        tpr, fpr = tpr[keep], fpr[keep]
    return RocCurve(fpr, tpr)
