"""Predictions of a run, kept so that two runs can be compared image by image.

A safetensors file, rows in the order of the test rows of the manifest:

- `logits/<readout>/<data set>` (s, b, c) float32, of each probe seed;
- `other/<classifier>/<readout>/<data set>` (b, c) float32, of classifiers without seeds (`knn`, `logistic`);
- `scores/<detector>/<readout>/<data set>` (s, b) float64 anomaly scores, or (1, b) where no probe plays a part;
- `labels/<data set>` (b,) int64, `images/<data set>` (b,) int64.

Class names, allowed classes and manifest digests are JSON in the metadata.

Logits are by far the most of it (12 GB for ImageNet with its OOD sets): they may lie on disk, where they are read in blocks
of images (`tensor_file`), and whoever uses them takes them so. In memory are scores, labels, and who was right.

Shape letters: s probe seed, b image, c class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError

from regvit.features.stored_readouts import blocks
from regvit.features.tensor_file import DiskArray, open_tensors, write_tensors
from regvit.files import replacing
from regvit.probing.probes import InvalidProbes, described_in
from regvit.stats.accuracy import PairedDifference, paired_accuracy_difference, top1_correct

METADATA_KEY = "regvit_predictions"
FORMAT_VERSION = 2  # 2: several seeds, other classifiers, anomaly scores
LOGITS_AT_ONCE = 1 << 21  # held at once: 8 MiB of float32, and some of float64 where they are scored


@dataclass(frozen=True)
class Predictions:
    """What a run's classifiers and detectors say of the test images of every data set.

    Attributes:
        logits: by (readout, data set), (s, b, c) float32, of the probes; in memory, or on disk as a `DiskArray`.
        labels: by data set, (b,) int64 class index of each image; −1 where it has none (an anomaly).
        allowed: by data set with labels, the class indices that may be predicted there: all of the probe's, or the
            part of them that the data set has.
        classes: class names, in the order of the logits.
        digests: by data set, the manifest's digest: rows of two runs pair only where it is the same.
        images: by data set, (b,) int64 that is the same where images of two sets have the same name (`image_keys`).
        other: by (classifier, readout, data set), (b, c) float32; in memory or on disk.
        scores: by (detector, readout, data set), (s, b) or (1, b) float64; larger for anomalies.
    """

    logits: dict[tuple[str, str], Float[np.ndarray, "s b c"] | DiskArray]
    labels: dict[str, Int[np.ndarray, " b"]]
    allowed: dict[str, tuple[int, ...]]
    classes: tuple[str, ...]
    digests: dict[str, str]
    images: dict[str, Int[np.ndarray, " b"]]
    other: dict[tuple[str, str, str], Float[np.ndarray, "b c"] | DiskArray] = field(default_factory=dict)
    scores: dict[tuple[str, str, str], Float[np.ndarray, "s b"]] = field(default_factory=dict)
    _correct: dict[tuple, Bool[np.ndarray, "s b"]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def readouts(self) -> tuple[str, ...]:
        """Names of the readouts, each once, in their order."""
        return tuple(dict.fromkeys(readout for readout, _ in self.logits))

    def classifiers(self, readout: str) -> tuple[str, ...]:
        """Names of the classifiers besides the probes that a readout has."""
        return tuple(dict.fromkeys(classifier for classifier, name, _ in self.other if name == readout))

    def correct(self, readout: str, dataset: str, classifier: str | None = None) -> Bool[np.ndarray, "s b"]:
        """Whether each image is classified rightly, by each probe seed, or by another classifier (s = 1).

        Logits are gone through once, block by block; the answer is kept, and must not be written to.

        Raises:
            ValueError: there are no such predictions, or the data set has no labels.
        """
        if classifier is None:
            logits, key = self.logits, (readout, dataset)
        else:
            logits, key = self.other, (classifier, readout, dataset)
        if key not in logits:
            known = ", ".join("/".join(each) for each in logits)
            raise ValueError(f"there are no predictions of {'/'.join(key)}; there are {known or 'none'}")
        if dataset not in self.allowed:
            raise ValueError(f"data set {dataset!r} has no labels (an anomaly set), so nothing there is right or wrong")
        if key not in self._correct:
            by_seed = logits[key] if classifier is None else [logits[key]]
            found = np.stack([self._right(each, dataset) for each in by_seed])
            found.flags.writeable = False
            self._correct[key] = found
        return self._correct[key]

    def _right(self, logits: Float[np.ndarray, "b c"] | DiskArray, dataset: str) -> Bool[np.ndarray, " b"]:
        labels, allowed = self.labels[dataset], self.allowed[dataset]
        return np.concatenate(
            [top1_correct(logits[rows], labels[rows], allowed) for rows in logit_blocks(*logits.shape)]
        )


def logit_blocks(n: int, n_classes: int) -> Iterator[slice]:
    """0 to n in slices of as many images as logits are held of at once."""
    return blocks(n, max(1, LOGITS_AT_ONCE // n_classes))


def image_keys(image_ids: Iterable[str]) -> Int[np.ndarray, " b"]:
    """A number for each image name, the same wherever the name is."""
    digests = (hashlib.sha256(name.encode()).digest()[:8] for name in image_ids)
    return np.array([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=np.int64)


def check_same_images(a: Predictions, b: Predictions, datasets: Iterable[str]) -> None:
    """Raises ValueError where a data set was not the same for both, so that their rows do not pair."""
    for dataset in datasets:
        if a.digests[dataset] != b.digests[dataset]:
            raise ValueError(
                f"data set {dataset!r} has manifest {a.digests[dataset][:12]}… in one run and "
                f"{b.digests[dataset][:12]}… in the other, so their rows are not the same images; evaluate both on the "
                "same data"
            )


def paired_difference(
    a: Predictions, readout_a: str, b: Predictions, readout_b: str, datasets: Iterable[str]
) -> PairedDifference:
    """Accuracy of a's readout minus that of b's on the images of one or several data sets; a and b may be the same run.

    Over several sets every image weighs the same, and images that have the same name (an emoji in several drawing
    styles) are taken as one group, as they are easy or hard together.

    Raises:
        ValueError: as `Predictions.correct`, or the two were made from different manifests.
    """
    datasets = tuple(datasets)
    correct_a, correct_b = (
        np.concatenate([of.correct(readout, dataset) for dataset in datasets], axis=1)
        for of, readout in ((a, readout_a), (b, readout_b))
    )
    check_same_images(a, b, datasets)
    groups = np.concatenate([a.images[dataset] for dataset in datasets]) if len(datasets) > 1 else None
    return paired_accuracy_difference(correct_a, correct_b, groups)


def save_predictions(path: Path | str, predictions: Predictions) -> None:
    """Write predictions; the same predictions give the same bytes."""
    tensors = {f"labels/{dataset}": values for dataset, values in predictions.labels.items()}
    tensors |= {f"images/{dataset}": values for dataset, values in predictions.images.items()}
    for kind in ("logits", "other", "scores"):
        tensors |= {"/".join((kind, *key)): values for key, values in getattr(predictions, kind).items()}
    metadata = {
        "format_version": FORMAT_VERSION,
        # the keys in their order: safetensors sorts its tensors
        "keys": {kind: [list(key) for key in getattr(predictions, kind)] for kind in ("logits", "other", "scores")},
        "allowed": predictions.allowed,
        "classes": predictions.classes,
        "digests": predictions.digests,
    }
    with replacing(path) as beside:
        write_tensors(beside, tensors, {METADATA_KEY: json.dumps(metadata, ensure_ascii=False)})


def load_predictions(path: Path | str) -> Predictions:
    """Opens what `save_predictions` wrote; logits stay on disk, and the file may be deleted meanwhile.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidProbes: the file is no safetensors file of predictions, or of another format version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file of predictions; run the evaluate stage")
    cure = "expected a file of predictions; run the evaluate stage again"
    try:
        tensors, described = open_tensors(path)
    except (SafetensorError, ValueError) as error:
        raise InvalidProbes(f"{path} is no safetensors file of predictions ({error}); {cure}") from error
    metadata = described_in(path, described, METADATA_KEY, FORMAT_VERSION, "predictions", "evaluate")
    on_disk = {
        kind: {tuple(key): tensors["/".join((kind, *key))] for key in keys} for kind, keys in metadata["keys"].items()
    }
    return Predictions(
        logits=on_disk["logits"],
        other=on_disk["other"],
        scores={key: np.asarray(values) for key, values in on_disk["scores"].items()},
        labels={dataset: np.asarray(tensors[f"labels/{dataset}"]) for dataset in metadata["digests"]},
        images={dataset: np.asarray(tensors[f"images/{dataset}"]) for dataset in metadata["digests"]},
        allowed={dataset: tuple(indices) for dataset, indices in metadata["allowed"].items()},
        classes=tuple(metadata["classes"]),
        digests=metadata["digests"],
    )
