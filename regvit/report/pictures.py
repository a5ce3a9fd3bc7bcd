"""Pictures inside the page: those that stages left, and maps of the same images in two models, cut out of the strips of
`verify`.

A strip is a picture with the tiles of all images side by side, each a square (`measures.verification`).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from regvit.report.study import Study

QUALITIES = (25, 40, 55, 70, 82)
SMALLEST_PICTURE = 6_000  # bytes: below, nothing is to be seen
PHOTO = 224  # pixels a side of an image, at most
ALL_PHOTOS = 200_000  # bytes of them together, in all comparisons
PHOTO_BYTES = (2_000, 9_000)  # of one, at least and at most
MAPS = {"norms": "patch norms", "attention": "CLS attention", "features": "features as colours"}


@dataclass(frozen=True)
class Drawn:
    """A picture as the page needs it: data URI, size in pixels, and what is to be seen, in words."""

    source: str
    width: int
    height: int
    alternative: str


@dataclass(frozen=True)
class Strips:
    """One model of a comparison: its name, and the strips of its maps by a key of `MAPS`."""

    name: str
    maps: Mapping[str, Path]


@dataclass(frozen=True)
class Comparison:
    """Maps of the same images in a model, over those of the model that it is compared with.

    Args:
        images: the strip of the images.
        before: None where there is nothing to compare with; then there is no slider.
        after: always there.
    """

    run: str
    images: Path
    before: Strips | None
    after: Strips

    @property
    def name(self) -> str:
        return self.after.name if self.before is None else f"{self.before.name} → {self.after.name}"

    @property
    def sides(self) -> list[Strips]:
        return [side for side in (self.before, self.after) if side is not None]

    def cards(self, limit: int) -> list[dict]:
        """For each image its photograph and, by kind of map, the map in each model (those kinds that all have).

        Args:
            limit: bytes a photograph.
        """
        kinds = [kind for kind in MAPS if all(kind in side.maps for side in self.sides)]
        strips = {kind: [tiles(side.maps[kind]) for side in self.sides] for kind in kinds}
        cards = []
        for i, photo in enumerate(tiles(self.images)):
            photo.thumbnail((PHOTO, PHOTO), Image.Resampling.LANCZOS)
            maps = {
                MAPS[kind]: [
                    _png(shrunk(strip[i]), f"{MAPS[kind]} of image {i + 1}, {side.name}")
                    for side, strip in zip(self.sides, strips[kind], strict=True)
                ]
                for kind in kinds
            }
            cards.append({"photo": _webp(photo, limit, f"image {i + 1}"), "maps": maps})
        return cards


def comparisons(study: Study) -> list[Comparison]:
    """Of each run: its maps over those of its backbone without registers, over those before planting, or, where the run
    is its backbone as it came, over those of the run that it is held against."""
    found = []
    for run in study.runs:
        images = study.path(run, "verify", "", "images.jpg")
        if not images.is_file():
            continue
        befores = [_strips(study, run, model, label) for model, label in _models_beside(study, run) if model != run]
        befores = [before for before in befores if before.maps]
        other = study.references.get(run)
        if not befores and other and study.path(other, "verify", "", "images.jpg").is_file():
            befores = [_strips(study, other, other, other)]
        found += [Comparison(run, images, before, _strips(study, run, run, run)) for before in befores or [None]]
    return found


def photo_bytes(shown: int, images: int) -> int:
    """Bytes that a photograph may have where so many comparisons of so many images are shown."""
    return min(max(ALL_PHOTOS // max(1, shown * images), PHOTO_BYTES[0]), PHOTO_BYTES[1])


def picture(path: Path, alternative: str, limit: int) -> Drawn:
    """A picture inside the page: WebP of the best quality that fits, smaller if none does.

    Args:
        alternative: what is to be seen, in words.
        limit: bytes, at least 6,000.
    """
    with Image.open(path) as file:
        return _webp(file.convert("RGB"), max(limit, SMALLEST_PICTURE), alternative)


def tiles(strip: Path) -> list[Image.Image]:
    """The tiles of a strip.

    Raises:
        ValueError: its width is no multiple of its height.
    """
    with Image.open(strip) as file:
        image = file.convert("RGB")
    width, side = image.size
    if width % side:
        raise ValueError(f"{strip} is {width} pixels wide and {side} high: no row of squares; run `dvc repro verify`")
    return [image.crop((left, 0, left + side, side)) for left in range(0, width, side)]


def shrunk(tile: Image.Image) -> Image.Image:
    """A map with one pixel a patch; the browser enlarges it again."""
    pixels = np.asarray(tile)
    edges = [np.flatnonzero((np.diff(pixels, axis=axis) != 0).any((1 - axis, 2))) + 1 for axis in (0, 1)]
    block = int(np.gcd.reduce(np.concatenate([*edges, tile.size])))
    return Image.fromarray(np.ascontiguousarray(pixels[::block, ::block]))


def _models_beside(study: Study, run: str) -> Iterator[tuple[str, str]]:
    """(file, name) of the models that `verify` drew beside a run's: called by the run that they are, if one is."""
    backbone = study.runs[run]["backbone"]
    alike = (name for name, each in study.runs.items() if each["backbone"] == backbone and study.untouched(name))
    plain = next(alike, None)
    before = study.references.get(plain or "")
    as_it_came = before is not None and not study.planted(study.runs[before]["backbone"])
    yield "original", plain if plain and plain != run else "without registers"
    yield "intact", before if as_it_came else "before planting"


def _strips(study: Study, run: str, model: str, name: str) -> Strips:
    paths = {kind: study.path(run, "verify", "", f"{kind}-{model}.png") for kind in MAPS}
    return Strips(name, {kind: path for kind, path in paths.items() if path.is_file()})


def _webp(image: Image.Image, limit: int, alternative: str) -> Drawn:
    """The best quality that fits; a smaller picture, shown at the same size, where the worst does not."""

    def encoded(quality: int) -> bytes:
        file = io.BytesIO()
        image.save(file, "WEBP", quality=quality, method=4)
        return file.getvalue()

    width, height = image.size
    while len(found := encoded(QUALITIES[0])) > limit:
        image = image.resize([max(1, round(0.8 * side)) for side in image.size], Image.Resampling.LANCZOS)
    for quality in QUALITIES[1:]:
        better = encoded(quality)
        if len(better) > limit:
            break
        found = better
    return Drawn(f"data:image/webp;base64,{base64.b64encode(found).decode()}", width, height, alternative)


def _png(image: Image.Image, alternative: str) -> Drawn:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return Drawn(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", *image.size, alternative)
