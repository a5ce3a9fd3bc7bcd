"""A run's classifiers and detectors on the test images of every data set.

Roles: the ID set (`id`), on whose train split everything was fitted; `ood` sets, of the same classes with another look;
`anomaly` sets, of none of the classes.

Shape letters: b image, n training image, c class, d channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from regvit.data.manifest import Dataset
from regvit.features.readouts import FeatureSource
from regvit.features.stored_readouts import stored_readouts
from regvit.measures.detectors import FEATURES_ONLY, Detectors, Scorer, fit
from regvit.probing.neighbours import Labelled, knn_logit_blocks
from regvit.probing.predictions import (
    Index,
    Predictions,
    SetWriter,
    TestSet,
    image_keys,
    logit_blocks,
    making_predictions,
    open_predictions,
)
from regvit.probing.probes import Baselines, Probe, ProbeSet
from regvit.stats.accuracy import class_indices

NO_LOGITS = np.empty((0, 0), dtype=np.float32)  # for detectors that do not look at them


@dataclass(frozen=True)
class Measured:
    """A data set, its role, and a run's features of it (all splits)."""

    dataset: Dataset
    role: str
    features: FeatureSource


def predict(
    run: str,
    probes: ProbeSet,
    baselines: Baselines,
    sets: Mapping[str, Measured],
    detectors: Detectors,
    path: Path | str | None = None,
    on_readout: Callable[[str], object] = lambda name: None,
) -> Predictions:
    """Logits and anomaly scores of every readout on the test images of every data set.

    Features that lie in stores are read in blocks, those of the training images as often as detectors and neighbours go
    over them, and logits go to disk block by block: what is in memory does not grow with the images, but for labels and
    scores (8 bytes a detector and seed). Everything is checked before the first feature is read.

    Args:
        run: name of it, for the tables.
        probes, baselines: trained on the train split of the set whose role is `id`.
        sets: by name; the order is kept.
        detectors: those that look at features are fitted on the ID train split.
        path: of the predictions; None keeps them in memory.
        on_readout: called after each readout.
    Raises:
        ValueError: a detector or a class is unknown, a test split is empty or has images without a label, a labelled set
            has a single class, there is not one ID set, or what the detectors need is not there.
    """
    homes = [name for name, each in sets.items() if each.role == "id"]
    if len(homes) != 1:
        raise ValueError(f"{len(homes)} data sets have the role id ({', '.join(homes) or 'none'}); expected one")
    rows = {name: _rows(name, each.dataset, "test") for name, each in sets.items()}
    labels, about = {}, {}
    for name, each in sets.items():
        labels[name], allowed = np.full(len(rows[name]), -1, dtype=np.int64), ()
        if each.role != "anomaly":
            labels[name], allowed = _in_known_classes(name, each.dataset, rows[name], probes.classes)
        about[name] = TestSet(each.role, each.dataset.digest, allowed)
    home = sets[homes[0]]
    train_rows = _rows(homes[0], home.dataset, "train")
    train_labels, _ = _in_known_classes(homes[0], home.dataset, train_rows, probes.classes)
    train = stored_readouts(home.features, probes.probes, train_rows)
    fitted = {name: _Fitted(of_seeds, baselines, detectors) for name, of_seeds in probes.probes.items()}
    index = Index(
        run,
        probes.classes,
        about,
        tuple(key for each in fitted.values() for key in each.classifiers),
        tuple(key for each in fitted.values() for key in each.detectors),
    )
    with making_predictions(path, index) as predictions:
        writers, test, scores = {}, {}, {name: {} for name in sets}
        for name, each in sets.items():
            images = image_keys(each.dataset.rows.select(rows[name]).column("image_id"))
            writers[name] = SetWriter(predictions, name, labels[name], images)
            test[name] = stored_readouts(each.features, probes.probes, rows[name])
        for readout, each in fitted.items():
            each.fit(train[readout], train_labels)
            for name in sets:
                scores[name] |= each.apply(writers[name], test[name][readout], about[name].role != "ood")
            on_readout(readout)
        for name, writer in writers.items():
            writer.finish(scores[name])
    return predictions if path is None else open_predictions(path)


class _Fitted:
    """The classifiers and detectors of one readout."""

    def __init__(self, probes: tuple[Probe, ...], baselines: Baselines, detectors: Detectors):
        self.name, self.probes, self._asked = probes[0].readout, probes, detectors
        self.logistic, self.knn = baselines.logistic.get(self.name), baselines.knn.get(self.name)
        self._n_classes = len(baselines.classes)
        self.classifiers = [(self.name, "linear", probe.seed) for probe in probes]
        self.classifiers += [(self.name, name, -1) for name in ("logistic", "knn") if getattr(self, name) is not None]
        # Without pooling all seeds have the same features: what looks at nothing else says the same for each.
        self._pools = probes[0].pool is not None
        self.detectors = [
            (self.name, name, probe.seed if self._pools or name not in FEATURES_ONLY else -1)
            for name in detectors.names
            for probe in (probes if self._pools or name not in FEATURES_ONLY else probes[:1])
        ]

    def fit(self, train: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> None:
        """The detectors, on the training images."""
        self._train, self._labels = train, labels
        by_seed = {probe.seed: probe for probe in self.probes} | {-1: self.probes[0]}
        self._scorers: dict[tuple, Scorer] = {
            key: fit(key[1], Embedded(train, by_seed[key[2]]), labels, by_seed[key[2]], self._asked)
            for key in self.detectors
        }

    def apply(self, writer: SetWriter, test: Float[np.ndarray, "b d"], scored: bool) -> dict:
        """Writes the logits of a data set's images; gives the scores of the detectors, if they are wanted."""
        wanted = self._scorers if scored else {}
        scores = {key: np.empty(len(test)) for key in wanted}
        for rows in logit_blocks(len(test), self._n_classes):
            features = test[rows]
            for probe in self.probes:
                embedded = probe.embed(features)
                logits = embedded @ probe.weight.T + probe.bias
                writer.write((self.name, "linear", probe.seed), rows, logits)
                for key in wanted:
                    if key[2] == probe.seed and key[1] not in FEATURES_ONLY:
                        scores[key][rows] = wanted[key](embedded, logits)
            if self.logistic is not None:
                writer.write((self.name, "logistic", -1), rows, self.logistic.logits(features))
        for key in wanted:
            if key[1] in FEATURES_ONLY:  # all images at once, as these may go over the training images each time
                probe = next(each for each in self.probes if key[2] in (each.seed, -1))
                scores[key] = wanted[key](Embedded(test, probe), NO_LOGITS)
        if self.knn is not None:
            train = Labelled(self._train, self._labels)
            for rows, logits in knn_logit_blocks(train, test, self.knn, self._n_classes, self._asked.device):
                writer.write((self.name, "knn", -1), rows, logits)
        return scores


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
