"""Accuracy and anomaly metrics with 95 % intervals, and the paired comparison of two runs.

All values are fractions in [0, 1]. Anomaly scores are larger for anomalies. Two conventions of FPR at 95 % stand in the
literature, and both are here under their own names:

- `fpr95`: ID is positive (Liu et al. 2020, arXiv:2010.03759): the share of anomalies that are accepted as ID by the
  strictest threshold that accepts at least 95 % of ID;
- `fpr95_ood_positive`: anomalies are positive (OpenOOD v1.5, arXiv:2306.09301): the share of ID that is flagged by the
  strictest threshold that flags at least 95 % of the anomalies.

AUPR is average precision, Σ (Rᵢ − Rᵢ₋₁) Pᵢ over the distinct scores, as in scikit-learn: `aupr_in` with ID positive,
`aupr_out` with anomalies positive. Equal scores count half in AUROC and are never split by a threshold. Infinite scores
are ordinary scores: they stand at the ends of the order and tie with each other. NaN is an error.

Accuracies carry Wilson's score interval (closed form, never outside [0, 1]); the anomaly metrics carry percentile
intervals of a bootstrap over images that resamples ID images and anomalies each on their own.

Shape letters: b image, u distinct score, s bootstrap resample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

Z_95 = 1.959963984540054  # 97.5 % point of the standard normal distribution: two-sided 95 %
CELLS_PER_CHUNK = 1 << 21  # resamples × distinct scores held at once: 16 MiB an array of int64


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
class PairedDifference:
    """How two classifiers differ on the same images.

    Attributes:
        value: accuracy of a minus accuracy of b, in [−1, 1].
        lo, hi: its 95 % interval.
        p: two-sided exact McNemar p-value of "both are equally accurate".
        only_a, only_b: images that just this one gets right.
        n: images.
    """

    value: float
    lo: float
    hi: float
    p: float
    only_a: int
    only_b: int
    n: int


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


def accuracy(correct: Bool[np.ndarray, " b"]) -> Estimate:
    """Share of True with Wilson's 95 % score interval (Wilson 1927).

    Raises:
        ValueError: there is no image, or `correct` is not boolean.
    """
    correct = _correctness(correct, "correct")
    n, p = len(correct), float(correct.mean())
    centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * np.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
    return Estimate(p, float(min(p, max(0.0, centre - half))), float(max(p, min(1.0, centre + half))), n)


def paired_accuracy_difference(
    correct_a: Bool[np.ndarray, " b"], correct_b: Bool[np.ndarray, " b"]
) -> PairedDifference:
    """Accuracy of a minus accuracy of b on the same images, in the same order.

    Only images on which the two disagree carry evidence, so the interval is much narrower than that of the difference
    of two unpaired accuracies. Interval: Bonett and Price 2012 (doi:10.3102/1076998611411915), Wald's with one
    pseudo-image added to each kind of disagreement. p-value: exact McNemar, the two-sided binomial test of the
    disagreements against ½.

    Raises:
        ValueError: the lengths differ, there is no image, or an array is not boolean.
    """
    a, b = _correctness(correct_a, "correct_a"), _correctness(correct_b, "correct_b")
    if len(a) != len(b):
        raise ValueError(
            f"correct_a has {len(a)} images and correct_b {len(b)}; pair the same images in the same order"
        )
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    p_a, p_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = Z_95 * np.sqrt((p_a + p_b - (p_a - p_b) ** 2) / (n + 2))
    lo, hi = max(-1.0, p_a - p_b - half), min(1.0, p_a - p_b + half)
    return PairedDifference((only_a - only_b) / n, float(lo), float(hi), _mcnemar(only_a, only_b), only_a, only_b, n)


def _mcnemar(only_a: int, only_b: int) -> float:
    """P(at most min(only_a, only_b) heads of that many fair coins), both tails, at most 1."""
    coins, fewer = only_a + only_b, min(only_a, only_b)
    heads = np.arange(1, fewer + 1, dtype=np.float64)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((coins - heads + 1) / heads))])
    return float(min(1.0, 2 * np.exp(log_choose - coins * np.log(2)).sum()))


def _correctness(values: np.ndarray, name: str) -> Bool[np.ndarray, " b"]:
    values = np.asarray(values)
    if values.dtype != bool or values.ndim != 1:
        raise ValueError(f"{name} is {values.dtype} of shape {values.shape}; expected one boolean per image")
    if not len(values):
        raise ValueError(f"{name} is empty; an accuracy needs at least one image: is the split empty?")
    return values


# --- anomaly metrics ------------------------------------------------------------------------------------------------


def auroc(id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """P(an anomaly scores above an ID image) + ½ P(they score the same). Raises as `anomaly_metrics`."""
    return _point(_auroc, id_scores, anomaly_scores)


def fpr95(id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """Share of anomalies accepted as ID where at least 95 % of ID is accepted. Raises as `anomaly_metrics`."""
    return _point(_fpr95, id_scores, anomaly_scores)


def fpr95_ood_positive(id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """Share of ID flagged where at least 95 % of the anomalies are flagged. Raises as `anomaly_metrics`."""
    return _point(_fpr95_ood_positive, id_scores, anomaly_scores)


def aupr_in(id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """Average precision with ID positive. Raises as `anomaly_metrics`."""
    return _point(_aupr_in, id_scores, anomaly_scores)


def aupr_out(id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """Average precision with anomalies positive. Raises as `anomaly_metrics`."""
    return _point(_aupr_out, id_scores, anomaly_scores)


def anomaly_metrics(
    id_scores: Float[np.ndarray, " b"],
    anomaly_scores: Float[np.ndarray, " a"],
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """All five anomaly metrics with percentile bootstrap intervals.

    The images that each resample draws depend on `seed` and on the number of images only, so two detectors or two runs
    on the same images see the same resamples. Repeated images push average precision up a little; where the detector is
    worse than chance by far, all resamples can lie above the point, and the interval is widened to hold it.

    Args:
        id_scores: of ID images; larger means more anomalous.
        anomaly_scores: of anomalies; larger means more anomalous.
        bootstrap: number of resamples, at least 1.
        seed: of the resampling.
    Returns:
        `{auroc, fpr95, fpr95_ood_positive, aupr_in, aupr_out}`; `n` of each is the number of anomalies.
    Raises:
        ValueError: a side is empty or not one-dimensional, a score is NaN, or `bootstrap` is below 1.
    """
    if bootstrap < 1:
        raise ValueError(f"bootstrap is {bootstrap}; an interval needs at least 1 resample, 1,000 for a stable one")
    id_ranks, anomaly_ranks, distinct = _ranks(id_scores, anomaly_scores)
    points = _measure(_counts(id_ranks[None], distinct), _counts(anomaly_ranks[None], distinct))
    id_rng, anomaly_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    resamples_per_chunk = max(1, CELLS_PER_CHUNK // distinct)
    chunks = []
    for start in range(0, bootstrap, resamples_per_chunk):
        s = min(resamples_per_chunk, bootstrap - start)
        id_counts = _counts(_resample(id_ranks, s, id_rng), distinct)
        anomaly_counts = _counts(_resample(anomaly_ranks, s, anomaly_rng), distinct)
        chunks.append(_measure(id_counts, anomaly_counts))
    estimates = {}
    for name in ANOMALY_METRICS:
        value = float(points[name][0])
        lo, hi = np.quantile(np.concatenate([chunk[name] for chunk in chunks]), [0.025, 0.975]).tolist()
        estimates[name] = Estimate(value, min(lo, value), max(hi, value), len(anomaly_ranks))
    return estimates


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
        ValueError: as `anomaly_metrics`, or `points` is below 2.
    """
    if points < 2:
        raise ValueError(f"points is {points}; a curve needs its two ends, so at least 2")
    id_ranks, anomaly_ranks, distinct = _ranks(id_scores, anomaly_scores)
    tpr, fpr = (
        np.concatenate([[0.0], np.bincount(ranks, minlength=distinct).cumsum() / len(ranks)])
        for ranks in (id_ranks, anomaly_ranks)
    )
    if len(tpr) > points:
        way = tpr + fpr  # length along the curve in the 1-norm: grows from 0 to 2
        keep = np.unique(np.searchsorted(way, np.linspace(0.0, 2.0, points)).clip(max=len(way) - 1))
        tpr, fpr = tpr[keep], fpr[keep]
    return RocCurve(fpr, tpr)


def _point(metric: Callable, id_scores: np.ndarray, anomaly_scores: np.ndarray) -> float:
    # Sorted scores are looked up in the order in which they lie in memory: much faster on 10⁶ of them.
    id_ranks, anomaly_ranks, distinct = _ranks(np.sort(id_scores), np.sort(anomaly_scores))
    return float(metric(_counts(id_ranks[None], distinct), _counts(anomaly_ranks[None], distinct))[0])


def _ranks(id_scores: np.ndarray, anomaly_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Place of each score among the distinct scores of both sides, ascending, and how many distinct ones there are."""
    sides = []
    for scores, name in ((id_scores, "id_scores"), (anomaly_scores, "anomaly_scores")):
        scores = np.asarray(scores)
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"{name} has shape {scores.shape}; expected one score per image, and at least one image")
        if np.isnan(scores).any():
            raise ValueError(
                f"{name} holds {int(np.isnan(scores).sum())} NaN among {len(scores)} scores, which no threshold can "
                "order; look for infinite or NaN logits"
            )
        sides.append(scores)
    distinct = np.unique(np.concatenate(sides))
    return np.searchsorted(distinct, sides[0]), np.searchsorted(distinct, sides[1]), len(distinct)


def _resample(ranks: Int[np.ndarray, " b"], s: int, rng: np.random.Generator) -> Int[np.ndarray, "s b"]:
    return ranks[rng.integers(0, len(ranks), size=(s, len(ranks)))]


def _counts(ranks: Int[np.ndarray, "s b"], distinct: int) -> Int[np.ndarray, "s u"]:
    """How often each distinct score occurs in each row."""
    offset = np.arange(len(ranks))[:, None] * distinct
    return np.bincount((ranks + offset).ravel(), minlength=len(ranks) * distinct).reshape(len(ranks), distinct)


def _measure(id_counts: Int[np.ndarray, "s u"], anomaly_counts: Int[np.ndarray, "s u"]) -> dict[str, np.ndarray]:
    return {name: metric(id_counts, anomaly_counts) for name, metric in ANOMALY_METRICS.items()}


def _auroc(id_counts: np.ndarray, anomaly_counts: np.ndarray) -> Float[np.ndarray, " s"]:
    twice_below = 2 * id_counts.cumsum(1) - id_counts  # 2 × (ID below + ½ ID equal): whole numbers, so exact
    return (anomaly_counts * twice_below).sum(1) / (2 * id_counts.sum(1) * anomaly_counts.sum(1))


def _fpr95(id_counts: np.ndarray, anomaly_counts: np.ndarray) -> Float[np.ndarray, " s"]:
    """Accept as ID what scores at most the k-th lowest ID score, k = ⌈0.95 n⌉; share of anomalies accepted."""
    needed = -(-95 * id_counts.sum(1) // 100)  # ⌈0.95 n⌉ in whole numbers: 0.95 has no exact binary form
    threshold = (id_counts.cumsum(1) >= needed[:, None]).argmax(1)
    accepted = np.take_along_axis(anomaly_counts.cumsum(1), threshold[:, None], 1)[:, 0]
    return accepted / anomaly_counts.sum(1)


def _fpr95_ood_positive(id_counts: np.ndarray, anomaly_counts: np.ndarray) -> Float[np.ndarray, " s"]:
    """The same with the sides and the direction swapped."""
    return _fpr95(anomaly_counts[:, ::-1], id_counts[:, ::-1])


def _aupr_out(id_counts: np.ndarray, anomaly_counts: np.ndarray) -> Float[np.ndarray, " s"]:
    """Anomalies are found from the highest score down."""
    return _average_precision(anomaly_counts[:, ::-1], id_counts[:, ::-1])


def _aupr_in(id_counts: np.ndarray, anomaly_counts: np.ndarray) -> Float[np.ndarray, " s"]:
    """ID images are found from the lowest score up."""
    return _average_precision(id_counts, anomaly_counts)


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> Float[np.ndarray, " s"]:
    """Σ (Rᵢ − Rᵢ₋₁) Pᵢ, the columns in the order in which a falling threshold takes them in."""
    true = positives.cumsum(1)
    found = true + negatives.cumsum(1)
    precision = true / np.maximum(found, 1)  # nothing found yet: no positive there either, so the term is 0
    return (positives * precision).sum(1) / positives.sum(1)


ANOMALY_METRICS: dict[str, Callable] = {
    "auroc": _auroc,
    "fpr95": _fpr95,
    "fpr95_ood_positive": _fpr95_ood_positive,
    "aupr_in": _aupr_in,
    "aupr_out": _aupr_out,
}
