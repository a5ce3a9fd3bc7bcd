"""The bootstrap of anomaly metrics where there are many images: cells of scores, groups of images, two matrix products.

A plain bootstrap visits every image in every resample: 10⁹ of them for a million scores and a thousand resamples. Here,
for each side (ID images, anomalies) of n images,

- the images are dealt at random into K = 2,048 groups (n, if that is fewer), and a resample draws K of the groups with
  replacement, c_k times group k;
- the scores fall into some hundreds of cells g, whose borders are scores: even steps of both sides' quantiles, finer where
  thresholds and the first hits of average precision lie. With h(g, k) images of group k in cell g, n(s, k) of class s in
  group k and p(g | s) the share of class s in cell g, a resample's count of cell g is

      N_g(w) = Σ_k h(g, k) + Σ_k (c_k − 1) (h(g, k) − Σ_s n(s, k) p(g | s)).

The inner sum takes out what the classes differ in, so that ID images are drawn class by class, as in the plain bootstrap
(without classes s is all images). As the groups are random, N(w) has the mean and the covariance of the plain bootstrap.

From the counts: AUROC with the share θ_g of pairs within a cell that are in order, as it is for the images at hand;
thresholds by linear interpolation within the cell that holds them; precision in the middle of a cell. A cell of one
distinct score is not divided. What this gives for the images at hand is replaced by the exact metric, so only the spread
around it is approximate: its standard deviation is random by 1 / √(2 K), 1.6 %, less than the 2.2 % of 1,000 resamples by themselves.

Shape letters: b image, s class, k group, g cell, w resample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from regvit.stats.metrics import Separation

GROUPS = 2048
STEPS = 256  # of the quantiles, evenly
FINE = np.linspace(-0.02, 0.02, 65)  # quantiles around a threshold: 13 standard errors of one at 10,000 images
ENDS = 2.0 ** -np.arange(1, 12) / STEPS  # quantiles beyond the outermost even steps
QUANTILES = np.unique(np.concatenate([np.arange(1, STEPS) / STEPS, ENDS, 1 - ENDS, 0.95 + FINE, 0.05 + FINE]))


class Side:
    """Groups of the images of one side, and how often each resample draws them.

    Args:
        strata: rows of each class, or all of them as one.
        resamples: number of them.
        entropy: of the draws.
    """

    def __init__(self, strata: Sequence[Int[np.ndarray, " n"]], resamples: int, entropy: Sequence[int]):
        n, rng = sum(map(len, strata)), np.random.default_rng([*entropy, 0])
        groups = min(GROUPS, n)
        self._group = np.empty(n, dtype=np.int64)
        self._group[rng.permutation(n)] = np.arange(n) % groups
        self._class, self._classes = np.empty(n, dtype=np.int64), len(strata)
        for s, rows in enumerate(strata):
            self._class[rows] = s
        drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples)
        self._beyond_once = (drawn - 1.0).T  # (k, w)
        of_classes = _table(self._class, self._group, self._classes, groups)  # (s, k)
        self._class_counts = of_classes.sum(1)
        self._expected = of_classes @ self._beyond_once  # (s, w)

    def counts(self, cells: Int[np.ndarray, " b"], n_cells: int) -> Float[np.ndarray, "w g"]:
        """Images in each cell, in each resample; first of all (row 0) as they stand."""
        groups = len(self._beyond_once)
        own = _table(cells, self._group, n_cells, groups)  # (g, k)
        shares = _table(cells, self._class, n_cells, self._classes) / self._class_counts  # (g, s)
        drawn = own @ self._beyond_once - shares @ self._expected  # (g, w)
        once = own.sum(1, keepdims=True)
        return np.concatenate([once, (once + drawn).clip(0)], axis=1).T


def measure(
    scores: Separation, home: Side, strange: Side, metrics: Sequence[str]
) -> tuple[dict[str, float], dict[str, Float[np.ndarray, " w"]]]:
    """Metrics of one row of scores: exact as they stand, and in each resample."""
    points = {metric: float(values[0]) for metric, values in scores.measure(metrics).items()}
    cells = _Cells.of(scores.id_scores, scores.anomaly_scores)
    counts = _Counts(home.counts(cells.id, len(cells.whole)), strange.counts(cells.anomalies, len(cells.whole)), cells)
    values = {}
    for metric in metrics:
        found = getattr(counts, metric)()
        values[metric] = (points[metric] + found[1:] - found[0]).clip(0, 1)
    return points, values


@dataclass(frozen=True)
class _Cells:
    """Cells in ascending order of score.

    Attributes:
        id, anomalies: cell of each image.
        whole: cells of one distinct score.
        ordered: share θ of the pairs within the cell whose anomaly scores higher, equals half.
    """

    id: Int[np.ndarray, " b"]
    anomalies: Int[np.ndarray, " a"]
    whole: Bool[np.ndarray, " g"]
    ordered: Float[np.ndarray, " g"]

    @classmethod
    def of(cls, id_scores: Float[np.ndarray, " b"], anomaly_scores: Float[np.ndarray, " a"]) -> _Cells:
        """Cells between quantiles of both sides; a border belongs to the cell below it."""
        sides = [np.sort(scores) for scores in (id_scores, anomaly_scores)]
        borders = [side[np.ceil(QUANTILES * len(side)).astype(np.int64).clip(1) - 1] for side in sides]
        edges = np.unique(np.concatenate([*borders, [max(side[-1] for side in sides)]]))
        up_to = [np.concatenate([[0], np.searchsorted(side, edges, "right")]) for side in sides]  # of each side, a cell
        lowest = np.minimum(*(np.append(side, np.inf)[to[:-1]] for side, to in zip(sides, up_to, strict=True)))
        own, strange = sides
        below = np.searchsorted(own, strange, "left") + np.searchsorted(own, strange, "right")  # twice, ties half
        cumulated = np.concatenate([[0], np.cumsum(below)])
        pairs = cumulated[up_to[1][1:]] - cumulated[up_to[1][:-1]]
        here = [np.diff(to) for to in up_to]
        within = pairs - 2 * here[1] * up_to[0][:-1]
        ordered = np.where(here[0] * here[1] > 0, within / np.maximum(2 * here[0] * here[1], 1), 0.5)
        place = [np.searchsorted(edges, scores, "left") for scores in (id_scores, anomaly_scores)]
        return cls(*place, lowest == edges, ordered)


class _Counts:
    """Metrics by name from the counts of both sides, (w, g) each."""

    def __init__(self, home: Float[np.ndarray, "w g"], strange: Float[np.ndarray, "w g"], cells: _Cells):
        self.home, self.strange, self.cells = home, strange, cells

    def auroc(self) -> Float[np.ndarray, " w"]:
        below = _before(self.home) + self.cells.ordered * self.home
        return (self.strange * below).sum(1) / (self.home.sum(1) * self.strange.sum(1))

    def fpr95(self) -> Float[np.ndarray, " w"]:
        return _accepted(self.home, self.strange, self.cells.whole)

    def fpr95_ood_positive(self) -> Float[np.ndarray, " w"]:
        return _accepted(self.strange[:, ::-1], self.home[:, ::-1], self.cells.whole[::-1])

    def aupr_in(self) -> Float[np.ndarray, " w"]:
        return _precision(self.home, self.strange, self.cells.whole)

    def aupr_out(self) -> Float[np.ndarray, " w"]:
        return _precision(self.strange[:, ::-1], self.home[:, ::-1], self.cells.whole[::-1])


def _before(counts: Float[np.ndarray, "w g"]) -> Float[np.ndarray, "w g"]:
    """How many stand in the cells before."""
    return np.cumsum(counts, axis=1) - counts


def _accepted(
    positives: Float[np.ndarray, "w g"], negatives: Float[np.ndarray, "w g"], whole: Bool[np.ndarray, " g"]
) -> Float[np.ndarray, " w"]:
    """Share of the negatives that are accepted, from the first cell on, where 95 % of the positives are."""
    upto = np.cumsum(positives, axis=1)
    needed = np.ceil(np.round(0.95 * upto[:, -1:], 6))  # 0.95 has no exact binary form
    cell = (upto >= np.minimum(needed, upto[:, -1:])).argmax(1)[:, None]
    here, before = (np.take_along_axis(each, cell, 1) for each in (positives, _before(positives)))
    part = np.where(whole[cell], 1.0, ((needed - before) / np.maximum(here, 1e-9)).clip(0, 1))
    accepted = np.take_along_axis(_before(negatives), cell, 1) + part * np.take_along_axis(negatives, cell, 1)
    return accepted[:, 0] / negatives.sum(1)


def _precision(
    positives: Float[np.ndarray, "w g"], negatives: Float[np.ndarray, "w g"], whole: Bool[np.ndarray, " g"]
) -> Float[np.ndarray, " w"]:
    """Average precision of the positives, found from the first cell on."""
    part = np.where(whole, 1.0, 0.5)
    true, false = (_before(each) + part * each for each in (positives, negatives))
    return (positives * true / np.maximum(true + false, 1e-9)).sum(1) / positives.sum(1)


def _table(rows: Int[np.ndarray, " b"], columns: Int[np.ndarray, " b"], n_rows: int, n_columns: int) -> np.ndarray:
    """How often each pair occurs, float64 (n_rows, n_columns)."""
    counts = np.bincount(rows * n_columns + columns, minlength=n_rows * n_columns)
    return counts.reshape(n_rows, n_columns).astype(np.float64)
