"""Data sets that torchvision knows, fetched from where it fetches them, into `work/downloads/torchvision/<Name>`.

Where a set consists of image files (DTD, Places365, Food101, …) they are read in place; where it is packed (CIFAR, SVHN,
LSUN) its images are written: CIFAR and SVHN as PNG, LSUN's as the files that its database holds. A copy that lies in
the folder already is used as it is.

Nothing here is unpickled. Torchvision reads CIFAR's Python batches with pickle and remembers LSUN's keys in one, so
these two are read here instead: CIFAR from the binary version that its authors publish beside the other (the same
images, one record of labels and 3,072 bytes an image), LSUN straight from its LMDB.

Splits are called train, val and test. With one named (`SVHN/test`, or `DTD/all`) its images are all there is; without
one, a set to train on has all of its splits, and a set of the role ood or anomaly its held-out one (test, else val).
"""

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from regvit.data.dataset_builder import Workbench, suffix_of
from regvit.data.downloads import DownloadFailed, fetch_file
from regvit.data.rows import RowList
from regvit.data.sources.folder import Listed, add_in_place, assign_splits
from regvit.data.sources.npy import add_packed

CIFAR_SIDE = 32  # pixels
TORONTO = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Packed:
    """A set without image files.

    Attributes:
        splits: train, val, test, as far as the set has them.
        build: adds the images of some of its splits to a workbench; its second argument pairs each split of the source
            with that of the data set ("" where the source's is all there is).
    """

    splits: tuple[str, ...]
    build: Callable[[Workbench, dict[str, str]], None]


@dataclass(frozen=True)
class Files:
    """A set of image files: for each split the arguments with which torchvision's class gives it."""

    splits: dict[str, dict]


# Binary CIFAR: address, MD5 as published, folder in the archive, label bytes before the pixels, and for the label that
# counts its place among them and the file of its names.


@dataclass(frozen=True)
class _Cifar:
    file: str
    md5: str
    folder: str
    label_bytes: int
    label_place: int
    names: str
    batches: dict[str, tuple[str, ...]]


CIFAR = {
    "CIFAR10": _Cifar(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-batches-bin",
        1,
        0,
        "batches.meta.txt",
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    ),
    "CIFAR100": _Cifar(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        2,  # the first is that of the superclass
        1,
        "fine_label_names.txt",
        {"train": ("train.bin",), "test": ("test.bin",)},
    ),
}


def torchvision_set(bench: Workbench, rest: str) -> None:
    """`<Name>[/<split>]`, the name as torchvision.datasets has it."""
    name, _, split = rest.partition("/")
    if name == "LSUN":
        _lsun(bench, split)
        return
    if name not in SETS:
        near = get_close_matches(name, [*SETS, "LSUN"], n=1, cutoff=0)[0]
        raise ValueError(f"torchvision's {name!r} is not among the data sets that can be read here; nearest is {near!r}, "
                         f"known are {', '.join([*SETS, 'LSUN'])}; use folder:<path> for image files of any other")  # fmt: skip
    splits = _wanted_splits(name, tuple(SETS[name].splits), split, bench.role)
    bench.credit_to("images", f"torchvision.datasets.{name}", "see its publisher", "see its publisher")
    if isinstance(SETS[name], Packed):
        SETS[name].build(bench, splits)
    else:
        _files(bench, name, splits)


def _wanted_splits(name: str, known: tuple[str, ...], split: str, role: str | None) -> dict[str, str]:
    """{split of the source: split of the data set, "" where it is all there is}."""
    if split == "all":
        return dict.fromkeys(known, "")
    if split and split not in known:
        has = f"it has {', '.join(known)}" if any(known) else "it has none"
        raise ValueError(f"torchvision:{name} has no split {split!r}; {has}")
    if split or known == ("",):
        return {split: ""}
    if role in ("ood", "anomaly"):
        return {"test" if "test" in known else "val": ""}
    return {one: one for one in known}


# Sets of image files.


def _files(bench: Workbench, name: str, splits: dict[str, str]) -> None:
    root, listed = bench.downloads / "torchvision" / name, []
    for of_source, split in splits.items():
        dataset = _opened(name, root, SETS[name].splits[of_source])
        for path, label in _samples(dataset):
            listed.append(Listed(Path(os.path.relpath(path, root)).as_posix(), label, split))
    add_in_place(bench, root, sorted(listed, key=lambda one: one.path))


def _opened(name: str, root: Path, arguments: dict) -> "torchvision.datasets.VisionDataset":
    """The data set of torchvision's, fetched if it is not in `root` yet.

    Raises:
        DownloadFailed: it cannot be fetched, or what lies in `root` is not whole.
    """
    import torchvision.datasets  # takes two seconds (it imports torch's compiler), which no other source should pay

    root.mkdir(parents=True, exist_ok=True)
    there = {"download": True}
    if name == "INaturalist":  # alone in refusing to look whether it is there already
        there = {"download": not (root / arguments["version"]).is_dir()}
    try:
        return getattr(torchvision.datasets, name)(str(root), **arguments, **there)
    except (RuntimeError, OSError, EOFError) as error:
        raise DownloadFailed(f"torchvision could not fetch or open {name}: {error}; check the network, or put a copy as "
                             f"torchvision lays it out into {root}") from error  # fmt: skip


def _samples(dataset: "torchvision.datasets.VisionDataset") -> Iterator[tuple[str, str]]:
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
    names = _class_names(dataset)
    for path, label in pairs:
        yield str(path), "" if label is None else names[label] if names else str(label)


def _class_names(dataset: "torchvision.datasets.VisionDataset") -> dict[int, str]:
    """Name of each label; {} where torchvision has none."""
    to_index = getattr(dataset, "wnid_to_idx", None) or getattr(dataset, "class_to_idx", {})
    return {index: name for name, index in to_index.items()}


# Packed sets.


def _cifar(name: str) -> Callable[[Workbench, dict[str, str]], None]:
    def build(bench: Workbench, splits: dict[str, str]) -> None:
        layout = CIFAR[name]
        root = bench.downloads / "torchvision" / name
        archive = None
        if not (root / layout.folder).is_dir():
            archive = fetch_file(TORONTO + layout.file, f"md5:{layout.md5}", root, bench.label)
        names = [line for line in _member(root, layout.folder, layout.names, archive).decode().split("\n") if line]
        records, images = [], {}
        for of_source, split in splits.items():
            content = b"".join(_member(root, layout.folder, file, archive) for file in layout.batches[of_source])
            part = _cifar_records(name, content, layout.label_bytes)
            for i, label in enumerate(part[:, layout.label_place]):
                if label >= len(names):
                    raise ValueError(f"{name} has the label {label} and only {len(names)} class names; fetch it again")
                images[f"{of_source}_{i:05}"] = (split, names[label])
            records.append(part)
        pixels = np.concatenate(records)[:, layout.label_bytes :]
        pixels = pixels.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)  # (b, 3, h, w) -> (b, h, w, 3)
        add_packed(bench, images, lambda i: pixels[i])

    return build


def _member(root: Path, folder: str, file: str, archive: Path | None) -> bytes:
    """A file of binary CIFAR, from its archive or from where it was unpacked by hand."""
    if archive is None:
        return (root / folder / file).read_bytes()
    with tarfile.open(archive) as tar:
        return tar.extractfile(f"{folder}/{file}").read()


def _cifar_records(name: str, content: bytes, label_bytes: int) -> np.ndarray:
    """Records of labels and pixels as uint8, shape (b, label_bytes + 3072)."""
    size = label_bytes + 3 * CIFAR_SIDE**2
    if not content or len(content) % size:
        raise ValueError(f"{name}'s batches hold {len(content)} bytes, not a multiple of {size}; fetch them again")
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, size)


def _svhn(bench: Workbench, splits: dict[str, str]) -> None:
    root, images, pixels = bench.downloads / "torchvision" / "SVHN", {}, []
    for of_source, split in splits.items():
        dataset = _opened("SVHN", root, {"split": of_source})
        pixels.append(dataset.data.transpose(0, 2, 3, 1))  # (b, 3, h, w) -> (b, h, w, 3)
        images |= {f"{of_source}_{i:05}": (split, str(label)) for i, label in enumerate(dataset.labels.tolist())}
    stacked = np.concatenate(pixels)
    add_packed(bench, images, lambda i: stacked[i])


def _lsun(bench: Workbench, which: str) -> None:
    """`<category>_<split>` such as church_outdoor_val, `train` or `val` (of every category that is there), or `test`."""
    import lmdb  # an engine that only this data set needs

    root = bench.downloads / "torchvision" / "LSUN"
    wanted = which or "val"
    pattern = f"*_{wanted}_lmdb" if wanted in ("train", "val") else f"{wanted}_lmdb"
    databases = sorted(root.glob(pattern))
    if not databases:
        raise FileNotFoundError(
            f"{root} has no {pattern}; LSUN cannot be fetched from here (no digests are published): unpack "
            "<category>_<split>_lmdb.zip from its site into that folder, or use folder:<path> for LSUN as images"
        )
    bench.credit_to("images", "LSUN", "see its publisher", "Yu et al. 2015, arXiv:1506.03365")
    for database in databases:
        category = database.name.removesuffix("_lmdb").removesuffix("_train").removesuffix("_val")
        label = "" if category == "test" else category
        bench.wants(label)
        opened = lmdb.open(str(database), readonly=True, lock=False, readahead=False, meminit=False)
        with opened as environment, environment.begin() as transaction:
            for key, value in bench.watched(transaction.cursor(), transaction.stat()["entries"]):
                content, image_id = bytes(value), f"{category}_{key.decode('ascii', 'backslashreplace')}"
                bench.put(image_id, content, suffix_of(content), label, "test")
    bench.classes = tuple(sorted(set(bench.rows.column("label")) - {""}))
    _split_rows(bench)


def _split_rows(bench: Workbench) -> None:
    """Give rows that are all test the splits that seed and role ask for."""
    splits = assign_splits(
        {row.image_id: Listed(row.image_id, row.label, "") for row in bench.rows}, bench.seed, bench.role
    )
    bench.rows = RowList(replace(row, split=splits[row.image_id]) for row in bench.rows)


def _three(**more: str) -> dict[str, dict]:
    return {split: {"split": split, **more} for split in ("train", "val", "test")}


def _two(train: str = "train", test: str = "test") -> dict[str, dict]:
    return {"train": {"split": train}, "test": {"split": test}}


SETS: dict[str, Packed | Files] = {
    "CIFAR10": Packed(("train", "test"), _cifar("CIFAR10")),
    "CIFAR100": Packed(("train", "test"), _cifar("CIFAR100")),
    "SVHN": Packed(("train", "test"), _svhn),
    "Country211": Files({"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}}),
    "DTD": Files(_three()),
    "EuroSAT": Files({"": {}}),
    "FGVCAircraft": Files(_three()),
    "Flowers102": Files(_three()),
    "Food101": Files(_two()),
    "GTSRB": Files(_two()),
    "INaturalist": Files({"train": {"version": "2021_train_mini"}, "val": {"version": "2021_valid"}}),
    "Imagenette": Files({"train": {"split": "train"}, "val": {"split": "val"}}),
    "OxfordIIITPet": Files(_two("trainval")),
    "Places365": Files({
        "train": {"split": "train-standard", "small": True},
        "val": {"split": "val", "small": True},
    }),
    "SUN397": Files({"": {}}),
}  # fmt: skip
