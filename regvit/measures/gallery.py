"""Pictures of what outliers do: patch norms, attention maps and features of the same images in several models.

Shape letters: b image, i row and j column of the patch grid, p patch, q prefix token, d channel.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from regvit.files import write_atomic, write_picture
from regvit.measures.feature_colours import Palette

OUTLIER = "#00c8e0"  # of outlier patches: cyan, which neither `magma` nor `viridis` has


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
    titles = [f"patch norms\n{title}" for title in maps]
    titles += [f"CLS attention\n{title}" for title, each in maps.items() if each.attention is not None]
    figure = Figure(figsize=(1.4 * (1 + len(titles)), 1.56 * len(images) + 0.7), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(titles), squeeze=False)
    for row, (image, line) in enumerate(zip(images, axes, strict=True)):
        norms, outliers = [each.norms[row] for each in maps.values()], untreated.norms[row] > threshold
        ends = normal_range(norms, threshold)
        panels = [({"X": image}, "")]
        for each in norms:
            count = int((each > threshold).sum())
            above = f", {count} outlier{'s' if count > 1 else ''}" if count else ""
            panels.append(
                ({"X": norm_colours(each, *ends, threshold)}, f"{short(ends[0])} to {short(ends[1])}+{above}")
            )
        for each in [each.attention[row] for each in maps.values() if each.attention is not None]:
            note = f"0 to {each.max():.1%}" + (f", {each[outliers].sum():.0%} on outliers" if outliers.any() else "")
            panels.append(({"X": each, "cmap": "viridis", "vmin": 0, "vmax": each.max() or 1.0}, note))
        for axis, (panel, note) in zip(line, panels, strict=True):
            axis.imshow(**panel, interpolation="nearest")
            axis.set_xlabel(note, fontsize=7, labelpad=2)
            axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, title in zip(axes[0], ["image", *titles], strict=True):
        axis.set_title(title, fontsize=9)
    scales = "norms: logarithmic, bright from the 99 % quantile of the patches that are no outliers"
    scales += f"; cyan: outliers, norm over {short(threshold)}" if np.isfinite(threshold) else ""
    scales += (
        ".   attention: each map from 0 to its own maximum"
        if any(m.attention is not None for m in maps.values())
        else ""
    )
    lines = textwrap.wrap(scales, int(17 * figure.get_figwidth()))  # characters of 7 points in an inch
    figure.text(0.005, 0.005, "\n".join(lines), fontsize=7)
    below = (0.1 + 0.13 * len(lines)) / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    write_picture(path, figure, 100)


def draw_attention(
    path: Path, images: Float[np.ndarray, "b h w 3"], columns: Mapping[str, Float[np.ndarray, "b i j"]]
) -> None:
    """Writes a PNG: a row an image; the image, then the maps, each on a scale of its own from 0 to its maximum.

    Args:
        images: values from 0 to 1.
        columns: maps by their title, in the order in which they are drawn.
    Source of the layout: Darcet et al. 2024, arXiv:2309.16588, figure 9.
    """
    width = 1 + len(columns)
    figure = Figure(figsize=(1.25 * width, 1.25 * len(images) + 0.35), layout="constrained")
    axes = figure.subplots(len(images), width, squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image, interpolation="nearest")
        for axis, maps in zip(axes[row, 1:], columns.values(), strict=True):
            axis.imshow(maps[row], cmap="viridis", vmin=0, interpolation="nearest")
        for axis in axes[row]:
            axis.set_axis_off()
    for axis, title in zip(axes[0], ["image", *columns], strict=True):
        axis.set_title(title, fontsize=8)
    write_picture(path, figure, 80)


def draw_heads(
    path: Path, images: Float[np.ndarray, "b h w 3"], maps: Mapping[str, Float[np.ndarray, "b a i j"]]
) -> None:
    """Writes a PNG: of each image a row a query, a column a head (a); each map on a scale of its own from 0 to its maximum.

    Args:
        images: values from 0 to 1.
        maps: by the query's name.
    Source: Caron et al. 2021, arXiv:2104.14294, figure 1.
    """
    heads, lines = next(iter(maps.values())).shape[1], len(images) * len(maps)
    figure = Figure(figsize=(0.7 * (1 + heads) + 0.3, 0.7 * lines + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01)
    axes = figure.subplots(lines, 1 + heads, squeeze=False)
    for line, (image, name) in zip(axes, product(range(len(images)), maps), strict=True):
        line[0].imshow(images[image], interpolation="nearest")
        line[0].text(-0.06, 0.5, name, transform=line[0].transAxes, rotation=90, ha="right", va="center", fontsize=6)
        for axis, attention in zip(line[1:], maps[name][image], strict=True):
            axis.imshow(attention, cmap="viridis", vmin=0, interpolation="nearest")
        for axis in line:
            axis.set_axis_off()
    for axis, title in zip(axes[0], ["image", *map(str, range(heads))], strict=True):
        axis.set_title(title, fontsize=7, pad=2)
    write_picture(path, figure, 80)


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
    attention: Float[np.ndarray, "b i j"], most: Float[np.ndarray, " b"]
) -> Float[np.ndarray, "b i j 3"]:
    """Attention as colours on a scale from 0 to `most`, one a image; what is above is at the bright end."""
    ends = np.where(most > 0, most, 1.0)[:, None, None]
    return matplotlib.colormaps["viridis"](np.clip(attention / ends, 0, 1))[..., :3]


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
            drawn["attention", title] = attention_colours(each.attention, np.max(attended, axis=(0, 2, 3)))
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
