"""Figures of a run's predictions, and paired differences of two: numpy and pandas alone, no torch.

Every figure is a mean over the probe seeds, with an interval over images and seeds; every difference is paired by image and
seed (`regvit.stats`). Accuracies are among the classes that a data set has, as is usual for sets with a part of the classes.
Two names stand for several data sets: `ood` for the images of all OOD sets together, where images of the same name (an emoji
in several drawing styles) count as one group, and `anomalies` for the mean over the anomaly sets, each weighing the same.

Shape letters: s probe seed, b image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Shaped

from regvit.probing.predictions import Predictions
from regvit.stats.accuracy import accuracy, paired_accuracy_difference
from regvit.stats.anomaly_metrics import ANOMALY_METRICS, roc_curve
from regvit.stats.bootstrap import RESAMPLES, Resampled, mean_over_sets, resample
from regvit.stats.figures import DIFFERENCE_COLUMNS, Figure, figures_table
from regvit.stats.intervals import Difference

COMPARED = ("auroc", "fpr95")  # the anomaly metrics of which differences are taken
OOD, ANOMALIES = "ood", "anomalies"
ROC_POINTS = 100


def evaluate(predictions: Predictions, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Accuracies of every classifier and anomaly metrics of every detector, by readout and data set (`stats.figures`)."""
    figures: dict[str, list[Figure]] = {}
    for readout in predictions.readouts:
        for classifier in predictions.classifiers(readout):
            for dataset, members in _labelled(predictions).items():
                found = accuracy(*_correct(predictions, members, readout, classifier))
                figures.setdefault(dataset, []).append(Figure.of("top1", found, readout=readout, classifier=classifier))
    for (dataset, readout, detector), drawn in _resampled(predictions, tuple(ANOMALY_METRICS), resamples, seed).items():
        for metric in ANOMALY_METRICS:
            found = Figure.of(metric, drawn.estimate(metric), readout=readout, detector=detector)
            figures.setdefault(dataset, []).append(found)
    return pd.concat([figures_table(each, predictions.index.run, dataset) for dataset, each in figures.items()])


def base_readout(readouts: Sequence[str]) -> str:
    """The readout that the others of a run are compared with: `cls`, or the first one where there is none."""
    return "cls" if "cls" in readouts else readouts[0]


def readout_pairs(a: Predictions, b: Predictions, bases: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Each readout of a run with those of another that it is held against: the same one, or, where the other has it not (as
    without registers), the bases, CLS if it has none of these; within a run each with the bases."""
    known = [base for base in bases if base in b.readouts] or [base_readout(b.readouts)]
    pairs = [(name, base) for name in a.readouts for base in ([name] if a is not b and name in b.readouts else known)]
    return [(name, base) for name, base in pairs if a is not b or name != base]


def paired_differences(
    a: Predictions, readout_a: str, b: Predictions, readout_b: str, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Everything that can be said of readout a minus readout b on the same images, with intervals and p-values.

    p-values stand for themselves: they are not corrected for their number.

    Returns: a table with `DIFFERENCE_COLUMNS`.
    Raises:
        ValueError: a data set was not the same for both, or there is no such readout.
    """
    check_same_images(a, b)
    rows = []

    def add(dataset: str, metric: str, found: Difference, classifier: str = "", detector: str = "") -> None:
        rows.append((a.index.run, b.index.run, dataset, readout_a, readout_b, classifier, detector, metric,
                     found.value, found.lo, found.hi, found.p, found.n))  # fmt: skip

    for classifier in a.classifiers(readout_a):
        if classifier in b.classifiers(readout_b):
            for dataset, members in _labelled(a).items():
                mine, groups = _correct(a, members, readout_a, classifier)
                theirs, _ = _correct(b, members, readout_b, classifier)
                add(dataset, "top1", paired_accuracy_difference(mine, theirs, groups), classifier)
    mine, theirs = (_resampled(each, COMPARED, resamples, seed) for each in (a, b))
    for (dataset, readout, detector), drawn in mine.items():
        if readout == readout_a and (dataset, readout_b, detector) in theirs:
            for metric in COMPARED:
                add(dataset, metric, drawn.minus(theirs[dataset, readout_b, detector], metric), detector=detector)
    return pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS))


def check_same_images(a: Predictions, b: Predictions) -> None:
    """Raises ValueError where the data sets are not the same for both, so that their rows do not pair."""
    if list(a.index.sets) != list(b.index.sets):
        raise ValueError(
            f"run {a.index.run!r} was evaluated on {', '.join(a.index.sets)} and {b.index.run!r} on "
            f"{', '.join(b.index.sets)}; evaluate both on the same data sets"
        )
    for dataset, each in a.index.sets.items():
        if each.digest != (other := b.index.sets[dataset].digest):
            raise ValueError(
                f"data set {dataset!r} has manifest {each.digest[:12]}… in run {a.index.run!r} and {other[:12]}… in "
                f"{b.index.run!r}, so their rows are not the same images; evaluate both on the same data"
            )


def roc_table(predictions: Predictions) -> pd.DataFrame:
    """ROC of every detector and anomaly set by the CLS readout and the first seed; ID is positive."""
    readout, (home,) = base_readout(predictions.readouts), predictions.named("id")
    tables = []
    for dataset in predictions.named("anomaly"):
        for detector in dict.fromkeys(name for _, name, _ in predictions.index.detectors):
            curve = roc_curve(*(predictions.scores(each, readout, detector)[0] for each in (home, dataset)), ROC_POINTS)
            tables.append(pd.DataFrame({"readout": readout, "detector": detector, "dataset": dataset,
                                        "fpr": curve.fpr, "tpr": curve.tpr}).round(6))  # fmt: skip
    return pd.concat(tables) if tables else pd.DataFrame(columns=["readout", "detector", "dataset", "fpr", "tpr"])


def confusion_table(predictions: Predictions) -> pd.DataFrame:
    """Actual and predicted class of every ID test image and seed, by the CLS readout."""
    (home,) = predictions.named("id")
    labels, classes = predictions.labels(home), np.array(predictions.index.classes)
    tables = [
        pd.DataFrame(
            {"actual": classes[np.tile(labels[rows], len(logits))], "predicted": classes[logits.argmax(2).ravel()]}
        )
        for rows, logits in predictions.logit_blocks(home, base_readout(predictions.readouts))
    ]
    return pd.concat(tables)


def _labelled(predictions: Predictions) -> dict[str, tuple[str, ...]]:
    """Names of accuracies: the data sets with labels, ID first, and all OOD sets together."""
    ood = predictions.named("ood")
    return {name: (name,) for name in predictions.named("id", "ood")} | ({OOD: ood} if ood else {})


def _correct(
    predictions: Predictions, datasets: Sequence[str], readout: str, classifier: str
) -> tuple[Bool[np.ndarray, "s b"], Shaped[np.ndarray, " b"] | None]:
    """Who is right on the images of several sets, and which of these are the same image drawn otherwise."""
    correct = np.concatenate([predictions.correct(name, readout, classifier) for name in datasets], axis=1)
    groups = np.concatenate([predictions.images(name) for name in datasets]) if len(datasets) > 1 else None
    return correct, groups


def _resampled(
    predictions: Predictions, metrics: tuple[str, ...], resamples: int, seed: int
) -> dict[tuple[str, str, str], Resampled]:
    """Anomaly metrics by data set, readout and detector; runs on the same images see the same resamples."""
    asked = ("resampled", metrics, resamples, seed)
    if asked in predictions.kept:
        return predictions.kept[asked]
    (home,), sets, drawn = predictions.named("id"), predictions.named("anomaly"), {}
    keys = list(dict.fromkeys(key[:2] for key in predictions.index.detectors))
    for dataset in sets:
        own, strange = ([predictions.scores(name, *key) for key in keys] for name in (home, dataset))
        every = resample(np.concatenate(own), np.concatenate(strange), resamples, seed, dataset, metrics)
        ends = np.cumsum([0, *map(len, own)])
        drawn |= {(dataset, *key): every.rows(range(ends[i], ends[i + 1])) for i, key in enumerate(keys)}
    if sets:
        drawn |= {(ANOMALIES, *key): mean_over_sets({name: drawn[name, *key] for name in sets}) for key in keys}
    return predictions.kept.setdefault(asked, drawn)
