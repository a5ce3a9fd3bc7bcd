"""Predictions of a run's probes, kept so that two runs can be compared image by image.

A safetensors file: `<readout>/<data set>` (b, c) float32 logits, `labels/<data set>` (b,) int64, rows in the order of the
test rows of the manifest; class names, allowed classes and manifest digests as JSON in the metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors.numpy import save_file

from .metrics import PairedDifference, paired_accuracy_difference, top1_correct
from .probes import read_described

METADATA_KEY = "regvit_predictions"


@dataclass(frozen=True)
class Predictions:
    """Logits of every readout on the test images of every data set.

    Attributes:
        logits: by (readout, data set), (b, c) float32.
        labels: by data set, (b,) int64 class index of each image; −1 where it has none (an anomaly).
        allowed: by data set with labels, the class indices that may be predicted there: all of the probe's, or the
            part of them that the data set has.
        classes: class names, in the order of the logits.
        digests: by data set, the manifest's digest: rows of two runs pair only where it is the same.
    """

    logits: dict[tuple[str, str], Float[np.ndarray, "b c"]]
    labels: dict[str, Int[np.ndarray, " b"]]
    allowed: dict[str, tuple[int, ...]]
    classes: tuple[str, ...]
    digests: dict[str, str]

    @property
    def readouts(self) -> tuple[str, ...]:
        """Names of the readouts, each once, in their order."""
        return tuple(dict.fromkeys(readout for readout, _ in self.logits))

    def correct(self, readout: str, dataset: str) -> Bool[np.ndarray, " b"]:
        """Whether each image is classified rightly.

        Raises:
            ValueError: there are no such predictions, or the data set has no labels.
        """
        if (readout, dataset) not in self.logits:
            known = ", ".join("/".join(key) for key in self.logits)
            raise ValueError(f"there are no predictions of {readout!r} on {dataset!r}; there are {known}")
        if dataset not in self.allowed:
            raise ValueError(f"data set {dataset!r} has no labels (an anomaly set), so nothing there is right or wrong")
        return top1_correct(self.logits[readout, dataset], self.labels[dataset], self.allowed[dataset])


def paired_difference(a: Predictions, readout_a: str, b: Predictions, readout_b: str, dataset: str) -> PairedDifference:
    """Accuracy of a's readout minus that of b's on the images of one data set; a and b may be the same run.

    Raises:
        ValueError: as `Predictions.correct`, or the two were made from different manifests.
    """
    correct_a, correct_b = a.correct(readout_a, dataset), b.correct(readout_b, dataset)
    if a.digests[dataset] != b.digests[dataset]:
        raise ValueError(
            f"data set {dataset!r} has manifest {a.digests[dataset][:12]}… in one run and {b.digests[dataset][:12]}… in "
            "the other, so their rows are not the same images; evaluate both on the same data"
        )
    return paired_accuracy_difference(correct_a, correct_b)


def save_predictions(path: Path | str, predictions: Predictions) -> None:
    """Write predictions; the same predictions give the same bytes."""
    tensors = {f"{readout}/{dataset}": values for (readout, dataset), values in predictions.logits.items()}
    tensors |= {f"labels/{dataset}": values for dataset, values in predictions.labels.items()}
    metadata = {
        "keys": [list(key) for key in predictions.logits],  # their order: safetensors sorts its tensors
        "allowed": predictions.allowed,
        "classes": predictions.classes,
        "digests": predictions.digests,
    }
    save_file(
        {name: np.ascontiguousarray(values) for name, values in tensors.items()},
        str(path),
        metadata={METADATA_KEY: json.dumps(metadata, ensure_ascii=False)},
    )


def load_predictions(path: Path | str) -> Predictions:
    """Read what `save_predictions` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidProbes: the file is no safetensors file of predictions.
    """
    tensors, metadata = read_described(path, METADATA_KEY, "predictions; run the evaluate stage")
    return Predictions(
        logits={(readout, dataset): tensors[f"{readout}/{dataset}"] for readout, dataset in metadata["keys"]},
        labels={dataset: tensors[f"labels/{dataset}"] for dataset in metadata["digests"]},
        allowed={dataset: tuple(indices) for dataset, indices in metadata["allowed"].items()},
        classes=tuple(metadata["classes"]),
        digests=metadata["digests"],
    )
