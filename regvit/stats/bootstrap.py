"""The bootstrap over images: means, ratios of sums, anomaly metrics, and paired differences of them.

Every interval here resamples images with replacement, through one function, `draws`; what comes of it is

- for a mean of one value an image, the studentised bootstrap (Efron and Tibshirani 1993, chapter 12): the quantiles of
  (m* − m) / s* stand in the place of ±1.96, so that skewed values and small n are covered (a percentile interval of 20
  values covers 92 %);
- for a fraction that is no such mean (AUROC, FPR95, mIoU, pixel accuracy), its variance over the images, from which
  `intervals` makes the interval, together with what probe seeds differ.

Which images a resample draws depends on the seed, the number of images and the name of the data set only: two detectors,
readouts or runs see the same resamples, so that the difference of their values, resample by resample, is paired.

Shape letters: b image, a anomaly, s probe seed, w resample, m row of scores.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtr, stdtrit

from regvit.stats.accuracy import accuracy
from regvit.stats.anomaly_metrics import ANOMALY_METRICS, Separation
from regvit.stats.intervals import Difference, Estimate, Variance, difference, fraction

RESAMPLES = 1000
CELLS_AT_ONCE = 1 << 17  # resamples × images held at once: 1 MiB an array, which stays in the processor's cache
MANY_IMAGES = 1 << 14  # of a side: with more, anomaly metrics are resampled on so many of them
LEAST_SPREAD = 0.25  # of a resample's standard deviation to that of the values: none at all would make t infinite


def draws(
    n: int, resamples: int, entropy: Sequence[int], at_once: int | None = None
) -> Iterator[Int[np.ndarray, "w b"]]:
    """How often each of n images is drawn, resample after resample, in blocks; the same however they are cut."""
    rng = np.random.default_rng(entropy)
    at_once = at_once or max(1, CELLS_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = rng.integers(0, n, size=(count, n)) + np.arange(count)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)


def of_sums(
    measure: Callable[..., np.ndarray], sums: Sequence[np.ndarray], seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """What a function of sums over images gives in each resample.

    Args:
        measure: of as many sums as there are arrays, (w, …) each.
        sums: what is summed, image by image, (b, …) each.
    Returns: (w, …).
    """
    values = []
    for counts in draws(len(sums[0]), resamples, [seed]):
        values.append(measure(*(np.tensordot(counts, each, 1) for each in sums)))
    return np.concatenate(values)


# --- means ----------------------------------------------------------------------------------------------------------


def mean_over_images(values: Float[np.ndarray, " b"], seed: int = 0, resamples: int = RESAMPLES) -> Estimate | None:
    """Mean of one value an image with its interval: the studentised bootstrap, or Wilson's if all values are 0 or 1.

    Args:
        values: nan where the image has none, and then it is left out.
    Returns: None where no image has a value.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    if 0 < values.sum() < len(values) and np.isin(values, (0, 1)).all():
        return accuracy(values.astype(bool))
    found = _studentised(values, seed, resamples)
    return Estimate(found.value, found.lo, found.hi, found.n)


def paired_mean_difference(
    a: Float[np.ndarray, " b"], b: Float[np.ndarray, " b"], seed: int = 0, resamples: int = RESAMPLES
) -> Difference | None:
    """Mean of a minus mean of b over the images where both have a value; None where there are none.

    Raises:
        ValueError: they are not of the same number of images.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; pair the same images in the same order")
    differences = (a - b)[~np.isnan(a - b)]
    return _studentised(differences, seed, resamples) if len(differences) else None


def _studentised(values: Float[np.ndarray, " b"], seed: int, resamples: int) -> Difference:
    """Mean, interval and p-value: the wider of the bootstrap's and Student's, as the former is short where tails are long.

    p of the bootstrap: the resamples that lie as far out as 0, one more in both counts, twice for the two sides.
    """
    n, mean, spread = len(values), float(values.mean()), float(values.std())
    if spread <= 1e-12 * abs(mean) or n < 2:
        return Difference(mean, mean, mean, float(mean == 0), n)
    centred = values - mean

    def t(total: np.ndarray, squares: np.ndarray) -> np.ndarray:
        shift = total / n
        return shift / np.sqrt(np.maximum(squares / n - shift**2, (LEAST_SPREAD * spread) ** 2))

    drawn = np.sort(of_sums(t, (centred, centred**2), seed, resamples))
    last = max(1, math.ceil(0.025 * (resamples + 1) - 1))  # so that p < 0.05 where the interval leaves 0 out
    beyond = min((drawn >= mean / spread).sum(), (drawn <= mean / spread).sum())
    error = spread / math.sqrt(n - 1)
    half = float(stdtrit(n - 1, 0.975)) * error
    return Difference(
        mean,
        min(mean - spread * float(drawn[-last]), mean - half),
        max(mean - spread * float(drawn[last - 1]), mean + half),
        min(1.0, max(2 * (1 + int(beyond)) / (1 + resamples), 2 * float(stdtr(n - 1, -abs(mean) / error)))),
        n,
    )


# --- anomaly metrics ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resampled:
    """Anomaly metrics of several rows of scores on the same images, as they stand and resampled.

    Attributes:
        points: by metric, of each row.
        values: by metric, of each row in each resample.
        n: anomalies.
        n_id: ID images.
    """

    points: dict[str, Float[np.ndarray, " m"]]
    values: dict[str, Float[np.ndarray, "m w"]]
    n: int
    n_id: int

    def rows(self, which: Sequence[int]) -> Resampled:
        """Some of the rows, such as the seeds of a detector."""
        points, values = (
            {metric: each[list(which)] for metric, each in kind.items()} for kind in (self.points, self.values)
        )
        return Resampled(points, values, self.n, self.n_id)

    def estimate(self, metric: str) -> Estimate:
        """Mean over the rows, which are seeds, with its interval over images and seeds."""
        points, smaller = self.points[metric], min(self.n, self.n_id)
        variance = _variance(points, self.values[metric], smaller)
        # of both sides as many images as stand in their harmonic mean, which is a generous bound
        return fraction(float(points.mean()), variance, self.n, smaller, 4 / (1 / self.n + 1 / self.n_id))

    def minus(self, other: Resampled, metric: str) -> Difference:
        """This less another, paired by image and by seed; a side without seeds (one row) meets all of the other.

        Raises:
            ValueError: the numbers of seeds or of resamples do not fit.
        """
        mine, theirs = self.values[metric], other.values[metric]
        if mine.shape[1] != theirs.shape[1] or (len(mine) != len(theirs) and 1 not in (len(mine), len(theirs))):
            raise ValueError(
                f"a has {len(mine)} seeds in {mine.shape[1]} resamples and b {len(theirs)} in {theirs.shape[1]}; "
                "pair the same seeds and resamples"
            )
        points = self.points[metric] - other.points[metric]
        return difference(float(points.mean()), _variance(points, mine - theirs, min(self.n, self.n_id)), self.n)


def resample(
    id_scores: Float[np.ndarray, "m b"],
    anomaly_scores: Float[np.ndarray, "m a"],
    resamples: int = RESAMPLES,
    seed: int = 0,
    name: str = "",
    metrics: Sequence[str] = tuple(ANOMALY_METRICS),
) -> Resampled:
    """Anomaly metrics of each row of scores under the same resamples of the images, both sides drawn on their own.

    Of more than 16,384 images of a side as many are taken at random, of the other side the same share, and what the
    resamples deviate is scaled by the root of that share: all these metrics have a variance of c / images.

    Args:
        id_scores: larger means more anomalous; a row a detector, readout, seed, run.
        anomaly_scores: the same rows, of the anomalies.
        resamples: number of them, at least 2.
        name: of the anomaly set, so that each set is drawn on its own.
        metrics: names of them.
    Raises:
        ValueError: a side is empty, a score is NaN, the shapes do not fit, or `resamples` is below 2.
    """
    if resamples < 2:
        raise ValueError(f"bootstrap is {resamples}; an interval needs at least 2 resamples, 1,000 for a stable one")
    own, strange = np.asarray(id_scores), np.asarray(anomaly_scores)
    if own.ndim != 2 or strange.ndim != 2 or len(own) != len(strange):
        raise ValueError(
            f"id_scores {own.shape} and anomaly_scores {strange.shape} do not fit; expected as many rows of both, one "
            "column an image"
        )
    points = _stacked([Separation(*pair).measure(metrics) for pair in zip(own, strange, strict=True)])
    points, sizes, names = (
        {metric: each[:, 0] for metric, each in points.items()},
        (own.shape[1], strange.shape[1]),
        [zlib.crc32(name.encode())],
    )
    centres, share = points, min(1.0, MANY_IMAGES / max(sizes))
    if share < 1:
        rng = np.random.default_rng([seed, 3, *names])
        own, strange = (
            side[
                :, rng.choice(side.shape[1], max(round(share * side.shape[1]), min(side.shape[1], 256)), replace=False)
            ]
            for side in (own, strange)
        )
    rows = [Separation(*pair) for pair in zip(own, strange, strict=True)]
    if share < 1:
        centres = {metric: each[:, 0] for metric, each in _stacked([row.measure(metrics) for row in rows]).items()}
    at_once = max(1, CELLS_AT_ONCE // max(own.shape[1], strange.shape[1]))
    drawn = zip(
        draws(own.shape[1], resamples, [seed, 0], at_once),
        draws(strange.shape[1], resamples, [seed, 1, *names], at_once),
        strict=True,
    )
    blocks = [_stacked([row.measure(metrics, *counts) for row in rows]) for counts in drawn]
    values = {
        metric: points[metric][:, None]
        + math.sqrt(share) * (np.concatenate([block[metric] for block in blocks], axis=1) - centres[metric][:, None])
        for metric in metrics
    }
    return Resampled(points, values, sizes[1], sizes[0])


def mean_over_sets(sets: Mapping[str, Resampled]) -> Resampled:
    """The mean over several anomaly sets, each weighing the same; their anomalies were drawn independently."""
    parts = list(sets.values())
    points, values = (
        {metric: np.mean([getattr(part, kind)[metric] for part in parts], axis=0) for metric in parts[0].points}
        for kind in ("points", "values")
    )
    return Resampled(points, values, sum(part.n for part in parts), parts[0].n_id)


def _stacked(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {metric: np.stack([row[metric] for row in rows]) for metric in rows[0]}


def _variance(points: Float[np.ndarray, " s"], values: Float[np.ndarray, "s w"], n: int) -> Variance:
    """Over n images by the resamples, over the seeds by what they differ."""
    together, single = float(values.mean(0).var(ddof=1)), float(values.var(1, ddof=1).mean())
    return Variance.of_seeds(points, together, single, max(1, n - 1))
