"""Anomaly detectors on a readout's features and a probe's logits; a score is larger for anomalies.

| name | score | fitted on the training features |
|---|---|---|
| `msp` | 1 − largest softmax probability (Hendrycks and Gimpel 2017, arXiv:1610.02136) | – |
| `energy` | −log Σ exp(logits), temperature 1 (Liu et al. 2020, arXiv:2010.03759) | – |
| `max_logit` | −largest logit (Hendrycks et al. 2022, arXiv:1911.11132) | – |
| `knn` | distance to the k-th nearest training image, features of unit length (Sun et al. 2022, arXiv:2204.06507) | the features |
| `mahalanobis` | squared distance to the nearest class mean, one covariance (Lee et al. 2018, arXiv:1807.03888) | means, covariance |
| `relative_mahalanobis` | the same, less that to one Gaussian of all images (Ren et al. 2021, arXiv:2106.09022) | both Gaussians |
| `vim` | α · length outside of the principal space, + energy (Wang et al. 2022, arXiv:2203.10807) | space, α |
| `react` | energy of the logits of features clipped from above (Sun et al. 2021, arXiv:2111.12797) | the clip |

Features are those that the probe's weight multiplies. What the papers leave open, for features with more channels than
there are images as well as for others (docs/deviations.md):

- `knn`: k is one in a thousand training images, the papers' own ratio (50 of 50,000; 1,000 of 1.28 million), at least 10
  and at most all. A feature of zeros has no direction; it stays, and is 1 away from all others.
- The covariance within the classes is shrunk as Ledoit and Wolf (2004, doi:10.1016/S0047-259X(03)00096-4) say, or by a
  given share; 0 is the papers' own. A plain pseudo-inverse would ignore just those directions in which no training image
  varies; directions without any variance even so are left out. scikit-learn's `ledoit_wolf` takes all features at once;
  here they are read in blocks, and a test holds the two equal.
- `relative_mahalanobis`: the covariance of all images is that within the classes, shrunk, plus that of their means. Two
  that are shrunk each on its own weigh the directions of little variance so differently that what is far from
  everything comes out as familiar (measured: AUROC 0.1 on features with more channels than images).
- `vim`: the origin is −W⁺b, where singular values of W below 1e-4 of the largest count as 0 (a probe's rows sum to nearly
  nothing: that direction is rounding noise), and the space that of the D largest eigenvalues of the uncentred second
  moment. D is the paper's: 1,000 where d > 1,500, else 512; it has no rule for d < 768, where D is d / 2. Of features of a
  lower rank r than d the same share is taken, D r / d, as otherwise nothing of the training images would lie outside.
- `react`: the clip is the 90th percentile over all channels of all training images, the paper's. It was made for
  features behind a ReLU; those of a transformer are negative as well, and are clipped from above only.

All work in float64. No score saturates: `msp` is summed from the other classes' probabilities, so two confident images
stay apart where 1 − p would round to 0 for both.

Shape letters: b image, n training image, c class, d channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import logsumexp
from sklearn.covariance import shrunk_covariance

from regvit.features.stored_readouts import blocks
from regvit.probing.neighbours import nearest

CELLS_AT_ONCE = 1 << 21  # float64 held beside the features: 16 MiB
CLIP_PERCENTILE = 90  # of ReAct
CLIP_VALUES = 1 << 23  # activations that the percentile is taken of; beyond, of images drawn at random
RCOND = 1e-4  # of the probe's singular values, in ViM's origin

Scorer = Callable[[Float[np.ndarray, "b d"], Float[np.ndarray, "b c"]], Float[np.ndarray, " b"]]


class Linear(Protocol):
    """A linear classifier, as `Probe`."""

    weight: Float[np.ndarray, "c d"]
    bias: Float[np.ndarray, " c"]


@dataclass(frozen=True)
class Detectors:
    """Which detectors, and their settings.

    Attributes:
        names: of `DETECTORS`.
        shrinkage: of the covariance of `mahalanobis` and its relative, 0 to 1; None: Ledoit and Wolf's.
        device: where neighbours are looked for.
    Raises:
        ValueError: a name is unknown; the message gives the nearest one.
    """

    names: tuple[str, ...]
    shrinkage: float | None = None
    device: str | torch.device = field(default="cpu", compare=False)

    def __post_init__(self):
        for name in self.names:
            if name not in DETECTORS:
                near = get_close_matches(name, DETECTORS, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"detector {name!r} is unknown; {hint}Known are {', '.join(DETECTORS)}")


@dataclass(frozen=True)
class Training:
    """What a detector is fitted on: features in blocks, class indices, and the probe."""

    features: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    probe: Linear
    detectors: Detectors


def fit(
    name: str,
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    probe: Linear,
    detectors: Detectors | None = None,
) -> Scorer:
    """The detector of that name, fitted on the training images.

    Args:
        name: of `DETECTORS`.
        features: what the probe's weight multiplies (`Probe.embed` of the readout), of the training images: an array, or
            anything with its `shape` that gives rows for a slice or an array of row numbers; it is read in blocks, as
            often as the detector needs, and never held whole.
        labels: class index of each.
        probe: whose logits are scored.
        detectors: the settings; None: the defaults.
    Returns: features (b, d) and logits (b, c) of images → scores (b,) float64.
    Raises:
        ValueError: the detector is unknown, or the features, labels and probe do not fit it; the scorer raises it if
            features or logits are of another shape, or not finite.
    """
    detectors = detectors or Detectors((name,))
    if name in LOGIT_DETECTORS:
        return lambda _, logits: LOGIT_DETECTORS[name](logits)
    if name not in FITTED_DETECTORS:
        Detectors((name,))
    features, labels = _checked_features(features), np.asarray(labels)
    if not len(features):
        raise ValueError(f"{name} was given no training images; give some images of the ID set split = train")
    if labels.shape != (len(features),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are {labels.dtype} of shape {labels.shape}; expected one class index for each of the "
            f"{len(features)} training images"
        )
    if labels.min() < 0 or labels.max() >= len(probe.weight):
        raise ValueError(
            f"labels go from {labels.min()} to {labels.max()}; expected class indices 0 to {len(probe.weight) - 1}"
        )
    if probe.weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"the features have {features.shape[1]} channels and the probe takes {probe.weight.shape[1]}; give what "
            "its weight multiplies (Probe.embed)"
        )
    score, d = FITTED_DETECTORS[name](Training(features, labels, probe, detectors)), features.shape[1]

    def scorer(features: Float[np.ndarray, "b d"], logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
        features = _checked_features(features, d)
        if name == "knn":  # one pass over the training images for all
            return score(features, logits)
        scores = np.empty(len(features))
        for rows in _blocks(len(features), max(d, len(probe.weight))):
            scores[rows] = score(features[rows].astype(np.float64), logits[rows])
        return scores

    return scorer


# --- on logits alone ------------------------------------------------------------------------------------------------


def msp(logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
    """One minus the maximum softmax probability, in [0, 1 − 1/c].

    Raises:
        ValueError: the logits are not (b, c), not finite, or of one class, which would give every image the score 0.
    """
    logits = _checked_logits(logits)
    if logits.shape[1] < 2:
        raise ValueError("msp needs at least 2 classes: with one, every image scores 0; use energy or max_logit")
    exponentials = np.exp(logits - logits.max(1, keepdims=True))  # the largest is exactly 1
    others = np.sort(exponentials, axis=1)[:, :-1].sum(1)
    return others / (1 + others)


def energy(logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
    """Negative log-sum-exp of the logits, in nats.

    Raises:
        ValueError: the logits are not (b, c) with at least one class, or not finite.
    """
    return -logsumexp(_checked_logits(logits), axis=1)


def max_logit(logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
    """Negative largest logit.

    Raises:
        ValueError: the logits are not (b, c) with at least one class, or not finite.
    """
    return -_checked_logits(logits).max(1)


# --- on features ----------------------------------------------------------------------------------------------------


def fit_knn(train: Training) -> Scorer:
    """Distance to the k-th nearest of the training features, all of unit length; in [0, 2]."""
    n = len(train.features)
    k, device = min(n, max(10, round(n / 1000))), train.detectors.device

    def score(features: Float[np.ndarray, "b d"], _: np.ndarray) -> Float[np.ndarray, " b"]:
        scores = np.empty(len(features))
        for rows, _, neighbours in nearest(train.features, features, k, device):
            kth = neighbours[:, -1].cpu().numpy()
            scores[rows] = np.linalg.norm(_unit(features[rows]) - _unit(train.features[kth]), axis=1)
        return scores

    return score


@dataclass(frozen=True)
class Scatter:
    """How the training features lie about the means of their classes.

    Attributes:
        means: of the classes that have training images.
        shares: of the images, of those classes.
        covariance: within the classes, shrunk.
        shrinkage: ρ: (1 − ρ) S + ρ tr(S) / d · 1.
    """

    means: Float[np.ndarray, "c d"]
    shares: Float[np.ndarray, " c"]
    covariance: Float[np.ndarray, "d d"]
    shrinkage: float

    @classmethod
    def fit(
        cls, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], shrinkage: float | None = None
    ) -> Scatter:
        """Class means, and the covariance of what remains around them.

        Raises:
            ValueError: every feature equals its class mean.
        """
        n, d = features.shape
        classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
        means = np.zeros((len(classes), d))
        for rows in _blocks(n, d):
            np.add.at(means, place[rows], features[rows].astype(np.float64))
        means /= counts[:, None]
        covariance, fourth = np.zeros((d, d)), 0.0
        for rows in _blocks(n, d):
            deviations = features[rows] - means[place[rows]]
            covariance += deviations.T @ deviations / n
            fourth += float(((deviations**2).sum(1) ** 2).sum()) / n
        level, square = float(np.trace(covariance)) / d, float((covariance**2).sum())
        if not level > 0:
            raise ValueError(
                f"the features of all {n} training images equal the mean of their class, so there is no covariance; "
                "look at how they were extracted, or leave out mahalanobis and relative_mahalanobis"
            )
        if shrinkage is None:
            apart = square - d * level**2  # distance² of the covariance from a multiple of the identity
            shrinkage = min(1.0, (fourth - square) / n / apart) if apart > 0 else 0.0
        return cls(means, counts / n, shrunk_covariance(covariance, shrinkage), shrinkage)

    def within(self) -> Gaussian:
        """One normal distribution a class."""
        return Gaussian.of(self.means, self.covariance)

    def whole(self) -> Gaussian:
        """One for all images: the covariance within the classes, and that of their means."""
        mean = self.shares @ self.means
        apart = self.means - mean
        return Gaussian.of(mean[None], self.covariance + (apart.T * self.shares) @ apart)


@dataclass(frozen=True)
class Gaussian:
    """Normal distributions of one covariance. `whitening` takes a feature less its mean to the identity as covariance."""

    means: Float[np.ndarray, "c d"]
    whitening: Float[np.ndarray, "d r"]

    @classmethod
    def of(cls, means: Float[np.ndarray, "c d"], covariance: Float[np.ndarray, "d d"]) -> Gaussian:
        """Directions without variance are left out."""
        values, vectors = np.linalg.eigh(covariance)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return cls(means, vectors[:, kept] / np.sqrt(values[kept]))

    def distances(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, " b"]:
        """Squared Mahalanobis distance to the nearest mean."""
        centre = self.means.mean(0)
        means, x = (self.means - centre) @ self.whitening, (features - centre) @ self.whitening  # (c, r), (b, r)
        squares = (x**2).sum(1)[:, None] - 2 * x @ means.T + (means**2).sum(1)
        return squares.min(1).clip(0)


def fit_mahalanobis(train: Training) -> Scorer:
    """Squared distance to the nearest class; one class is allowed."""
    classes = Scatter.fit(train.features, train.labels, train.detectors.shrinkage).within()
    return lambda features, _: classes.distances(features)


def fit_relative(train: Training) -> Scorer:
    """Squared distance to the nearest class, less that to all images together.

    Raises:
        ValueError: all images are of one class, which would be its own background.
    """
    if (train.labels == train.labels[0]).all():
        raise ValueError(
            f"all {len(train.labels)} training images are of class {train.labels[0]}, so relative_mahalanobis would give "
            "every image 0; use mahalanobis"
        )
    scatter = Scatter.fit(train.features, train.labels, train.detectors.shrinkage)
    classes, background = scatter.within(), scatter.whole()
    return lambda features, _: classes.distances(features) - background.distances(features)


def fit_vim(train: Training) -> Scorer:
    """Virtual-logit matching: α ‖residual‖ against the real logits' log-sum-exp.

    Raises:
        ValueError: the features have a rank below 2, or the mean largest logit is not positive.
    """
    features, (n, d) = train.features, train.features.shape
    weight, bias = (np.asarray(values, dtype=np.float64) for values in (train.probe.weight, train.probe.bias))
    origin = vim_origin(weight, bias)
    moment, largest = np.zeros((d, d)), 0.0
    for rows in _blocks(n, max(d, len(weight))):
        shifted = features[rows] - origin
        moment += shifted.T @ shifted / n
        largest += float((features[rows] @ weight.T + bias).max(1).sum()) / n
    values, vectors = np.linalg.eigh(moment)  # ascending
    rank = int((values > values[-1] * d * np.finfo(np.float64).eps).sum())
    if rank < 2:
        raise ValueError(
            f"the features of the {n} training images have rank {rank} about the probe's origin, so vim has no space to "
            "leave; look at how they were extracted"
        )
    if not largest > 0:
        raise ValueError(
            f"the largest logits of the training images are {largest:.4g} in the mean; vim scales by it, and needs it "
            "above 0: look at the probe"
        )
    residual = np.ascontiguousarray(vectors[:, : d - principal_channels(d, rank)])

    def length(some: Float[np.ndarray, "b d"]) -> Float[np.ndarray, " b"]:
        return np.linalg.norm((some - origin) @ residual, axis=1)

    scale = largest / (sum(float(length(features[rows]).sum()) for rows in _blocks(n, d)) / n)
    return lambda features, logits: scale * length(features) + energy(logits)


def vim_origin(weight: Float[np.ndarray, "c d"], bias: Float[np.ndarray, " c"]) -> Float[np.ndarray, " d"]:
    """−W⁺b, where all logits of the probe are nearest to 0."""
    return -np.linalg.pinv(weight, rcond=RCOND) @ bias


def principal_channels(d: int, rank: int) -> int:
    """Dimension of ViM's principal space, of features with d channels and that rank about the origin."""
    dimension = 1000 if d > 1500 else 512 if d >= 768 else d // 2
    return min(rank - 1, max(1, round(dimension * rank / d)))


def fit_react(train: Training) -> Scorer:
    """Energy of the logits of features clipped from above at a percentile of the training activations."""
    features, (n, d) = train.features, train.features.shape
    some = slice(None)
    if n * d > CLIP_VALUES:
        some = np.sort(np.random.default_rng(0).choice(n, CLIP_VALUES // d, replace=False))
    clip = float(np.percentile(features[some].astype(np.float64), CLIP_PERCENTILE))
    weight, bias = (np.asarray(values, dtype=np.float64) for values in (train.probe.weight, train.probe.bias))
    return lambda features, _: energy(np.minimum(features, clip) @ weight.T + bias)


LOGIT_DETECTORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "msp": msp,
    "energy": energy,
    "max_logit": max_logit,
}
FITTED_DETECTORS: dict[str, Callable[[Training], Scorer]] = {
    "knn": fit_knn,
    "mahalanobis": fit_mahalanobis,
    "relative_mahalanobis": fit_relative,
    "vim": fit_vim,
    "react": fit_react,
}
DETECTORS = (*LOGIT_DETECTORS, *FITTED_DETECTORS)
FEATURES_ONLY = ("knn", "mahalanobis", "relative_mahalanobis")  # the probe's logits play no part


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Rows cut so that a block of them is a bounded number of values."""
    return blocks(n, max(1, CELLS_AT_ONCE // max(1, width)))


def _unit(features: np.ndarray) -> Float[np.ndarray, "b d"]:
    features = features.astype(np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(lengths > 0, lengths, 1.0)


def _checked_features(features: np.ndarray, channels: int | None = None) -> Float[np.ndarray, "b d"]:
    if features.ndim != 2 or not features.shape[1] or features.shape[1] != (channels or features.shape[1]):
        wanted = "at least one channel" if channels is None else f"the {channels} channels that it was fitted on"
        raise ValueError(f"features have shape {features.shape}; expected (images, channels) with {wanted}")
    n, d = features.shape
    if bad := sum(int((~np.isfinite(features[rows])).any(1).sum()) for rows in _blocks(n, d)):
        raise ValueError(f"{bad} of {n} images have infinite or NaN features; extract them again")
    return features


def _checked_logits(logits: np.ndarray) -> Float[np.ndarray, "b c"]:
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits have shape {logits.shape}; expected (images, classes) with at least one class")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(1).sum())
        raise ValueError(f"{bad} of {len(logits)} images have infinite or NaN logits; look at their features")
    return logits
