"""Anomaly metrics of scores that are larger for anomalies; all are fractions in [0, 1].

Two conventions of FPR at 95 % stand in the literature, and both are here under their own names:

- `fpr95`: ID is positive (Liu et al. 2020, arXiv:2010.03759): the share of anomalies that are accepted as ID by the
  strictest threshold that accepts at least 95 % of ID;
- `fpr95_ood_positive`: anomalies are positive (OpenOOD v1.5, arXiv:2306.09301): the share of ID that is flagged by the
  strictest threshold that flags at least 95 % of the anomalies.

AUPR is average precision, Σ (Rᵢ − Rᵢ₋₁) Pᵢ over the distinct scores, as in scikit-learn: `aupr_in` with ID positive,
`aupr_out` with anomalies positive. Equal scores count half in AUROC and are never split by a threshold. Infinite scores
are ordinary scores: they stand at the ends of the order and tie with each other. NaN is an error.

Their intervals come from `bootstrap`.

Shape letters: b image, a anomaly, w weighting (a resample), u distinct score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


class Separation:
    """How scores of ID images and of anomalies interleave: sorted once, measured under any weighting of the images.

    A weighting is how often each image counts, as a resample draws it; all weightings of a side have the same sum.

    Args:
        id_scores: of ID images; larger means more anomalous.
        anomaly_scores: of anomalies.
    Raises:
        ValueError: a side is empty or not one-dimensional, or a score is NaN.
    """

    def __init__(self, id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]):
        own, strange = _side(id_scores, "id_scores"), _side(anomaly_scores, "anomaly_scores")
        self._id_order, self._anomaly_order = (np.argsort(side, kind="stable") for side in (own, strange))
        own, strange = own[self._id_order], strange[self._anomaly_order]
        # For each anomaly (each ID image), in ascending order, how many of a side score below it, or at most as high.
        self._id_below, self._id_upto = (np.searchsorted(own, strange, side) for side in ("left", "right"))
        self._anomalies_upto = np.searchsorted(strange, own, "right")
        self._own_upto, self._own_below = np.searchsorted(own, own, "right"), np.searchsorted(strange, strange, "left")
        self._ties_across = not np.array_equal(self._id_below, self._id_upto)

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
        weighed = _Weighed(*_cumulated(id_counts, self._id_order), *_cumulated(anomaly_counts, self._anomaly_order))
        return {name: ANOMALY_METRICS[name](self, weighed) for name in metrics or ANOMALY_METRICS}

    def _auroc(self, w: _Weighed) -> Float[np.ndarray, " w"]:
        """P(an anomaly scores above an ID image) + ½ P(they score the same).

        Over all pairs: Σ over anomalies of ID below + ½ ID equal. Whole numbers up to the division, so it is exact.
        """
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


def _cumulated(counts: np.ndarray | None, order: Int[np.ndarray, " b"]) -> tuple[np.ndarray, np.ndarray]:
    n = len(order)
    if counts is None:
        return np.ones((1, n), dtype=np.int64), np.arange(n + 1)[None]
    counts = np.take(counts, order, axis=1)
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


def anomaly_metric(name: str, id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> float:
    """One of `ANOMALY_METRICS`, each image counting once. Raises as `Separation`."""
    return float(Separation(id_scores, anomaly_scores).measure([name])[name][0])


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
