"""Sliders of the report: maps of the same images in two models, one over the other, cut out of the strips of `verify`.

A strip is a picture with the tiles of all images side by side, each a square (`verification.draw_verification`).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from regvit.report.page import encode, toggle

PHOTO = 224  # pixels a side of an image, at most
ALL_PHOTOS = 200_000  # bytes of them together, in all panes
PHOTO_BYTES = (2_000, 9_000)  # of one, at least and at most
WHAT = {"norms": "patch norms", "attention": "CLS attention", "features": "features as colours"}


@dataclass(frozen=True)
class Side:
    """One model of a comparison.

    Args:
        name: as it is shown.
        strips: of its maps, by a key of `WHAT`.
    """

    name: str
    strips: Mapping[str, Path]


@dataclass(frozen=True)
class Comparison:
    """Maps of the same images in a model, over those of the model that it is compared with.

    Args:
        images: the strip of the images.
        before: None where there is nothing to compare with; then there is no slider.
        after: always there.
    """

    images: Path
    before: Side | None
    after: Side

    @property
    def name(self) -> str:
        return self.after.name if self.before is None else f"{self.before.name} → {self.after.name}"

    @property
    def what(self) -> list[str]:
        """The kinds of map that both sides have."""
        sides = [side for side in (self.before, self.after) if side is not None]
        return [what for what in WHAT if all(what in side.strips for side in sides)]


def sliders(key: str, comparisons: Sequence[Comparison], chosen: int = 0) -> str:
    """The comparisons, one at a time; each has one slider, which moves all its maps, as does the mouse on any of them.

    Args:
        key: identifier, once a page.
        chosen: index of the one that is shown first.
    """
    panes = [(each.name, _sheet(each, len(comparisons))) for each in comparisons]
    return toggle(key, "what is compared", panes, chosen)


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


def _sheet(of: Comparison, count: int) -> str:
    """The slider and a card an image."""
    photos = tiles(of.images)
    limit = min(max(ALL_PHOTOS // (count * len(photos)), PHOTO_BYTES[0]), PHOTO_BYTES[1])
    sides = [side for side in (of.before, of.after) if side is not None]
    maps = {what: [[shrunk(tile) for tile in tiles(side.strips[what])] for side in sides] for what in of.what}
    cards = []
    for i, photo in enumerate(photos):
        photo.thumbnail((PHOTO, PHOTO), Image.Resampling.LANCZOS)
        source = f"data:image/webp;base64,{base64.b64encode(encode(photo, limit)).decode()}"
        parts = [f"<div>{_image(source, photo.size, f'image {i + 1}', 'photo')}image</div>"]
        for what, by_side in maps.items():
            drawn = "".join(
                _image(_png(strip[i]), strip[i].size, f"{WHAT[what]} of image {i + 1}, {side.name}")
                for side, strip in zip(sides, by_side, strict=True)
            )
            parts.append(f'<div><div class="{"wipe" if len(sides) > 1 else "map"}">{drawn}</div>{WHAT[what]}</div>')
        cards.append(f'<figure class="card">{"".join(parts)}</figure>')
    slide = ""
    if of.before is not None:
        before, after = (html.escape(side.name) for side in sides)
        label = html.escape(f"how far {of.before.name} covers {of.after.name}", quote=True)
        slide = (
            f'<label class="slide">{before}<input type="range" min="0" max="100" value="50" aria-label="{label}">'
            f"{after}</label>"
        )
    region = 'class="cards" tabindex="0" role="region" aria-label="images"'
    return f'<div class="sheet">{slide}<div {region}>\n' + "\n".join(cards) + "\n</div></div>"


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _image(source: str, size: tuple[int, int], alternative: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    alternative = html.escape(alternative, quote=True)
    return f'<img{named} src="{source}" width="{size[0]}" height="{size[1]}" alt="{alternative}">'
