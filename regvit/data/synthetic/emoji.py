"""Emoji as a classification task: one identity (a Unicode sequence) drawn in several styles, labelled by its group.

The same identity drawn by another designer is a natural distribution shift with the same classes: Twemoji (flat
colour), OpenMoji (outlined colour), OpenMoji's line layer alone, and Noto Emoji (a black-and-white font).
"""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
import resvg_py
from fontTools.pens.svgPathPen import SVGPathPen
from fontTools.ttLib import TTFont
from PIL import Image

# Unicode's groups less flags, components, and people (the last two vary by skin tone and hair rather than in kind).
GROUPS = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
LINE_LAYERS = ("line", "line-supplement")
SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Identity:
    """One emoji, whatever its drawing.

    Attributes:
        key: its code points as lower-case hex without leading zeros or variation selectors, joined by "-".
        group: Unicode group, such as "Food & Drink".
        subgroup: Unicode subgroup, such as "food-fruit".
    """

    key: str
    group: str
    subgroup: str


def canonical(name: str) -> str:
    """The key of an emoji from any project's spelling of its code points.

    Twemoji writes `a9` or `1f3f3-fe0f-200d-1f308`, OpenMoji `00A9`, Unicode `00A9-FE0F`. The variation selector FE0F
    says only "as a picture" and is dropped.
    """
    return "-".join(part.lstrip("0") for part in name.lower().split("-") if part != "fe0f")


def codepoints(key: str) -> tuple[int, ...]:
    """The Unicode sequence of a key."""
    return tuple(int(part, 16) for part in key.split("-"))


def by_key(members: Iterable[str], folder: str, suffix: str) -> dict[str, str]:
    """Key -> file name, for the files directly in `folder` (with its final slash) that end in `suffix`."""
    names = (name for name in members if name.startswith(folder) and name.endswith(suffix))
    return {canonical(name[len(folder) : -len(suffix)]): name for name in names if "/" not in name[len(folder) :]}


def identities(emoji_json: bytes, groups: Iterable[str] = GROUPS) -> tuple[Identity, ...]:
    """The emoji of the given groups, sorted by key; skin-tone variants are no identities of their own.

    Args:
        emoji_json: emoji-data's table, a JSON list of objects with `unified`, `category`, `subcategory`.
    """
    groups = set(groups)
    found = (Identity(canonical(e["unified"]), e["category"], e["subcategory"]) for e in json.loads(emoji_json))
    return tuple(sorted((one for one in found if one.group in groups), key=lambda one: one.key))


def line_art(svg: str) -> str:
    """An OpenMoji drawing with every layer but its lines hidden.

    Raises:
        ValueError: there is no layer of lines.
    """
    root = ElementTree.fromstring(svg)
    layers = {layer.get("id"): layer for layer in root}
    if not any(name in layers for name in LINE_LAYERS):
        raise ValueError(f"no line layer among {sorted(map(str, layers))}; expected one of {', '.join(LINE_LAYERS)}")
    for name, layer in layers.items():
        if name not in LINE_LAYERS:
            layer.set("display", "none")
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")


def render_svg(svg: str, size: int) -> Image.Image:
    """An SVG drawn on white, (size, size) pixels, RGB. System fonts are not used, so any machine draws the same."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def decode_rgba(png: bytes) -> Image.Image:
    """A bitmap emoji with its transparency, at its own size."""
    return Image.open(io.BytesIO(png)).convert("RGBA")


def is_blank(image: Image.Image) -> bool:
    """Whether every pixel has the same colour."""
    return all(low == high for low, high in np.atleast_2d(image.getextrema()))


class EmojiFont:
    """A monochrome emoji font as a source of SVGs, at weight 400 (regular) of a variable font.

    Outlines are read with fontTools and drawn by the same renderer as the other styles. Sequences are looked up among
    the font's ligatures (GSUB type 4), which is how emoji fonts hold them.
    """

    def __init__(self, content: bytes):
        self._font = TTFont(io.BytesIO(content))
        self._cmap = self._font.getBestCmap()
        self._glyphs = self._font.getGlyphSet(location={"wght": 400} if "fvar" in self._font else None)
        self._ligatures = dict(_ligatures(self._font))

    def glyph(self, codepoints: tuple[int, ...]) -> str | None:
        """Name of the one glyph that draws a sequence, or None where the font has none."""
        names = tuple(self._cmap.get(point) for point in codepoints)
        return names[0] if len(names) == 1 else self._ligatures.get(names)

    def svg(self, codepoints: tuple[int, ...]) -> str | None:
        """The drawing of a sequence, black in a square as wide as the glyph's advance; None where the font has none."""
        name = self.glyph(codepoints)
        if name is None:
            return None
        pen = SVGPathPen(self._glyphs)
        self._glyphs[name].draw(pen)
        middle = (self._font["hhea"].ascent + self._font["hhea"].descent) / 2  # of the line, font units above baseline
        side = max(self._glyphs[name].width, self._font["hhea"].ascent - self._font["hhea"].descent)
        left, top = (self._glyphs[name].width - side) / 2, -middle - side / 2
        return (
            f'<svg xmlns="{SVG}" viewBox="{left:g} {top:g} {side:g} {side:g}">'
            f'<path transform="scale(1 -1)" d="{pen.getCommands()}"/></svg>'
        )


def _ligatures(font: TTFont) -> Iterable[tuple[tuple[str, ...], str]]:
    """(glyph sequence, its ligature) for every ligature substitution of a font."""
    if "GSUB" not in font:
        return
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)  # type 7 wraps another type
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    yield (first, *ligature.Component), ligature.LigGlyph
