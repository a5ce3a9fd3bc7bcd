"""Predictions of a run, kept so that two runs can be compared image by image: a zarr group, read with numpy alone.

    <data set>/labels   (b,) int64      class index of each test image; −1 where it has none (an anomaly)
    <data set>/images   (b,) int64      the same number where images of two sets have the same name
    <data set>/correct  (m, b) bool     whether each classifier is right, of sets with labels
    <data set>/logits   (m, b, c) float32
    <data set>/scores   (k, b) float64  anomaly scores, of the ID and the anomaly sets; larger for anomalies

Rows are test rows of the manifest. The group's attributes say which classifier (readout, name, seed) each m is, which
detector (readout, name, seed) each k, and of each data set its role, its manifest's digest and the classes that may be
predicted there: all of the probe's, or the part of them that the data set has.

Logits are by far the most of it (12 GB for ImageNet with its OOD sets): they are written block by block, and stay on disk.

Shape letters: m classifier, k detector, s seed, b image, c class.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Bool, Float, Int
from zarr.errors import GroupNotFoundError
from zarr.storage import MemoryStore

from regvit.probing.probes import InvalidProbes
from regvit.stats.accuracy import top1_correct

FORMAT_VERSION = 3
LOGITS_AT_ONCE = 1 << 21  # held at once, and in a chunk: 8 MiB of float32

Key = tuple[str, str, int]  # readout, classifier or detector, seed (−1: none)


@dataclass(frozen=True)
class TestSet:
    """What predictions say of a data set's test images.

    Attributes:
        role: id, ood or anomaly.
        digest: of the manifest: rows of two runs pair only where it is the same.
        allowed: classes that may be predicted there; none of an anomaly set.
    """

    __test__ = False  # no test, whatever pytest thinks of the name

    role: str
    digest: str
    allowed: tuple[int, ...]


@dataclass(frozen=True)
class Index:
    """What the arrays of predictions are of: the group's attributes.

    Attributes:
        run: its name.
        classes: class names, in the order of the logits.
        sets: by data set; one of them has the role id.
        classifiers, detectors: of each row.
    """

    run: str
    classes: tuple[str, ...]
    sets: dict[str, TestSet]
    classifiers: tuple[Key, ...]
    detectors: tuple[Key, ...]

    def attributes(self) -> dict:
        """As plain JSON values."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def of(cls, attributes: Mapping) -> Index:
        """Back from JSON."""
        sets = {
            name: TestSet(each["role"], each["digest"], tuple(each["allowed"]))
            for name, each in attributes["sets"].items()
        }
        classifiers, detectors = (tuple(map(tuple, attributes[key])) for key in ("classifiers", "detectors"))
        return cls(attributes["run"], tuple(attributes["classes"]), sets, classifiers, detectors)


@dataclass(frozen=True)
class Predictions:
    """A group of predictions, open for reading, or while it is made for writing.

    Attributes:
        kept: of what was computed from it, so that many comparisons share it.
    """

    index: Index
    group: zarr.Group
    kept: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def readouts(self) -> tuple[str, ...]:
        """Names of the readouts, each once, in their order."""
        return tuple(dict.fromkeys(readout for readout, _, _ in self.index.classifiers))

    def named(self, *roles: str) -> tuple[str, ...]:
        """Data sets of these roles, in the order of the roles."""
        return tuple(name for role in roles for name, each in self.index.sets.items() if each.role == role)

    def classifiers(self, readout: str) -> tuple[str, ...]:
        """Names of the classifiers that a readout has: `linear`, `logistic`, `knn`."""
        return tuple(dict.fromkeys(name for own, name, _ in self.index.classifiers if own == readout))

    def labels(self, dataset: str) -> Int[np.ndarray, " b"]:
        """Class index of each test image."""
        return self._array(dataset, "labels")

    def images(self, dataset: str) -> Int[np.ndarray, " b"]:
        """A number for each test image, the same in other sets where the image has the same name."""
        return self._array(dataset, "images")

    def correct(self, dataset: str, readout: str, classifier: str = "linear") -> Bool[np.ndarray, "s b"]:
        """Whether each image is classified rightly, by each probe seed, or by a classifier without seeds (s = 1).

        Raises:
            ValueError: there are no such predictions, or the data set has no labels.
        """
        if not self.index.sets[dataset].allowed:
            raise ValueError(f"data set {dataset!r} has no labels (an anomaly set), so nothing there is right or wrong")
        return self._array(dataset, "correct")[_rows(self.index.classifiers, readout, classifier)]

    def scores(self, dataset: str, readout: str, detector: str) -> Float[np.ndarray, "s b"]:
        """Anomaly scores, one row where no probe plays a part. Raises ValueError where there are none."""
        return self._array(dataset, "scores")[_rows(self.index.detectors, readout, detector)]

    def logit_blocks(
        self, dataset: str, readout: str, classifier: str = "linear"
    ) -> Iterator[tuple[slice, Float[np.ndarray, "s b c"]]]:
        """Rows of the test images, and their logits, block by block."""
        rows, logits = _rows(self.index.classifiers, readout, classifier), self.group[dataset]["logits"]
        for block in logit_blocks(logits.shape[1], logits.shape[2]):
            yield block, np.stack([logits[row, block] for row in rows])

    def _array(self, dataset: str, name: str) -> np.ndarray:
        if (dataset, name) not in self.kept:
            values = self.group[dataset][name][:]
            values.flags.writeable = False
            self.kept[dataset, name] = values
        return self.kept[dataset, name]


def _rows(keys: Sequence[Key], readout: str, name: str) -> list[int]:
    rows = [i for i, key in enumerate(keys) if key[:2] == (readout, name)]
    if not rows:
        known = ", ".join(dict.fromkeys("/".join(key[:2]) for key in keys))
        raise ValueError(f"there are no predictions of {readout}/{name}; there are {known or 'none'}")
    return rows


def logit_blocks(n: int, n_classes: int) -> Iterator[slice]:
    """0 to n in slices of as many images as logits are held of at once."""
    rows = max(1, LOGITS_AT_ONCE // n_classes)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def image_keys(image_ids: Iterable[str]) -> Int[np.ndarray, " b"]:
    """A number for each image name, the same wherever the name is."""
    digests = (hashlib.sha256(name.encode()).digest()[:8] for name in image_ids)
    return np.array([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=np.int64)


class SetWriter:
    """Takes what is said of one data set's test images, logits block by block.

    Args:
        predictions: that are being made.
        dataset: name of it.
        labels, images: as they are kept.
    """

    def __init__(
        self, predictions: Predictions, dataset: str, labels: Int[np.ndarray, " b"], images: Int[np.ndarray, " b"]
    ):
        index, n = predictions.index, len(labels)
        self._about, self._labels = index.sets[dataset], labels
        self._group = predictions.group.create_group(dataset)
        for name, values in (("labels", labels), ("images", images)):
            self._group.create_array(name, data=values, compressors=None)
        shape = (len(index.classifiers), n, len(index.classes))
        rows = min(n, max(1, LOGITS_AT_ONCE // shape[2]))
        self._logits = self._group.create_array(
            "logits", shape=shape, chunks=(1, rows, shape[2]), dtype=np.float32, compressors=None
        )
        self._correct = np.zeros(shape[:2], dtype=bool)
        self._index = index

    def write(self, key: Key, rows: slice, logits: Float[np.ndarray, "b c"]) -> None:
        """Logits of one classifier for some of the images."""
        m = self._index.classifiers.index(key)
        self._logits[m, rows] = logits
        if self._about.allowed:
            self._correct[m, rows] = top1_correct(logits, self._labels[rows], self._about.allowed)

    def finish(self, scores: Mapping[Key, Float[np.ndarray, " b"]]) -> None:
        """Anomaly scores of every detector, or none of them."""
        if self._about.allowed:
            self._group.create_array("correct", data=self._correct, compressors=None)
        if scores:
            stacked = np.stack([scores[key] for key in self._index.detectors])
            self._group.create_array("scores", data=stacked, compressors=None)


@contextmanager
def making_predictions(path: Path | str | None, index: Index) -> Iterator[Predictions]:
    """Predictions to be filled by `SetWriter`s; at the end of the block they get their final place, whole or not at all.

    Args:
        path: of the group, `<name>.zarr`; None keeps it in memory.
    """
    if path is None:
        yield Predictions(index, zarr.create_group(MemoryStore(), attributes=index.attributes()))
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        yield Predictions(index, zarr.create_group(beside, attributes=index.attributes()))
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def open_predictions(path: Path | str) -> Predictions:
    """Opens a group of predictions.

    Raises:
        FileNotFoundError: there is no such folder.
        InvalidProbes: the folder holds no predictions, or of another format version.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} does not exist; expected predictions; run the evaluate stage")
    cure = f"expected predictions of format {FORMAT_VERSION}; run the evaluate stage again"
    try:
        group = zarr.open_group(path, mode="r")
    except (GroupNotFoundError, FileNotFoundError) as error:
        raise InvalidProbes(f"{path} is no zarr group; {cure}") from error
    attributes = dict(group.attrs)
    if attributes.get("format_version") != FORMAT_VERSION or "classifiers" not in attributes:
        raise InvalidProbes(f"{path} holds something else, of format {attributes.get('format_version')}; {cure}")
    return Predictions(Index.of(attributes), group)
