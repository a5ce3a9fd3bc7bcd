"""The plots of the report as SVG that takes the colour of the text around it, so that it shows in light and dark alike.

The same input gives the same bytes; identifiers are made from the content, so that two different plots never share one.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from regvit.report.comparisons import Value

INK = "#010203"  # stands for the page's own text colour, which is another in the dark
COLOURS = ("#5b8fd0", "#e0783b", "#2f9e77", "#b968b4", "#a38b1f", "#d65f5f", "#7a78d8", "#4fa3b5")
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # matplotlib's own, with its version and the time
WIDTH, HEIGHT = 4.6, 2.9  # inches
STYLE = {
    "svg.hashsalt": "regvit",  # identifiers from the content instead of from chance
    "svg.fonttype": "none",  # text stays text
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that the layout is the same everywhere; drawn in the page's
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Curve:
    """A figure by block, with its 95 % interval; nan where it is not defined."""

    layers: Sequence[float]
    values: Sequence[float]
    lo: Sequence[float]
    hi: Sequence[float]


def plot_norms(columns: Mapping[str, Sequence[float]]) -> str:
    """Patch norms by block: `layer`, and one line for each other column."""
    figure, axes = _axes("block", "L2 norm of the patches")
    for name in [name for name in columns if name != "layer"]:
        axes.plot(columns["layer"], columns[name], marker=".", label=_plain(name))
    axes.set_yscale("log")
    return _svg(figure, axes, "patch norms by block")


def plot_histogram(columns: Mapping[str, Sequence[float]], threshold: float | None) -> str:
    """Number of patches by log10 norm, before and after; the threshold as a dashed line."""
    figure, axes = _axes("L2 norm in the detection layer", "patches")
    for name in ("before", "after"):
        axes.step(10 ** np.asarray(columns["log10_norm"]), columns[name], where="mid", label=name)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linestyle="--", linewidth=0.8, label="threshold")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    return _svg(figure, axes, "histogram of patch norms")


def plot_scores(columns: Mapping[str, Sequence[float]], most: int = 30) -> str:
    """Attribution of the best neurons by rank, and which of them were selected."""
    figure, axes = _axes("rank of the neuron", "share of the outliers' excess")
    rank, share = (np.asarray(columns[name], dtype=float)[:most] for name in ("rank", "attribution"))
    selected = np.asarray(columns["selected"], dtype=float)[:most] > 0
    for chosen, colour, label in ((selected, COLOURS[1], "selected"), (~selected, COLOURS[0], "others")):
        axes.plot(rank[chosen], share[chosen], "o", color=colour, label=label)
        axes.vlines(rank[chosen], 0, share[chosen], color=colour, linewidth=1)
    axes.axhline(0, color=INK, linewidth=0.6)
    return _svg(figure, axes, "neuron scores")


def plot_layers(curves: Mapping[str, Curve], label: str, log: bool = False) -> str:
    """One figure by block, a line a run with its interval as a band; runs keep their colour, and those without it its place.

    Args:
        curves: by the run's name, in the order of the colours.
        label: of the vertical axis.
        log: whether that is logarithmic.
    """
    figure, axes = _axes("block", label)
    for i, (name, curve) in enumerate(curves.items()):
        values = np.asarray(curve.values, dtype=float)
        if np.isnan(values).all():
            continue
        colour = COLOURS[i % len(COLOURS)]
        axes.fill_between(curve.layers, curve.lo, curve.hi, color=colour, alpha=0.18, linewidth=0)
        width = max(1.2, 3.2 - i)  # the first ones broad, so that a later one on the same path does not hide them
        axes.plot(curve.layers, values, color=colour, linewidth=width, marker=".", label=_plain(name))
    if log:
        axes.set_yscale("log")
    return _svg(figure, axes, f"{label} by block")


def plot_points(rows: Sequence[str], series: Mapping[str, Sequence[Value | None]], label: str, scale: float = 1) -> str:
    """Figures with their 95 % intervals: a row a thing measured, a point a run.

    Args:
        rows: their labels, from the top.
        series: by the run's name, in the order of the colours, one value a row; None where it has none.
        label: of the horizontal axis.
        scale: what values are multiplied by.
    """
    shown = max(1, len(series))
    figure, axes = _axes(label, "", height=0.75 + len(rows) * (0.16 + 0.1 * shown))
    for i, (name, values) in enumerate(series.items()):
        there = [(row, value) for row, value in enumerate(values) if value is not None]
        if not there:
            continue
        y = [row + (i - (shown - 1) / 2) * 0.62 / shown for row, _ in there]
        x = np.array([scale * value.value for _, value in there])
        low, high = (
            np.array([scale * (value.value if end is None else end) for value, end in ends])
            for ends in ([(v, v.lo) for _, v in there], [(v, v.hi) for _, v in there])
        )
        colour = COLOURS[i % len(COLOURS)]
        axes.hlines(y, np.minimum(low, x), np.maximum(high, x), color=colour, linewidth=1.4)
        axes.plot(x, y, "o", color=colour, label=_plain(name))
    axes.set_yticks(range(len(rows)), [_plain(row) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.grid(True, color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    return _svg(figure, axes, label)


def plot_settings(points: Sequence[str], values: Sequence[Value | None], label: str) -> str:
    """One figure at several settings, in their order, with its 95 % intervals where it has some.

    Args:
        points: labels of the settings.
        values: one a setting; None where it was not measured.
        label: what it is, for those who do not see it.
    """
    figure, axes = _axes("", "")
    there = [(x, value) for x, value in enumerate(values) if value is not None]
    for x, value in there:
        if value.lo is not None and value.hi is not None:
            axes.vlines(x, value.lo, value.hi, color=COLOURS[0], linewidth=1.4)
    axes.plot([x for x, _ in there], [value.value for _, value in there], "o-", color=COLOURS[0], linewidth=0.7)
    long = sum(map(len, points)) > 36
    axes.set_xticks(
        range(len(points)), [_plain(p) for p in points], rotation=30 if long else 0, ha="right" if long else "center"
    )
    axes.set_xlim(-0.5, len(points) - 0.5)
    if not any(value.value or value.lo or value.hi for _, value in there):
        axes.set_ylim(0, 1)  # zero everywhere: matplotlib would show room below
    axes.yaxis.grid(True, color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    return _svg(figure, axes, f"{label} by setting")


def plot_places(share: Sequence[float]) -> str:
    """Share of the images in which each place of a square grid is an outlier, row by row."""
    side = round(len(share) ** 0.5)
    figure, axes = _axes("", "")
    with matplotlib.rc_context(STYLE):
        drawn = axes.imshow(
            100 * np.asarray(share, dtype=float).reshape(side, side), cmap="viridis", vmin=0, interpolation="nearest"
        )
        axes.set_axis_off()
        figure.colorbar(drawn, ax=axes, shrink=0.8, label="% of the images")
    return _svg(figure, axes, "places of outliers")


def _plain(text: str) -> str:
    """Kept from matplotlib's formulas, and from its rule that a label with _ first is hidden."""
    return text.replace("$", r"\$").removeprefix("_")


def _axes(x: str, y: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(_plain(x))
        axes.set_ylabel(_plain(y))
    return figure, axes


def _svg(figure: Figure, axes: Axes, alternative: str) -> str:
    """The figure as an element; the legend above the axes, where it hides nothing."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        entries = len(axes.get_legend_handles_labels()[1])
        if entries:
            columns = min(entries, 3)
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns, frameon=False)
        figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    svg = file.getvalue()
    svg = _small(svg[svg.index("<svg") :]).replace(INK, "currentColor")
    label = html.escape(alternative, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _small(svg: str) -> str:
    """Without comments and identifiers that nothing refers to, coordinates to a hundredth of a point."""
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-?0 [^\"]*\"", "", svg)
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    own = hashlib.sha256(svg.encode()).hexdigest()[:6]

    def identifier(match: re.Match) -> str:
        return f' id="{own}{match[1]}"' if match[1] in referred else ""

    def tag(match: re.Match) -> str:
        return re.sub(r"(\d\.\d\d)\d+", r"\1", match[0]) if "base64," not in match[0] else match[0]

    svg = re.sub(r' id="([^"]*)"', identifier, svg)
    svg = re.sub(r"<[^>]+>", tag, svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{own}", svg)
    svg = re.sub(r"(<defs>\s*</defs>)|(?<=[>\d\"z])\s*\n\s*", "", svg)
    while (
        shorter := re.sub(r"<g>((?:(?!</?g\b).)*)</g>", r"\1", svg, flags=re.DOTALL)
    ) != svg:  # groups that say nothing
        svg = shorter
    return svg
