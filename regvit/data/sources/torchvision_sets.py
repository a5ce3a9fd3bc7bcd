"""Data sets that torchvision knows, fetched by it into `work/downloads/torchvision/<Name>`.

Where a set consists of image files (DTD, Places365, Food101, …) they are read in place; where it is packed its images are
written: CIFAR and SVHN as PNG. A copy that lies in the folder already is used as it is. Torchvision unpickles CIFAR's
batches after it has checked their published digests.

Splits are called train, val and test. With one named (`SVHN/test`, or `DTD/all`) its images are all there is; without
one, a set to train on has all of its splits, and a set of the role ood or anomaly its held-out one (test, else val).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.manifest import Row
from regvit.data.packages import DownloadFailed
from regvit.data.sources.npy import add_arrays
from regvit.data.splits import wanted_splits

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset


def _three(**more: str) -> dict[str, dict]:
    return {split: {"split": split, **more} for split in ("train", "val", "test")}


def _two(train: str = "train", test: str = "test") -> dict[str, dict]:
    return {"train": {"split": train}, "test": {"split": test}}


CIFAR = {"train": {"train": True}, "test": {"train": False}}
SETS: dict[str, dict[str, dict]] = {  # for each split the arguments with which torchvision's class gives it
    "CIFAR10": CIFAR,
    "CIFAR100": CIFAR,
    "Country211": {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}},
    "DTD": _three(),
    "EuroSAT": {"": {}},
    "FGVCAircraft": _three(),
    "Flowers102": _three(),
    "Food101": _two(),
    "GTSRB": _two(),
    "INaturalist": {"train": {"version": "2021_train_mini"}, "val": {"version": "2021_valid"}},
    "Imagenette": {"train": {"split": "train"}, "val": {"split": "val"}},
    "OxfordIIITPet": _two("trainval"),
    "Places365": {"train": {"split": "train-standard", "small": True}, "val": {"split": "val", "small": True}},
    "SUN397": {"": {}},
    "SVHN": _two(),
}


def torchvision_set(builder: DatasetBuilder, rest: str) -> None:
    """`<Name>[/<split>]`, the name as torchvision.datasets has it."""
    name, _, split = rest.partition("/")
    if name not in SETS:
        near = get_close_matches(name, SETS, n=1, cutoff=0)[0]
        raise ValueError(f"torchvision's {name!r} is not among the data sets that can be read here; nearest is {near!r}, "
                         f"known are {', '.join(SETS)}; use folder:<path> for image files of any other")  # fmt: skip
    root = builder.work / "downloads" / "torchvision" / name
    known = [one for one in SETS[name] if one]
    if split not in ("", "all", *known):
        raise ValueError(f"torchvision:{name} has no split {split!r}; it has {', '.join(known) or 'none'}")
    if split:
        splits = dict.fromkeys(SETS[name] if split == "all" else [split], "")
    else:
        splits = wanted_splits(f"torchvision:{name}", tuple(SETS[name]), builder.entry.role)
    builder.credit_to("images", f"torchvision.datasets.{name}")
    opened = [(source, target, _opened(name, root, SETS[name][source])) for source, target in splits.items()]
    if name in ("CIFAR10", "CIFAR100", "SVHN"):
        return _packed(builder, opened)
    rows = []
    for _, target, dataset in opened:
        for file, label in _samples(dataset):
            path = Path(os.path.relpath(file, root)).as_posix()
            rows.append(Row(path, path, label, target))
    builder.read_in_place(root, builder.plan(sorted(rows, key=lambda row: row.path)))


def _opened(name: str, root: Path, arguments: dict) -> VisionDataset:
    """The data set of torchvision's, fetched if it is not in `root` yet.

    Raises:
        DownloadFailed: it cannot be fetched, or what lies in `root` is not whole.
    """
    import torchvision.datasets  # takes two seconds (it imports torch's compiler), which no other source should pay

    root.mkdir(parents=True, exist_ok=True)
    download = True
    if name == "INaturalist":  # alone in refusing to look whether it is there already
        download = not (root / arguments["version"]).is_dir()
    try:
        return getattr(torchvision.datasets, name)(str(root), **arguments, download=download)
    except (RuntimeError, OSError, EOFError) as error:
        raise DownloadFailed(f"torchvision could not fetch or open {name}: {error}; check the network, or put a copy as "
                             f"torchvision lays it out into {root}") from error  # fmt: skip


def _samples(dataset: VisionDataset) -> Iterator[tuple[str, str]]:
    """(path, class name) of every image, wherever torchvision's class keeps them."""
    if hasattr(dataset, "all_categories"):  # INaturalist
        for category, file in dataset.index:
            folder = dataset.all_categories[category]
            yield os.path.join(dataset.root, folder, file), folder
        return
    pairs = next((getattr(dataset, key) for key in ("samples", "imgs", "_samples") if hasattr(dataset, key)), None)
    if pairs is None:
        paths = dataset._image_files if hasattr(dataset, "_image_files") else dataset._images
        pairs = zip(paths, dataset._labels, strict=True)
    to_index = getattr(dataset, "wnid_to_idx", None) or getattr(dataset, "class_to_idx", {})
    names = {index: name for name, index in to_index.items()}
    for path, label in pairs:
        yield str(path), "" if label is None else names[label] if names else str(label)


def _packed(builder: DatasetBuilder, opened: list[tuple[str, str, VisionDataset]]) -> None:
    """CIFAR and SVHN, which are arrays."""
    rows, images = [], []
    for source, target, dataset in opened:
        if hasattr(dataset, "targets"):  # CIFAR
            labels, pixels = [dataset.classes[label] for label in dataset.targets], dataset.data
        else:
            labels, pixels = map(str, dataset.labels.tolist()), dataset.data.transpose(0, 2, 3, 1)  # were (b, 3, h, w)
        rows += [Row(f"{source}_{i:05}", "", label, target) for i, label in enumerate(labels)]
        images.append(pixels)
    add_arrays(builder, rows, np.concatenate(images))
