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
there are images as well as for others:

- `knn`: k is one in a thousand training images, the papers' own ratio (50 of 50,000; 1,000 of 1.28 million), at least 10
  and at most all. A feature of zeros has no direction; it stays, and is 1 away from all others.
- The covariance within the classes is shrunk as Ledoit and Wolf (2004, doi:10.1016/S0047-259X(03)00096-4) say,
  (1 − ρ) S + ρ tr(S) / d · 1 with their ρ: it falls as 1 / images, so that with many this is the papers' S, and with few
  it can be inverted. A plain pseudo-inverse would ignore just those directions in which no training image varies.
  Directions without any variance even so (ρ = 0) are left out.
- `relative_mahalanobis`: the covariance of all images is that within the classes, shrunk, plus that of their means. Two
  that are shrunk each on its own weigh the directions of little variance so differently that what is far from
  everything comes out as familiar (measured: AUROC 0.1 on features with more channels than images).
- `vim`: the origin is −W⁺b and the space that of the D largest eigenvalues of the uncentred second moment. D is the
  paper's: 1,000 where d > 1,500, else 512; it has no rule for d < 768, where D is d / 2. Of features of a lower rank r
  than d the same share is taken, D r / d, as otherwise nothing of the training images would lie outside.
- `react`: the clip is the 90th percentile over all channels of all training images, the paper's. It was made for
  features behind a ReLU; those of a transformer are negative as well, and are clipped from above only.

All work in float64. No score saturates: `msp` is summed from the other classes' probabilities, so two confident images
stay apart where 1 − p would round to 0 for both. (pytorch-ood 0.2 was not used: its metrics, which are torchmetrics', take
the sigmoid of scores outside of [0, 1], which rounds to 1 for large ones and so makes ties of them; and its kNN looks at
the nearest neighbour only and returns (b, 1), which they refuse.)

Shape letters: b image, n training image, c class, d channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

CELLS_AT_ONCE = 1 << 21  # float64 held beside the features: 16 MiB
CLIP_PERCENTILE = 90  # of ReAct
CLIP_VALUES = 1 << 23  # activations that the percentile is taken of; beyond, of images drawn at random

Scorer = Callable[[Float[np.ndarray, "b d"], Float[np.ndarray, "b c"]], Float[np.ndarray, " b"]]


class Linear(Protocol):
    """A linear classifier, as `Probe`."""

    weight: Float[np.ndarray, "c d"]
    bias: Float[np.ndarray, " c"]


def fit(name: str, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], probe: Linear) -> Scorer:
    """The detector of that name, fitted on the training images.

    Args:
        name: of `DETECTORS`.
        features: what the probe's weight multiplies (`Probe.embed` of the readout), of the training images: an array, or
            anything with its `shape` that gives rows for a slice or an array of row numbers; it is read in blocks, as
            often as the detector needs, and never held whole.
        labels: class index of each.
        probe: whose logits are scored.
    Returns: features (b, d) and logits (b, c) of images → scores (b,) float64.
    Raises:
        ValueError: the detector is unknown, or the features, labels and probe do not fit it; the scorer raises it if
            features or logits are of another shape, or not finite.
    """
    check_known(name)
    if name in LOGIT_DETECTORS:
        return _LogitScorer(LOGIT_DETECTORS[name])
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
    return FITTED_DETECTORS[name](features, labels, probe)


def check_known(name: str) -> None:
    """Raises ValueError if there is no detector of that name; the message gives the nearest one."""
    if name not in DETECTORS:
        near = get_close_matches(name, DETECTORS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"detector {name!r} is unknown; {hint}Known are {', '.join(DETECTORS)}")


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
    logits = _checked_logits(logits)
    largest = logits.max(1)
    return -(largest + np.log(np.exp(logits - largest[:, None]).sum(1)))


def max_logit(logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
    """Negative largest logit.

    Raises:
        ValueError: the logits are not (b, c) with at least one class, or not finite.
    """
    return -_checked_logits(logits).max(1)


@dataclass(frozen=True)
class _LogitScorer:
    score: Callable[[np.ndarray], np.ndarray]

    def __call__(self, features: np.ndarray, logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
        return self.score(logits)


# --- on features ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knn:
    """Distance to the k-th nearest of the training features, all of unit length; in [0, 2].

    Attributes:
        train: the training features as they were given.
        k: which neighbour, counted from 1.
    """

    train: Float[np.ndarray, "n d"]
    k: int

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray, probe: Linear) -> Knn:
        """Nothing to fit but k."""
        return cls(features, min(len(features), max(10, round(len(features) / 1000))))

    def __call__(self, features: Float[np.ndarray, "b d"], logits: np.ndarray) -> Float[np.ndarray, " b"]:
        features = _checked_features(features, self.train.shape[1])
        scores = np.empty(len(features))
        for rows in _blocks(len(features), self.train.shape[1]):
            directions = _unit(features[rows])
            nearest = np.full((len(directions), self.k), np.inf)  # squared distances, in no order
            for some in _blocks(len(self.train), max(len(directions), self.train.shape[1])):
                train = _unit(self.train[some])
                squares = (directions**2).sum(1)[:, None] - 2 * directions @ train.T + (train**2).sum(1)
                nearest = np.partition(np.hstack([nearest, squares]), self.k - 1, axis=1)[:, : self.k]
            scores[rows] = np.sqrt(nearest.max(1).clip(0))
        return scores


@dataclass(frozen=True)
class Scatter:
    """How the training features lie about the means of their classes.

    Attributes:
        means: of the classes that have training images.
        shares: of the images, of those classes.
        covariance: within the classes, shrunk.
        shrinkage: ρ of Ledoit and Wolf.
    """

    means: Float[np.ndarray, "c d"]
    shares: Float[np.ndarray, " c"]
    covariance: Float[np.ndarray, "d d"]
    shrinkage: float

    @classmethod
    def fit(cls, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> Scatter:
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
        level = float(np.trace(covariance)) / d
        if not level > 0:
            raise ValueError(
                f"the features of all {n} training images equal the mean of their class, so there is no covariance; "
                "look at how they were extracted, or leave out mahalanobis and relative_mahalanobis"
            )
        square = float((covariance**2).sum())
        apart = square - d * level**2  # distance² of the covariance from a multiple of the identity
        shrinkage = min(1.0, (fourth - square) / n / apart) if apart > 0 else 0.0
        covariance *= 1 - shrinkage
        covariance.flat[:: d + 1] += shrinkage * level
        return cls(means, counts / n, covariance, shrinkage)

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
        means = (self.means - centre) @ self.whitening  # (c, r)
        nearest = np.empty(len(features))
        for rows in _blocks(len(features), max(self.means.shape)):
            x = (features[rows] - centre) @ self.whitening  # (b, r)
            squares = (x**2).sum(1)[:, None] - 2 * x @ means.T + (means**2).sum(1)
            nearest[rows] = squares.min(1).clip(0)
        return nearest


@dataclass(frozen=True)
class Mahalanobis:
    """Squared distance to the nearest class, less that to all images together where there is a `background`."""

    classes: Gaussian
    background: Gaussian | None

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray, probe: Linear) -> Mahalanobis:
        """Of Lee et al.; one class is allowed."""
        return cls(Scatter.fit(features, labels).within(), None)

    @classmethod
    def fit_relative(cls, features: np.ndarray, labels: np.ndarray, probe: Linear) -> Mahalanobis:
        """Of Ren et al.

        Raises:
            ValueError: all images are of one class, which would be its own background.
        """
        if (labels == labels[0]).all():
            raise ValueError(
                f"all {len(labels)} training images are of class {labels[0]}, so relative_mahalanobis would give every "
                "image 0; use mahalanobis"
            )
        scatter = Scatter.fit(features, labels)
        return cls(scatter.within(), scatter.whole())

    def __call__(self, features: Float[np.ndarray, "b d"], logits: np.ndarray) -> Float[np.ndarray, " b"]:
        features = _checked_features(features, self.classes.means.shape[1])
        distances = self.classes.distances(features)
        return distances if self.background is None else distances - self.background.distances(features)


@dataclass(frozen=True)
class Vim:
    """Virtual-logit matching: the virtual logit α ‖residual‖ against the real ones' log-sum-exp.

    Attributes:
        origin: −W⁺b, where all logits of the probe are nearest to 0.
        residual: basis of what is orthogonal to the principal space.
        scale: α, mean largest logit over mean residual length of the training images.
    """

    origin: Float[np.ndarray, " d"]
    residual: Float[np.ndarray, "d q"]
    scale: float

    @classmethod
    def fit(cls, features: Float[np.ndarray, "n d"], labels: np.ndarray, probe: Linear) -> Vim:
        """Principal space and scale.

        Raises:
            ValueError: the features have a rank below 2, or the mean largest logit is not positive.
        """
        n, d = features.shape
        weight, bias = np.asarray(probe.weight, dtype=np.float64), np.asarray(probe.bias, dtype=np.float64)
        origin = -np.linalg.pinv(weight) @ bias
        moment, largest = np.zeros((d, d)), 0.0
        for rows in _blocks(n, max(d, len(weight))):
            shifted = features[rows] - origin
            moment += shifted.T @ shifted / n
            largest += float((features[rows] @ weight.T + bias).max(1).sum()) / n
        values, vectors = np.linalg.eigh(moment)  # ascending
        rank = int((values > values[-1] * d * np.finfo(np.float64).eps).sum())
        if rank < 2:
            raise ValueError(
                f"the features of the {n} training images have rank {rank} about the probe's origin, so vim has no "
                "space to leave; look at how they were extracted"
            )
        if not largest > 0:
            raise ValueError(
                f"the largest logits of the training images are {largest:.4g} in the mean; vim scales by it, and needs "
                "it above 0: look at the probe"
            )
        residual = np.ascontiguousarray(vectors[:, : d - principal_channels(d, rank)])
        length = sum(
            float(np.linalg.norm((features[rows] - origin) @ residual, axis=1).sum()) / n for rows in _blocks(n, d)
        )
        return cls(origin, residual, largest / length)

    def __call__(self, features: Float[np.ndarray, "b d"], logits: Float[np.ndarray, "b c"]) -> np.ndarray:
        features = _checked_features(features, len(self.origin))
        length = np.empty(len(features))
        for rows in _blocks(len(features), len(self.origin)):
            length[rows] = np.linalg.norm((features[rows] - self.origin) @ self.residual, axis=1)
        return self.scale * length + energy(logits)


def principal_channels(d: int, rank: int) -> int:
    """Dimension of ViM's principal space, of features with d channels and that rank about the origin."""
    dimension = 1000 if d > 1500 else 512 if d >= 768 else d // 2
    return min(rank - 1, max(1, round(dimension * rank / d)))


@dataclass(frozen=True)
class React:
    """Energy of the logits of features clipped from above at `clip`."""

    clip: float
    weight: Float[np.ndarray, "c d"]
    bias: Float[np.ndarray, " c"]

    @classmethod
    def fit(cls, features: Float[np.ndarray, "n d"], labels: np.ndarray, probe: Linear) -> React:
        """The percentile of the training activations."""
        n, d = features.shape
        if n * d > CLIP_VALUES:
            some = features[np.sort(np.random.default_rng(0).choice(n, CLIP_VALUES // d, replace=False))]
        else:
            some = features[:]
        clip = np.percentile(some.astype(np.float64), CLIP_PERCENTILE)
        return cls(float(clip), np.asarray(probe.weight, np.float64), np.asarray(probe.bias, np.float64))

    def __call__(self, features: Float[np.ndarray, "b d"], logits: np.ndarray) -> Float[np.ndarray, " b"]:
        features = _checked_features(features, self.weight.shape[1])
        scores = np.empty(len(features))
        for rows in _blocks(len(features), max(self.weight.shape)):
            clipped = np.minimum(features[rows].astype(np.float64), self.clip)
            scores[rows] = energy(clipped @ self.weight.T + self.bias)
        return scores


LOGIT_DETECTORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "msp": msp,
    "energy": energy,
    "max_logit": max_logit,
}
FITTED_DETECTORS: dict[str, Callable[[np.ndarray, np.ndarray, Linear], Scorer]] = {
    "knn": Knn.fit,
    "mahalanobis": Mahalanobis.fit,
    "relative_mahalanobis": Mahalanobis.fit_relative,
    "vim": Vim.fit,
    "react": React.fit,
}
DETECTORS = (*LOGIT_DETECTORS, *FITTED_DETECTORS)
FEATURES_ONLY = ("knn", "mahalanobis", "relative_mahalanobis")  # the probe's logits play no part


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Rows cut so that a block of them is a bounded number of values."""
    rows = max(1, CELLS_AT_ONCE // max(1, width))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


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
