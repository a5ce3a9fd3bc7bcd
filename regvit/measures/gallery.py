"""Pictures of what outliers do: patch norms, attention maps and features of the same images in several models.

Shape letters: b image, i row and j column of the patch grid, p patch, q prefix token, d channel.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont

from regvit.files import write_atomic
from regvit.measures.feature_colours import Palette

OUTLIER = "#00c8e0"  # of outlier patches: cyan, which neither `magma` nor `viridis` has
FONT, LINE = 10, 14  # of what is written: size, and from line to line, pixels


@dataclass(frozen=True)
class Maps:
    """Of each patch: L2 norm in one block's output, CLS attention (mean over heads and blocks; None where there is no CLS
    token), and the last layer's token."""

    norms: Float[np.ndarray, "b i j"]
    attention: Float[np.ndarray, "b i j"] | None
    features: Float[np.ndarray, "b i j d"]


def draw_maps(path: Path, images: Float[np.ndarray, "b h w 3"], maps: Mapping[str, Maps], threshold: float) -> None:
    """Writes a PNG: a row an image; the image, then norms and attention of each model. Under each map stand the ends of
    its scale: norms are on one scale an image, outliers in a colour of their own; attention goes from 0 to the map's
    own maximum, with the share on the outliers of the untreated model, so that it shows where CLS looks.

    Args:
        images: values from 0 to 1.
        maps: by the title of the model, in the order of the columns; the untreated model is the one called `original`,
            or else the last.
        threshold: norm over which a patch is an outlier.
    """
    untreated = maps.get("original", list(maps.values())[-1])
    attended = {title: each.attention for title, each in maps.items() if each.attention is not None}
    titles = ["image", *(f"patch norms\n{title}" for title in maps), *(f"CLS attention\n{title}" for title in attended)]
    tiles, notes = [], []
    for row, image in enumerate(images):
        norms, outliers = [each.norms[row] for each in maps.values()], untreated.norms[row] > threshold
        ends = normal_range(norms, threshold)
        tiles.append([image, *(norm_colours(each, *ends, threshold) for each in norms)])
        notes.append([""])
        for each in norms:
            count = int((each > threshold).sum())
            above = f", {count} outlier{'s' if count > 1 else ''}" if count else ""
            notes[row].append(f"{short(ends[0])} to {short(ends[1])}+{above}")
        for each in attended.values():
            on = f", {each[row][outliers].sum():.0%} on outliers" if outliers.any() else ""
            notes[row].append(f"0 to {each[row].max():.1%}{on}")
            tiles[row].append(attention_colours(each[row], each[row].max()))
    scales = "norms: logarithmic, bright from the 99 % quantile of the patches that are no outliers"
    scales += f"; cyan: outliers, norm over {short(threshold)}" if np.isfinite(threshold) else ""
    scales += ".   attention: each map from 0 to its own maximum" if attended else ""
    draw_sheet(path, titles, tiles, 140, notes, below=scales)


def draw_attention(
    path: Path, images: Float[np.ndarray, "b h w 3"], columns: Mapping[str, Float[np.ndarray, "b i j"]]
) -> None:
    """Writes a PNG: a row an image; the image, then the maps, each on a scale of its own from 0 to its maximum.

    Args:
        images: values from 0 to 1.
        columns: maps by their title, in the order in which they are drawn.
    Source of the layout: Darcet et al. 2024, arXiv:2309.16588, figure 9.
    """
    drawn = [attention_colours(maps, maps.max((1, 2), keepdims=True)) for maps in columns.values()]
    draw_sheet(path, ["image", *columns], list(zip(images, *drawn, strict=True)), 96)


def draw_heads(
    path: Path, images: Float[np.ndarray, "b h w 3"], maps: Mapping[str, Float[np.ndarray, "b a i j"]]
) -> None:
    """Writes a PNG: of each image a row a query, a column a head (a); each map on a scale of its own from 0 to its maximum.

    Args:
        images: values from 0 to 1.
        maps: by the query's name.
    Source: Caron et al. 2021, arXiv:2104.14294, figure 1.
    """
    drawn = {name: attention_colours(each, each.max((2, 3), keepdims=True)) for name, each in maps.items()}
    rows = [[image, *drawn[name][i]] for i, image in enumerate(images) for name in maps]
    titles = ["image", *map(str, range(len(rows[0]) - 1))]
    draw_sheet(path, titles, rows, 54, names=[*maps] * len(images), gap=2)


def draw_sheet(
    path: Path,
    titles: Sequence[str],
    rows: Sequence[Sequence[Float[np.ndarray, "h w 3"]]],
    side: int,
    notes: Sequence[Sequence[str]] = (),
    names: Sequence[str] = (),
    below: str = "",
    gap: int = 8,
) -> None:
    """Writes a PNG: rows of tiles, in columns that are as wide as what is written over and under them.

    Args:
        titles: over the columns.
        rows: tiles of any size, values from 0 to 1.
        side: of a tile as drawn; `gap` between tiles: pixels.
        notes: one under each tile; names: one left of each row; below: under all.
    """
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", FONT)
    written = [line for text in chain(titles, *notes) for line in text.split("\n")]
    wide = max(side, *(math.ceil(font.getlength(line)) for line in written)) + gap
    high = side + gap + (LINE if notes else 0)
    left = 4 + max((math.ceil(font.getlength(name)) + 6 for name in names), default=0)
    top = 4 + LINE * (1 + max(title.count("\n") for title in titles))
    width, height = left + wide * len(titles), top + high * len(rows)
    lines = textwrap.wrap(below, int((width - 8) / font.getlength("n")))
    sheet = Image.new("RGB", (width, height + LINE * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    centres = [left + wide * column + (wide - gap) // 2 for column in range(len(titles))]
    for centre, title in zip(centres, titles, strict=True):
        pen.text((centre, top - 4), title, "black", font, anchor="md", align="center")
    for row, tiles in enumerate(rows):
        y = top + high * row
        if names:
            pen.text((4, y + side // 2), names[row], "black", font, anchor="lm")
        for centre, tile in zip(centres, tiles, strict=True):
            small = Image.fromarray(np.rint(255 * tile).astype(np.uint8))
            sheet.paste(small.resize((side, side), Image.Resampling.BOX), (centre - side // 2, y))
        for centre, note in zip(centres, notes[row] if notes else (), strict=False):
            pen.text((centre, y + side + 2), note, "black", font, anchor="ma")
    pen.text((4, height), "\n".join(lines), "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(path) as beside:
        sheet.save(beside)


def normal_range(norms: Iterable[Float[np.ndarray, "*p"]], threshold: float) -> tuple[float, float]:
    """The smallest norm and the 99 % quantile of the patches that are no outliers in any of the maps, so that one patch
    half way to an outlier does not darken all others; the threshold twice where all are outliers."""
    flat = np.concatenate([np.ravel(each) for each in norms])
    normal = flat[flat <= threshold]
    return (float(normal.min()), float(np.quantile(normal, 0.99))) if normal.size else (threshold, threshold)


def norm_colours(
    norms: Float[np.ndarray, "*b i j"], least: float, most: float, threshold: float
) -> Float[np.ndarray, "*b i j 3"]:
    """Norms as colours on a logarithmic scale, outliers in a colour of their own: these are so far above all others
    that a scale with room for both would show no relief.

    Args:
        least, most: norms at the dark and at the bright end, see `normal_range`.
        threshold: norm over which a patch is an outlier.
    """
    least = max(least, float(np.finfo(np.float32).tiny))
    ratio = max(most / least, 1.001)
    scaled = np.log(np.maximum(norms, least) / least) / np.log(ratio)
    colours = matplotlib.colormaps["magma"](np.clip(scaled, 0, 1))[..., :3]
    colours[norms > threshold] = to_rgb(OUTLIER)
    return colours


def short(norm: float) -> str:
    """A norm for a caption: three digits at least, and never an exponent of ten where a phone shows it."""
    return f"{norm:.3g}" if norm < 1000 else f"{norm:.0f}"


def attention_colours(
    attention: Float[np.ndarray, "*b i j"], most: Float[np.ndarray, "*b 1 1"]
) -> Float[np.ndarray, "*b i j 3"]:
    """Attention as colours on a scale from 0 to `most`, one an image; what is above is at the bright end."""
    return matplotlib.colormaps["viridis"](np.clip(attention / np.where(most > 0, most, 1.0), 0, 1))[..., :3]


def tile_colours(
    maps: Mapping[str, Maps], palette: Palette, outliers: Bool[np.ndarray, "b i j"], threshold: float
) -> dict[tuple[str, str], Float[np.ndarray, "b i j 3"]]:
    """What is shown of each model, by (`norms`, `attention` or `features`, model): one scale for all models.

    The scales end where the patches that are no outliers end, that of attention for each image: they are what one wants
    to see. Outliers have a colour of their own on the maps of norms.

    Args:
        maps: by the model's title.
        outliers: patches of the untreated model.
        threshold: norm over which a patch is an outlier.
    """
    ends = normal_range((each.norms for each in maps.values()), threshold)
    attended = [np.where(outliers, 0, each.attention) for each in maps.values() if each.attention is not None]
    drawn = {}
    for title, each in maps.items():
        drawn["norms", title] = norm_colours(each.norms, *ends, threshold)
        if each.attention is not None:
            drawn["attention", title] = attention_colours(
                each.attention, np.max(attended, axis=(0, 2, 3))[:, None, None]
            )
        drawn["features", title] = palette.paint(each.features)
    return drawn


def save_strip(path: Path, tiles: Float[np.ndarray, "b h w 3"], enlarged: int = 1) -> None:
    """Writes tiles side by side: PNG, or JPEG where the name says so.

    Args:
        tiles: values from 0 to 1.
        enlarged: pixels a side that each value becomes.
    """
    row = np.concatenate(list(tiles), axis=1).repeat(enlarged, 0).repeat(enlarged, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(path) as beside:
        Image.fromarray(np.rint(255 * row).astype(np.uint8)).save(beside, quality=88, optimize=True)
