"""Bootstrap over images and probe seeds of the anomaly metrics, and of their paired differences.

Two levels. A resample w draws the ID images, the anomalies and the S probe seeds, each with replacement and each on its
own; with mₛ(w) the metric of seed s on the drawn images, the resample's value is

    m̄(w) + √(S / (S − 1)) Σₛ (cₛ(w) / S − 1 / S) mₛ(w),

m̄ the mean over all seeds and cₛ how often seed s was drawn. Without the root, S seeds would show only (S − 1) / S of
their variance (Davison and Hinkley 1997, section 3.8): with three seeds a third of it would be missing. Where there is
one seed, the value is m̄(w). Intervals go from the 2.5 to the 97.5 percentile of the resamples.

ID images are drawn class by class (stratified, as the splits were made) where every class has at least 10 of them; with
fewer, drawing within classes would miss a good part of the variance, and they are drawn from all.

Where a side has more than 65,536 images, they are drawn in random groups and counted in cells of scores (`binned`): the
same intervals, but for the randomness of a bootstrap, in a time that hardly grows with images or resamples.

Which images a resample draws depends on the seed, the classes and the name of the data sets only: two detectors, readouts
or runs see the same resamples, so that the difference of their values, resample by resample, is paired. The p-value of a
difference is 2 (1 + the number of resamples on the rarer side of 0) / (1 + the number of resamples): it agrees with the
interval, and with 1,000 resamples is never below 0.002.

Shape letters: b image, a anomaly, s probe seed, w resample, m row of scores.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from regvit.stats import binned
from regvit.stats.metrics import ANOMALY_METRICS, Difference, Estimate, Separation

CELLS_PER_CHUNK = 1 << 17  # resamples × images held at once: 1 MiB an array, which stays in the processor's cache
MANY_IMAGES = 1 << 16  # of a side: beyond, `binned`
SMALLEST_STRATUM = 10  # images of a class: the bootstrap within n images shows (n − 1) / n of their variance


@dataclass(frozen=True)
class Resampled:
    """Metrics of several rows of scores on the same images, as they stand and resampled.

    Attributes:
        points: by metric, of each row.
        values: by metric, of each row in each resample.
        n: anomalies.
    """

    points: dict[str, Float[np.ndarray, " m"]]
    values: dict[str, Float[np.ndarray, "m w"]]
    n: int

    def rows(self, start: int, stop: int) -> Resampled:
        """Some of the rows."""
        points, values = (
            {metric: each[start:stop] for metric, each in kind.items()} for kind in (self.points, self.values)
        )
        return Resampled(points, values, self.n)


def resample(
    id_scores: Float[np.ndarray, "m b"],
    anomaly_scores: Float[np.ndarray, "m a"],
    resamples: int = 1000,
    seed: int = 0,
    strata: Int[np.ndarray, " b"] | None = None,
    name: str = "",
    metrics: Sequence[str] = tuple(ANOMALY_METRICS),
) -> Resampled:
    """Anomaly metrics of each row of scores under the same resamples of the images.

    Args:
        id_scores: larger means more anomalous; a row a detector, readout, seed, run.
        anomaly_scores: the same rows, of the anomalies.
        resamples: number of them, at least 1.
        seed: of the draws.
        strata: class of each ID image; None: drawn from all.
        name: of the anomaly set, so that each set is drawn on its own.
        metrics: names of them.
    Raises:
        ValueError: a side is empty, a score is NaN, the shapes do not fit, or `resamples` is below 1.
    """
    if resamples < 1:
        raise ValueError(f"bootstrap is {resamples}; an interval needs at least 1 resample, 1,000 for a stable one")
    id_scores, anomaly_scores = np.asarray(id_scores), np.asarray(anomaly_scores)
    if id_scores.ndim != 2 or anomaly_scores.ndim != 2 or len(id_scores) != len(anomaly_scores):
        raise ValueError(
            f"id_scores {id_scores.shape} and anomaly_scores {anomaly_scores.shape} do not fit; expected as many rows "
            "of both, one column an image"
        )
    b, a = id_scores.shape[1], anomaly_scores.shape[1]
    of_id, of_anomalies = (_strata(strata, b), [seed, 0]), ([np.arange(a)], [seed, 1, zlib.crc32(name.encode())])
    if max(a, b) > MANY_IMAGES:
        sides = [binned.Side(rows, resamples, entropy) for rows, entropy in (of_id, of_anomalies)]
        found = [binned.measure(Separation(*pair), *sides, metrics)
                 for pair in zip(id_scores, anomaly_scores, strict=True)]  # fmt: skip
        return Resampled(
            {metric: np.array([point[metric] for point, _ in found]) for metric in metrics},
            {metric: np.stack([drawn[metric] for _, drawn in found]) for metric in metrics},
            a,
        )
    images, anomalies = _Draws(*of_id), _Draws(*of_anomalies)
    rows = [Separation(*pair) for pair in zip(id_scores, anomaly_scores, strict=True)]
    points = [row.measure(metrics) for row in rows]
    values = {metric: np.empty((len(rows), resamples)) for metric in metrics}
    at_once = max(1, CELLS_PER_CHUNK // max(a, b, 1))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        id_counts, anomaly_counts = images.next(count), anomalies.next(count)
        for m, row in enumerate(rows):
            for metric, measured in row.measure(metrics, id_counts, anomaly_counts).items():
                values[metric][m, start : start + count] = measured
    return Resampled({metric: np.array([point[metric][0] for point in points]) for metric in metrics}, values, a)


def estimate(points: Float[np.ndarray, " s"], values: Float[np.ndarray, "s w"], n: int, seed: int = 0) -> Estimate:
    """Mean over the seeds and its interval over images and seeds, of what `resample` gave for each seed."""
    value, low, high = _interval(points, _over_seeds(values, seed))
    return Estimate(value, max(0.0, low), min(1.0, high), n)


def difference(
    points_a: Float[np.ndarray, " s"],
    values_a: Float[np.ndarray, "s w"],
    points_b: Float[np.ndarray, " s"],
    values_b: Float[np.ndarray, "s w"],
    n: int,
    seed: int = 0,
) -> Difference:
    """Metric of a minus metric of b, paired by image and by seed; a side without seeds (one row) meets all of the other.

    Raises:
        ValueError: the numbers of seeds or of resamples do not fit.
    """
    if values_a.shape[1] != values_b.shape[1] or (
        len(values_a) != len(values_b) and 1 not in (len(values_a), len(values_b))
    ):
        raise ValueError(
            f"a has {len(values_a)} seeds in {values_a.shape[1]} resamples and b {len(values_b)} in "
            f"{values_b.shape[1]}; pair the same seeds and resamples"
        )
    drawn = _over_seeds(values_a - values_b, seed)
    value, low, high = _interval(points_a - points_b, drawn)
    rarer = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (1 + int(rarer)) / (1 + len(drawn)))
    return Difference(value, max(-1.0, low), min(1.0, high), p, n)


def mean_over_sets(sets: Mapping[str, Resampled]) -> Resampled:
    """The mean over several anomaly sets, each weighing the same; their anomalies were drawn independently."""
    parts = list(sets.values())
    metrics = parts[0].points
    return Resampled(
        {metric: np.mean([part.points[metric] for part in parts], axis=0) for metric in metrics},
        {metric: np.mean([part.values[metric] for part in parts], axis=0) for metric in metrics},
        sum(part.n for part in parts),
    )


def _over_seeds(values: Float[np.ndarray, "s w"], seed: int) -> Float[np.ndarray, " w"]:
    seeds, resamples = values.shape
    mean = values.mean(0)
    if seeds == 1:
        return mean
    drawn = np.random.default_rng([seed, 2]).multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # (w, s)
    return mean + np.sqrt(seeds / (seeds - 1)) * ((drawn.T - 1) / seeds * values).sum(0)


def _interval(points: Float[np.ndarray, " s"], drawn: Float[np.ndarray, " w"]) -> tuple[float, float, float]:
    """Value, and the percentiles, widened to hold it."""
    value = float(points.mean())
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return value, min(low, value), max(high, value)


def _strata(strata: np.ndarray | None, b: int) -> list[Int[np.ndarray, " n"]]:
    """Rows of each class; all rows as one where a class has few."""
    if strata is None:
        return [np.arange(b)]
    if np.shape(strata) != (b,):
        raise ValueError(f"strata have shape {np.shape(strata)}; expected the class of each of the {b} ID images")
    rows = [np.flatnonzero(strata == label) for label in np.unique(strata)]
    return rows if min(map(len, rows), default=0) >= SMALLEST_STRATUM else [np.arange(b)]


class _Draws:
    """How often each image is drawn, resample after resample; the same however many are asked for at once."""

    def __init__(self, strata: list[Int[np.ndarray, " n"]], entropy: list[int]):
        self._n = sum(map(len, strata))
        self._strata = [(rows, np.random.default_rng([*entropy, i])) for i, rows in enumerate(strata)]

    def next(self, resamples: int) -> Int[np.ndarray, "w b"]:
        offset = np.arange(resamples)[:, None] * self._n
        drawn = [rows[rng.integers(0, len(rows), size=(resamples, len(rows)))] for rows, rng in self._strata]
        counts = np.bincount((np.concatenate(drawn, axis=1) + offset).ravel(), minlength=resamples * self._n)
        return counts.reshape(resamples, self._n)
