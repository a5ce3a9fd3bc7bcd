"""AUROC, its bootstrap and the detectors against the clock: `python benchmarks/detectors.py`.

- AUROC of a million scores, ours and scikit-learn's `roc_auc_score`, in turn in one process, so that a loaded machine
  slows both alike; CPU seconds, and the ratio as median over the rounds. Both must give the same value.
- A 1,000-fold bootstrap of all five anomaly metrics of 10⁵ and of AUROC of 10⁶ scores (of the latter 100 resamples are
  timed: the time is proportional), against `roc_auc_score` on each resample, of which 3 are timed.
- Every detector: fit and score of features of the shape of a ViT-B data set.

Prints a line a measurement and writes JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from regvit.bootstrap import resample
from regvit.detectors import DETECTORS, fit
from regvit.metrics import ANOMALY_METRICS, auroc
from regvit.probes import Probe

WANTED = 1.0  # at least as fast as scikit-learn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=20_000, help="training images of the detectors")
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/detectors.json"))
    given = parser.parse_args()
    found = {
        "auroc": time_auroc(given.scores, given.rounds),
        "bootstrap": [
            time_bootstrap(given.scores // 10, tuple(ANOMALY_METRICS), 1000),
            time_bootstrap(given.scores, ("auroc",), 100),
        ],
        "detectors": time_detectors(given.images, given.channels, given.classes),
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n")


def time_auroc(count: int, rounds: int) -> dict:
    """AUROC of `count` scores, half of them anomalies, without ties and with."""
    results = {}
    for name, digits in (("without ties", None), ("with ties", 2)):
        home, strange = scores(count, digits)
        anomalous, both = np.repeat([0, 1], [len(home), len(strange)]), np.concatenate([home, strange])
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(seconds(lambda h=home, s=strange: auroc(h, s)))
            theirs.append(seconds(lambda y=anomalous, x=both: roc_auc_score(y, x)))
        error = abs(auroc(home, strange) - roc_auc_score(anomalous, both))
        assert error < 1e-12, f"AUROC differs from scikit-learn's by {error:.2g}"
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        results[name] = {"seconds": min(ours), "scikit_learn_seconds": min(theirs), "times_as_fast": ratio}
        print(
            f"AUROC of {count:,} scores {name}: {min(ours):.3f} s, scikit-learn {min(theirs):.3f} s, {ratio:.1f} times"
            f" as fast{'' if ratio >= WANTED else f'  BELOW {WANTED:g}'}"
        )
    return results


def time_bootstrap(count: int, metrics: tuple[str, ...], timed: int) -> dict:
    """1,000 resamples of `count` scores, of which `timed` are made."""
    home, strange = scores(count, None)
    took = seconds(lambda: resample(home[None], strange[None], timed, metrics=metrics)) * 1000 / timed
    rng, anomalous = np.random.default_rng(0), np.repeat([0, 1], [len(home), len(strange)])

    def plain() -> None:
        for _ in range(3):
            roc_auc_score(anomalous, np.concatenate([rng.choice(side, len(side)) for side in (home, strange)]))

    theirs = seconds(plain) * 1000 / 3
    print(
        f"1,000 resamples of {', '.join(metrics)} of {count:,} scores: {took:.1f} s; of AUROC alone with scikit-learn"
        f" {theirs:.0f} s"
    )
    return {"scores": count, "metrics": metrics, "seconds": took, "scikit_learn_auroc_seconds": theirs}


def time_detectors(images: int, channels: int, classes: int) -> dict:
    """Fit on the images and score of a tenth as many."""
    rng, labels = np.random.default_rng(0), np.arange(images) % classes
    train = rng.normal(size=(images, channels)).astype(np.float32) + rng.normal(size=(classes, channels))[labels]
    train, test = train.astype(np.float32), rng.normal(size=(images // 10, channels)).astype(np.float32)
    weight = rng.normal(size=(classes, channels)).astype(np.float32)
    probe = Probe("cls", weight, np.zeros(classes, dtype=np.float32), 0.1, 0)
    logits, results = probe.logits(test), {}
    for name in DETECTORS:
        fitted = seconds(lambda name=name: fit(name, train, labels, probe))
        score = fit(name, train, labels, probe)
        scored = seconds(lambda score=score: score(test, logits))
        results[name] = {"fit_seconds": fitted, "score_seconds": scored}
        print(f"{name}: fit of {images:,} images {fitted:.2f} s, score of {len(test):,} {scored:.2f} s")
    return results


def scores(count: int, digits: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores of ID images and of anomalies, half of them each."""
    rng = np.random.default_rng(0)
    sides = rng.normal(size=count // 2), rng.normal(1.0, size=count - count // 2)
    return sides if digits is None else tuple(side.round(digits) for side in sides)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process that it takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
