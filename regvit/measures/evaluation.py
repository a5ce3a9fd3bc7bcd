"""A run's classifiers and detectors on the test images of every data set: predictions, metrics, paired differences.

Roles: the ID set (`id`), on whose train split everything was fitted; `ood` sets, of the same classes with another look;
`anomaly` sets, of none of the classes. Every metric is a mean over the probe seeds, with an interval over images and
seeds (`metrics.accuracy`, `bootstrap`); every difference is paired by image and seed.

Shape letters: s probe seed, b image, w resample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from regvit.data.manifest import Dataset
from regvit.features.readouts import Features
from regvit.features.stored_readouts import blocks, stored_readouts
from regvit.features.tensor_file import Scratch
from regvit.measures.detectors import FEATURES_ONLY, Scorer, check_known, fit
from regvit.probing.neighbours import knn_logit_blocks
from regvit.probing.predictions import Predictions, check_same_images, image_keys, logit_blocks, paired_difference
from regvit.probing.probes import Probe, ProbeSet
from regvit.stats.accuracy import accuracy, class_indices
from regvit.stats.anomaly_metrics import ANOMALY_METRICS, roc_curve
from regvit.stats.bootstrap import Resampled, mean_over_sets, resample

TEST_ROWS = 1 << 14  # test images that are scored at once: 128 MiB of float32 at 2,048 channels
NO_LOGITS = np.empty((0, 0), dtype=np.float32)  # for detectors that do not look at them
COMPARED = ("auroc", "fpr95")  # the anomaly metrics of which differences are taken


@dataclass(frozen=True)
class TestSet:
    """A data set, its role, and a run's features of it (all splits)."""

    __test__ = False  # no test, whatever pytest thinks of the name

    dataset: Dataset
    role: str
    features: Features


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        in_distribution: name of the ID set.
        ood, anomaly: names of the others, by role.
        detectors: names of them.
        bootstrap: resamples of the anomaly metrics.
        seed: of the resampling.
    """

    in_distribution: str
    ood: tuple[str, ...]
    anomaly: tuple[str, ...]
    detectors: tuple[str, ...]
    bootstrap: int = 1000
    seed: int = 0

    @property
    def labelled(self) -> tuple[str, ...]:
        """The sets that have the classes: ID first."""
        return (self.in_distribution, *self.ood)


# --- predictions ----------------------------------------------------------------------------------------------------


def predict(
    probes: ProbeSet,
    sets: Mapping[str, TestSet],
    detectors: Sequence[str],
    on_readout: Callable[[int], None] | None = None,
    scratch: Path | str | None = None,
    device: str | torch.device = "cpu",
) -> Predictions:
    """Logits and anomaly scores of every readout on the test images of every data set.

    Features that lie in stores are read in blocks, those of the training images as often as detectors and neighbours go
    over them, and with `scratch` the logits of a block go to disk: what is in memory does not grow with the images, but
    for labels and scores (8 bytes a detector and seed). Everything is checked before the first feature is read.

    Args:
        probes: trained on the train split of the set whose role is `id`.
        sets: by name; the order is kept.
        detectors: names of them; those that look at features are fitted on the ID train split.
        on_readout: called with 1 after each readout.
        scratch: folder on a disk, in which logits lie in a file without a name until the predictions are saved and
            gone; None keeps them in memory.
        device: where neighbours are looked for.
    Raises:
        ValueError: a detector or a class is unknown, a test split is empty or has images without a label, a labelled set
            has a single class, there is not one ID set, or what the detectors need is not there.
    """
    for name in detectors:
        check_known(name)
    home = _home(sets)
    rows = {name: _rows(name, each.dataset, "test") for name, each in sets.items()}
    made = Predictions(logits={}, labels={}, allowed={}, classes=probes.classes, digests={}, images={})
    for name, each in sets.items():
        made.digests[name] = each.dataset.digest
        made.images[name] = image_keys(each.dataset.rows.select(rows[name]).column("image_id"))
        made.labels[name] = np.full(len(rows[name]), -1, dtype=np.int64)
        if each.role != "anomaly":
            made.labels[name], made.allowed[name] = _in_known_classes(name, each.dataset, rows[name], probes.classes)
    train_rows = _rows(home, sets[home].dataset, "train")
    train_labels, _ = _in_known_classes(home, sets[home].dataset, train_rows, probes.classes)
    train = stored_readouts(sets[home].features, probes.probes, train_rows)
    test = {dataset: stored_readouts(each.features, probes.probes, rows[dataset]) for dataset, each in sets.items()}
    empty = np.empty if scratch is None else Scratch(scratch).empty
    for name, seeds in probes.probes.items():
        fitted = _Fitted(name, seeds, train[name], train_labels, probes, detectors, device)
        for dataset, each in sets.items():
            fitted.apply(made, dataset, test[dataset][name], each.role != "ood", empty)
        if on_readout is not None:
            on_readout(1)
    return made


class _Fitted:
    """The classifiers and detectors of one readout."""

    def __init__(
        self,
        name: str,
        seeds: tuple[Probe, ...],
        train: Float[np.ndarray, "n d"],
        labels: Int[np.ndarray, " n"],
        probes: ProbeSet,
        detectors: Sequence[str],
        device: str | torch.device,
    ):
        self.name, self.seeds, self.train, self.labels, self.device = name, seeds, train, labels, device
        self.logistic, self.knn = probes.logistic.get(name), probes.knn.get(name)
        self.classes = len(probes.classes)
        pooled = any(probe.pool is not None for probe in seeds)
        self.scorers: dict[str, list[Scorer]] = {}
        embedded = [Embedded(train, probe) for probe in (seeds if pooled else seeds[:1])]
        for detector in detectors:
            # Without pooling all seeds have the same features: what looks at nothing else says the same for each.
            needed = seeds if pooled or detector not in FEATURES_ONLY else seeds[:1]
            self.scorers[detector] = [
                fit(detector, embedded[i if pooled else 0], labels, probe) for i, probe in enumerate(needed)
            ]

    def apply(
        self,
        made: Predictions,
        dataset: str,
        features: Float[np.ndarray, "b d"],
        scored: bool,
        empty: Callable[[tuple[int, ...], type], Any],
    ) -> None:
        """Adds what is said of a data set's images to the predictions, block by block.

        Args:
            scored: whether detectors score them.
            empty: makes the arrays for logits, as `numpy.empty` does.
        """
        n, scorers = len(features), self.scorers if scored else {}
        logits = made.logits[self.name, dataset] = empty((len(self.seeds), n, self.classes), np.float32)
        others = [name for name in ("logistic", "knn") if getattr(self, name) is not None]
        for name in others:
            made.other[name, self.name, dataset] = empty((n, self.classes), np.float32)
        scores = {detector: np.empty((len(each), n)) for detector, each in scorers.items()}
        for rows in blocks(n, TEST_ROWS):
            some = features[rows]
            for i, probe in enumerate(self.seeds):
                embedded = probe.embed(some)
                of_seed = {detector: each[i] for detector, each in scorers.items() if i < len(each)}
                for detector in [each for each in of_seed if each in FEATURES_ONLY]:
                    # All rows at once, as these may go over the training images each time.
                    scores[detector][i, rows] = of_seed.pop(detector)(embedded, NO_LOGITS)
                for part, here in _within(rows, self.classes):
                    found = embedded[part] @ probe.weight.T + probe.bias
                    logits[i][here] = found
                    for detector, score in of_seed.items():
                        scores[detector][i, here] = score(embedded[part], found)
            if self.logistic is not None:
                for part, here in _within(rows, self.classes):
                    made.other["logistic", self.name, dataset][here] = self.logistic.logits(some[part])
        made.scores.update({(detector, self.name, dataset): values for detector, values in scores.items()})
        if self.knn is not None:
            k, temperature = self.knn.k, self.knn.temperature
            votes = knn_logit_blocks(self.train, self.labels, features, k, temperature, self.classes, self.device)
            for rows, found in votes:
                made.other["knn", self.name, dataset][rows] = found


def _within(rows: slice, n_classes: int) -> Iterator[tuple[slice, slice]]:
    """Rows of which logits are held at once, within a block of images and among all images."""
    for part in logit_blocks(rows.stop - rows.start, n_classes):
        yield part, slice(rows.start + part.start, rows.start + part.stop)


class Embedded:
    """What a probe's weight multiplies, of features that are read when they are asked for: like an array (n, d')."""

    ndim = 2

    def __init__(self, features: Float[np.ndarray, "n d"], probe: Probe):
        self._features, self._probe = features, probe
        self.shape = (len(features), probe.weight.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | Int[np.ndarray, " b"]) -> Float[np.ndarray, "b d'"]:
        return self._probe.embed(self._features[which])


def _home(sets: Mapping[str, TestSet]) -> str:
    homes = [name for name, each in sets.items() if each.role == "id"]
    if len(homes) != 1:
        raise ValueError(f"{len(homes)} data sets have the role id ({', '.join(homes) or 'none'}); expected one")
    return homes[0]


def _rows(name: str, dataset: Dataset, split: str) -> Int[np.ndarray, " b"]:
    rows = dataset.split_rows(split)
    if not len(rows):
        raise ValueError(f"data set {name!r} has no images in its {split} split; give some of them split = {split}")
    return rows


def _in_known_classes(
    name: str, dataset: Dataset, rows: Int[np.ndarray, " b"], known: tuple[str, ...]
) -> tuple[Int[np.ndarray, " b"], tuple[int, ...]]:
    """Labels as the probe's class indices, matched by name, and the indices of the classes that the data set has."""
    labels = dataset.labels()[rows]
    if (labels < 0).any():
        raise ValueError(
            f"data set {name!r} has {int((labels < 0).sum())} images without a label in the {dataset.rows[rows[0]].split}"
            " split, which cannot be right or wrong; label them, or give the data set the role anomaly"
        )
    if len(dataset.classes) < 2:
        raise ValueError(
            f"data set {name!r} has the single class {dataset.classes[0]!r}; only the classes that a set has may be "
            "predicted there, so every image would be right: add classes, or give it the role anomaly"
        )
    try:
        indices = class_indices(dataset.classes, known)
    except ValueError as error:
        raise ValueError(f"data set {name!r}: {error}") from error
    return indices[labels], tuple(indices.tolist())


# --- metrics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A run's predictions with its anomaly metrics resampled.

    Attributes:
        anomaly: by anomaly set, readout and detector; one row a seed.
        mean: by readout and detector, over the anomaly sets; empty where there are none.
    """

    predictions: Predictions
    anomaly: dict[str, dict[tuple[str, str], Resampled]]
    mean: dict[tuple[str, str], Resampled]


def draw(predictions: Predictions, plan: Plan, metrics: Sequence[str] = tuple(ANOMALY_METRICS)) -> Drawn:
    """Resample the anomaly metrics of all readouts and detectors; runs on the same images see the same resamples."""
    home, anomaly = plan.in_distribution, {}
    keys = [(name, detector) for name in predictions.readouts for detector in plan.detectors]
    own = {key: predictions.scores[key[1], key[0], home] for key in keys}
    ends = np.cumsum([0, *(len(own[key]) for key in keys)])
    for dataset in plan.anomaly:
        strange = [predictions.scores[detector, name, dataset] for name, detector in keys]
        every = resample(
            np.concatenate([own[key] for key in keys]),
            np.concatenate(strange),
            plan.bootstrap,
            plan.seed,
            name=dataset,
            metrics=metrics,
        )
        anomaly[dataset] = {key: every.rows(range(ends[i], ends[i + 1])) for i, key in enumerate(keys)}
    mean = {key: mean_over_sets({name: sets[key] for name, sets in anomaly.items()}) for key in keys} if anomaly else {}
    return Drawn(predictions, anomaly, mean)


def evaluate(drawn: Drawn, plan: Plan) -> dict:
    """`{readout: {id, ood: {set}, anomaly: {set: {detector}}, anomaly_mean: {detector}, knn: {id, ood}, …}}`.

    Each value has its interval beside it, and `n`; `anomaly_mean` is over the anomaly sets, each weighing the same.
    Accuracies are among the classes that the data set has, as is usual for those with a part of the classes.
    """
    predictions = drawn.predictions
    n_id = len(predictions.labels[plan.in_distribution])

    def accuracies(name: str, classifier: str | None = None) -> dict:
        top1 = {dataset: accuracy(predictions.correct(name, dataset, classifier)) for dataset in plan.labelled}
        values = {dataset: found.named("top1") | {"n": found.n} for dataset, found in top1.items()}
        return {"id": values[plan.in_distribution], "ood": {dataset: values[dataset] for dataset in plan.ood}}

    def separation(resampled: Resampled, metrics: Sequence[str]) -> dict:
        named = {}
        for metric in metrics:
            named |= resampled.estimate(metric).named(metric)
        return named | {"n": resampled.n, "n_id": n_id}

    table = {}
    for name in predictions.readouts:
        sets = {
            dataset: {
                detector: separation(resampled[name, detector], tuple(ANOMALY_METRICS)) for detector in plan.detectors
            }
            for dataset, resampled in drawn.anomaly.items()
        }
        table[name] = accuracies(name) | {"anomaly": sets}
        if drawn.mean:
            table[name]["anomaly_mean"] = {
                detector: separation(drawn.mean[name, detector], COMPARED) for detector in plan.detectors
            }
        table[name] |= {classifier: accuracies(name, classifier) for classifier in predictions.classifiers(name)}
    return table


def base_readout(readouts: Sequence[str]) -> str:
    """The readout that the others of a run are compared with: `cls`, or the first one where there is none."""
    return "cls" if "cls" in readouts else readouts[0]


def differences_within(drawn: Drawn, plan: Plan) -> dict:
    """`{"<readout>-cls": {id, ood, pooled, anomaly, anomaly_mean}}`, each readout minus the run's CLS; see `compared`."""
    base = base_readout(drawn.predictions.readouts)
    others = [name for name in drawn.predictions.readouts if name != base]
    return {f"{name}-{base}": compared(drawn, name, drawn, base, plan) for name in others}


def differences_between(a: Drawn, b: Drawn, plan: Plan) -> dict:
    """`{"<readout of a>-<readout of b>": …}`: each readout of a minus the same of b, or b's CLS where b has it not.

    Raises:
        ValueError: a data set was not the same for both.
    """
    there = b.predictions.readouts
    pairs = [(name, name if name in there else base_readout(there)) for name in a.predictions.readouts]
    return {f"{mine}-{theirs}": compared(a, mine, b, theirs, plan) for mine, theirs in pairs}


def compared(a: Drawn, readout_a: str, b: Drawn, readout_b: str, plan: Plan) -> dict:
    """Everything that can be said of readout a minus readout b on the same images, with intervals and p-values.

    `pooled` is the accuracy over all images of the ID and OOD sets together, where there are OOD sets. p-values stand
    for themselves: they are not corrected for their number.
    """
    check_same_images(a.predictions, b.predictions, (*plan.labelled, *plan.anomaly))
    n_id = len(a.predictions.labels[plan.in_distribution])

    def top1(datasets: Sequence[str]) -> dict:
        found = paired_difference(a.predictions, readout_a, b.predictions, readout_b, datasets)
        return found.named("top1") | {"n": found.n}

    def separation(ours: Resampled, theirs: Resampled) -> dict:
        named = {}
        for metric in COMPARED:
            named |= ours.minus(theirs, metric).named(metric)
        return named | {"n": ours.n, "n_id": n_id}

    table = {"id": top1([plan.in_distribution]), "ood": {dataset: top1([dataset]) for dataset in plan.ood}}
    if plan.ood:
        table["pooled"] = top1(plan.labelled)
    table["anomaly"] = {
        dataset: {
            name: separation(a.anomaly[dataset][readout_a, name], b.anomaly[dataset][readout_b, name])
            for name in plan.detectors
        }
        for dataset in plan.anomaly
    }
    if plan.anomaly:
        table["anomaly_mean"] = {
            name: separation(a.mean[readout_a, name], b.mean[readout_b, name]) for name in plan.detectors
        }
    return table


def difference_rows(values: Mapping, plan: Plan) -> Iterator[tuple]:
    """What `compared` gave as rows: metric, data set, detector, difference, lo, hi, p, n; sets together as `ID + OOD`."""

    def row(metric: str, dataset: str, detector: str, found: Mapping) -> tuple:
        return (metric, dataset, detector, *(found[f"{metric}{end}"] for end in ("", "_lo", "_hi", "_p")), found["n"])

    yield row("top1", plan.in_distribution, "", values["id"])
    for dataset, found in values["ood"].items():
        yield row("top1", dataset, "", found)
    if "pooled" in values:
        yield row("top1", "ID + OOD", "", values["pooled"])
    sets = values["anomaly"] | ({"mean": values["anomaly_mean"]} if "anomaly_mean" in values else {})
    for dataset, detectors in sets.items():
        for detector, found in detectors.items():
            for metric in COMPARED:
                yield row(metric, dataset, detector, found)


# --- plots ----------------------------------------------------------------------------------------------------------


def roc_rows(predictions: Predictions, plan: Plan, points: int = 100) -> Iterator[tuple[str, str, float, float]]:
    """(data set, detector, fpr, tpr) of the CLS readout and the first seed; ID is positive."""
    name = base_readout(predictions.readouts)
    for dataset in plan.anomaly:
        for detector in plan.detectors:
            own, strange = (predictions.scores[detector, name, each][0] for each in (plan.in_distribution, dataset))
            curve = roc_curve(own, strange, points)
            for fpr, tpr in zip(curve.fpr, curve.tpr, strict=True):
                yield dataset, detector, round(float(fpr), 6), round(float(tpr), 6)


def confusion_rows(predictions: Predictions, plan: Plan) -> Iterator[tuple[str, str]]:
    """(actual class, predicted class) of every ID test image and seed, by the CLS readout."""
    home = plan.in_distribution
    for logits in predictions.logits[base_readout(predictions.readouts), home]:
        for rows in logit_blocks(*logits.shape):
            for actual, predicted in zip(predictions.labels[home][rows], logits[rows].argmax(1), strict=True):
                yield predictions.classes[actual], predictions.classes[predicted]


def rounded(values):
    """The same nested dicts with floats of 6 digits: what lies beyond is noise, and would fill the diffs."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    return round(values, 6) if isinstance(values, float) else values
