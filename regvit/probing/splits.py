"""Labelled features of the train and the validation split: what every classifier is fitted and chosen on.

Shape letters: b image, d channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from regvit.data.manifest import Dataset
from regvit.features.readouts import POOLED
from regvit.features.store import FeatureStore
from regvit.features.stored_readouts import blocks, stored_readouts


@dataclass(frozen=True)
class Split:
    """Labelled features of some images.

    Attributes:
        features: by readout: arrays, or `stored_readouts`, which are read when they are needed and may not fit in memory.
        labels: class index of each image.
        channels: of one token; needed by readouts that the probe pools, whose features hold several.
    """

    features: Mapping[str, Float[np.ndarray, "b d"]]
    labels: Int[np.ndarray, " b"]
    channels: int | None = None


def open_splits(dataset: Dataset, store: FeatureStore, readouts: Sequence[str]) -> tuple[Split, Split]:
    """Readouts of the train and of the validation split, which are read when they are needed."""
    labels, channels = dataset.labels(), store.arrays["cls"][-1] if "cls" in store.arrays else None
    rows = [dataset.split_rows(split) for split in ("train", "val")]
    train, val = (Split(stored_readouts(store, readouts, each), labels[each], channels) for each in rows)
    return train, val


def check_splits(train: Split, val: Split, classes: Sequence[str]) -> None:
    """Holds training and validation images to what any classifier needs.

    Raises:
        ValueError: a split is empty or has unusable labels or features, the readouts of the two differ, or the
            training images are all of one class; the message gives value and cure.
    """
    for name, split in (("train", train), ("val", val)):
        _check_split(name, split, classes)
    shapes = [{name: values.shape[1] for name, values in split.features.items()} for split in (train, val)]
    if not shapes[0]:
        raise ValueError("there is no readout to train on: name one that the run has in probe.readouts, such as cls")
    if shapes[0] != shapes[1]:
        raise ValueError(f"train has the readouts and channels {shapes[0]} and val {shapes[1]}; expected the same")
    if (train.labels == train.labels[0]).all():
        raise ValueError(f"all {len(train.labels)} training images are of class {train.labels[0]}; "
                         "a probe needs images of at least 2 classes")  # fmt: skip
    for name in set(train.features) & set(POOLED):
        width, channels = shapes[0][name], train.channels
        if channels is None or channels < 1 or width % channels or width < 2 * channels:
            raise ValueError(f"readout {name!r} has {width} channels and those of one token are {channels}; "
                             "expected CLS and at least one register of that width each")  # fmt: skip


def _check_split(name: str, split: Split, classes: Sequence[str]) -> None:
    labels = split.labels
    if not len(labels):
        raise ValueError(f"the {name} split is empty; give some images of the in-distribution set split = {name}")
    if labels.min() < 0 or labels.max() >= len(classes):
        fault = f"{int((labels < 0).sum())} images without a label" if labels.min() < 0 else f"label {labels.max()}"
        raise ValueError(f"the {name} split has {fault}; a probe needs class indices 0 to {len(classes) - 1}")
    for readout, values in split.features.items():
        if values.ndim != 2 or len(values) != len(labels):
            raise ValueError(f"readout {readout!r} has {name} features of shape {values.shape}; expected "
                             f"({len(labels)}, channels), one row per label")  # fmt: skip
        if bad := sum(int((~np.isfinite(values[rows])).any(1).sum()) for rows in blocks(len(values))):
            raise ValueError(
                f"readout {readout!r}: {bad} of {len(values)} {name} rows are not finite; extract them again"
            )
