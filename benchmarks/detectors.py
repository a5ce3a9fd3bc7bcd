"""AUROC, its bootstrap and the detectors against the clock: `python -m benchmarks.detectors`.

- AUROC of a million scores, ours and scikit-learn's `roc_auc_score`, in turn in one process, so that a loaded machine
  slows both alike; CPU seconds, and the ratio as median over the rounds. Both must give the same value.
- A 1,000-fold bootstrap of all five anomaly metrics of 10⁵ and of 10⁶ scores, against `roc_auc_score` alone on each
  resample, of which 3 are timed.
- Every detector: fit and score of features of the shape of a ViT-B data set.

Prints a line a measurement; `--out` writes JSON.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from benchmarks.machine import ROUNDS, in_turn, in_words, save, seconds_of
from regvit.measures.detectors import DETECTORS, fit
from regvit.probing.probes import Probe
from regvit.stats.anomaly_metrics import ANOMALY_METRICS, anomaly_metric
from regvit.stats.bootstrap import resample

WANTED = 1.0  # at least as fast as scikit-learn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--images", type=int, default=20_000, help="training images of the detectors")
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--out", type=Path, help="JSON; default: none")
    given = parser.parse_args()
    found = {
        "auroc": time_auroc(given.scores, given.rounds),
        "bootstrap": [
            time_bootstrap(given.scores // 10, tuple(ANOMALY_METRICS), 1000),
            time_bootstrap(given.scores, tuple(ANOMALY_METRICS), 1000),
        ],
        "detectors": time_detectors(given.images, given.channels, given.classes),
    }
    save(given.out, found)


def measure(quick: bool = False) -> list[dict]:
    """Rows of the table of all benchmarks: AUROC, its bootstrap, and kNN and Mahalanobis against scikit-learn's."""
    count = 10_000 if quick else 1_000_000
    home, strange = scores(count, None)
    anomalous, both = np.repeat([0, 1], [len(home), len(strange)]), np.concatenate([home, strange])
    rows = []

    def add(
        name: str,
        ours: Callable[[], object],
        theirs: Callable[[], object],
        detail: str,
        share: float = 1,
        rounds: int = 30,
    ) -> None:
        """`share`: of the work that theirs does, where all of it would take hours. Work of a moment takes many rounds."""
        rows.append(in_turn(ours, theirs, 1 if quick else rounds).row(name, WANTED, detail, 1 / share))

    add(
        "AUROC / scikit-learn's",
        lambda: anomaly_metric("auroc", home, strange),
        lambda: roc_auc_score(anomalous, both),
        f"{count:,} scores",
    )
    rng = np.random.default_rng(0)
    add(
        "bootstrap of five metrics / scikit-learn's AUROC alone",
        lambda: resample(home[None], strange[None], 1000),
        lambda: roc_auc_score(anomalous, np.concatenate([rng.choice(side, len(side)) for side in (home, strange)])),
        f"{count:,} scores, 1,000 resamples (scikit-learn: 1 of them, times 1,000)",
        1 / 1000,
        ROUNDS,
    )
    images, channels = (500, 16) if quick else (10_000, 384)
    train, test, labels, probe = material(images, channels, 10)
    k = max(10, round(images / 1000))

    def sklearn_knn() -> np.ndarray:
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.astype(float), test.astype(float))]
        return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(unit[0]).kneighbors(unit[1])[0][:, -1]

    def sklearn_mahalanobis() -> np.ndarray:
        means = np.stack([train[labels == c].mean(0, dtype=float) for c in range(10)])
        fitted = LedoitWolf(assume_centered=True).fit(train - means[labels])
        return np.min([fitted.mahalanobis(test - mean) for mean in means], axis=0)

    logits = probe.logits(test)
    for name, theirs in (("knn", sklearn_knn), ("mahalanobis", sklearn_mahalanobis)):
        np.testing.assert_allclose(fit(name, train, labels, probe)(test, logits), theirs(), rtol=1e-3)
        add(
            f"{name} / scikit-learn's",
            lambda name=name: fit(name, train, labels, probe)(test, logits),
            theirs,
            f"{images:,} × {channels}, {len(test):,} scored",
        )
    return rows


def time_auroc(count: int, rounds: int) -> dict:
    """AUROC of `count` scores, half of them anomalies, without ties and with."""
    results = {}
    for name, digits in (("without ties", None), ("with ties", 2)):
        home, strange = scores(count, digits)
        anomalous, both = np.repeat([0, 1], [len(home), len(strange)]), np.concatenate([home, strange])
        times = in_turn(
            lambda h=home, s=strange: anomaly_metric("auroc", h, s),
            lambda y=anomalous, x=both: roc_auc_score(y, x),
            rounds,
        )
        error = abs(anomaly_metric("auroc", home, strange) - roc_auc_score(anomalous, both))
        assert error < 1e-12, f"AUROC differs from scikit-learn's by {error:.2g}"
        row = times.row(f"AUROC of {count:,} scores {name} / scikit-learn's", WANTED, "")
        results[name] = row | {"seconds": min(times.first), "scikit_learn_seconds": min(times.second)}
        print(f"{row['name']}: {in_words(row)} times as fast{'' if row['ratio'] >= WANTED else f'  BELOW {WANTED:g}'}")
    return results


def time_bootstrap(count: int, metrics: tuple[str, ...], timed: int) -> dict:
    """1,000 resamples of `count` scores, of which `timed` are made."""
    home, strange = scores(count, None)
    took = seconds_of(lambda: resample(home[None], strange[None], timed, metrics=metrics)) * 1000 / timed
    rng, anomalous = np.random.default_rng(0), np.repeat([0, 1], [len(home), len(strange)])

    def plain() -> None:
        for _ in range(3):
            roc_auc_score(anomalous, np.concatenate([rng.choice(side, len(side)) for side in (home, strange)]))

    theirs = seconds_of(plain) * 1000 / 3
    print(
        f"1,000 resamples of {', '.join(metrics)} of {count:,} scores: {took:.1f} s; of AUROC alone with scikit-learn"
        f" {theirs:.0f} s"
    )
    return {"scores": count, "metrics": metrics, "seconds": took, "scikit_learn_auroc_seconds": theirs}


def time_detectors(images: int, channels: int, classes: int) -> dict:
    """Fit on the images and score of a tenth as many."""
    train, test, labels, probe = material(images, channels, classes)
    logits, results = probe.logits(test), {}
    for name in DETECTORS:
        fitted = seconds_of(lambda name=name: fit(name, train, labels, probe))
        score = fit(name, train, labels, probe)
        scored = seconds_of(lambda score=score: score(test, logits))
        results[name] = {"fit_seconds": fitted, "score_seconds": scored}
        print(f"{name}: fit of {images:,} images {fitted:.2f} s, score of {len(test):,} {scored:.2f} s")
    return results


def material(images: int, channels: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Probe]:
    """Training and test features, labels of the former, and a probe."""
    rng, labels = np.random.default_rng(0), np.arange(images) % classes
    train = rng.normal(size=(images, channels)).astype(np.float32) + rng.normal(size=(classes, channels))[labels]
    train, test = train.astype(np.float32), rng.normal(size=(images // 10, channels)).astype(np.float32)
    weight = rng.normal(size=(classes, channels)).astype(np.float32)
    return train, test, labels, Probe("cls", weight, np.zeros(classes, dtype=np.float32), 0)


def scores(count: int, digits: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores of ID images and of anomalies, half of them each."""
    rng = np.random.default_rng(0)
    sides = rng.normal(size=count // 2), rng.normal(1.0, size=count - count // 2)
    return sides if digits is None else tuple(side.round(digits) for side in sides)


if __name__ == "__main__":
    main()
