"""The plots of the report: SVG as the source of an image element, in the colours of light or dark, whichever the page is in.

The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from regvit.report.study import Value

INK = "#010203"  # stands for the colour of text, which is another in the dark
SCHEMES = "<style>:root{color:#20242a}@media (prefers-color-scheme:dark){:root{color:#dfe3e8}}</style>"
COLOURS = ("#5b8fd0", "#e0783b", "#2f9e77", "#b968b4", "#a38b1f", "#d65f5f", "#7a78d8", "#4fa3b5")
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # matplotlib's own, with its version and the time
WIDTH, HEIGHT = 4.6, 2.1  # inches: of the figure, and of what is inside the axes
LINE = 0.19  # inches of a line of text
LONGEST = 24  # letters of a row's label: a longer one takes several lines
PLAIN = "{x:g}"  # of the figures at a logarithmic axis
FLOOR = 1e-3  # of the density of norms, a decade: where one patch in 30,000 lies alone in a bin
STYLE = {
    "svg.hashsalt": "regvit",  # identifiers from the content instead of from chance
    "svg.fonttype": "none",  # text stays text
    "font.family": ["DejaVu Sans", "sans-serif"],  # comes with matplotlib, so that the layout is the same everywhere
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
styled = matplotlib.rc_context(STYLE)


@styled
def plot_norms(table: pd.DataFrame) -> str:
    """Patch norms by block: `layer`, and one line for each other column."""
    figure, axes = _axes("block", "L2 norm of the patches")
    for name in table.columns.drop("layer"):
        axes.plot(table["layer"], table[name], marker=".", label=_plain(name))
    _log(axes.yaxis)
    return _source(figure, axes)


@styled
def plot_histogram(table: pd.DataFrame, threshold: float | None) -> str:
    """Number of patches by log10 norm, before and after; the threshold as a dashed line."""
    figure, axes = _axes("L2 norm in the detection layer", "patches")
    for name in ("before", "after"):
        axes.step(10 ** table["log10_norm"], table[name], where="mid", label=name)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linestyle="--", linewidth=0.8, label="threshold")
    _log(axes.xaxis)
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(PLAIN)
    axes.set_ylim(bottom=0)
    return _source(figure, axes)


@styled
def plot_distributions(tables: Mapping[str, pd.DataFrame]) -> str:
    """Patches by norm in the detection layer (the last but one without outliers), in median norms: a row a model, filled as it
    is, and a line with one test-time register (Darcet et al. 2024, figures 3, 4c and 7).

    Heights are the logarithm of the density, from `FLOOR` on, so that a patch in a thousand is seen as well.

    Args:
        tables: by the model's name, in the order of the rows: `log10_norm`, evenly spaced, and patches `before` and `after`.
    """
    figure, axes = _axes("L2 norm / median norm", "", height=0.34 * len(tables))
    for row, table in enumerate(tables.values()):
        width = table["log10_norm"].diff().iloc[-1]
        median = table["log10_norm"][(table["before"].cumsum() >= table["before"].sum() / 2).idxmax()]
        x = 10 ** (table["log10_norm"] - median)
        before, after = (_log_density(table[name], width) for name in ("before", "after"))
        axes.fill_between(x, row, row - before, step="mid", color=COLOURS[0], alpha=0.45, linewidth=0)
        axes.step(x, row - before, where="mid", color=COLOURS[0], linewidth=0.8)
        if not np.array_equal(before, after):
            axes.step(x, row - after, where="mid", color=COLOURS[1], linewidth=0.8)
    for colour, label in zip(COLOURS, ("as it is", "with one test-time register"), strict=False):
        axes.plot([], color=colour, label=label)
    _log(axes.xaxis)
    _rows(axes, list(tables))
    axes.set_ylim(len(tables) - 0.9, -1)
    return _source(figure, axes)


def _log_density(counts: pd.Series, width: float) -> np.ndarray:
    """Patches in a decade of norms as a share of all, its logarithm from `FLOOR` (0) to ten times all (0.9)."""
    density = (counts / counts.sum() / width).to_numpy(float).clip(FLOOR, 10)
    return 0.9 * np.log10(density / FLOOR) / np.log10(10 / FLOOR)


@styled
def plot_scores(table: pd.DataFrame, most: int = 30) -> str:
    """Attribution of the best neurons by rank, and which of them were selected."""
    figure, axes = _axes("rank of the neuron", "share of the outliers' excess")
    table = table.head(most)
    for chosen, colour, label in ((1, COLOURS[1], "selected"), (0, COLOURS[0], "others")):
        kind = table[table["selected"].astype(int) == chosen]
        axes.plot(kind["rank"], kind["attribution"], "o", color=colour, label=label)
        axes.vlines(kind["rank"], 0, kind["attribution"], color=colour, linewidth=1)
    axes.axhline(0, color=INK, linewidth=0.6)
    return _source(figure, axes)


@styled
def plot_layers(curves: Mapping[str, pd.DataFrame], column: str, label: str, log: bool = False) -> str:
    """One figure by block, a line a run with its interval as a band; runs keep their colour, and those without it its place.

    Args:
        curves: by the run's name, in the order of the colours: `layer`, the column, and `<column>_lo`, `<column>_hi`.
        label: of the vertical axis.
        log: whether that is logarithmic.
    """
    figure, axes = _axes("block", label)
    for i, (name, table) in enumerate(curves.items()):
        if column not in table or table[column].isna().all():
            continue
        colour = COLOURS[i % len(COLOURS)]
        if f"{column}_lo" in table:
            ends = (table[f"{column}_lo"], table[f"{column}_hi"])
            axes.fill_between(table["layer"], *ends, color=colour, alpha=0.18, linewidth=0)
        width = max(1.2, 3.2 - i)  # the first ones broad, so that a later one on the same path does not hide them
        axes.plot(table["layer"], table[column], color=colour, linewidth=width, marker=".", label=_plain(name))
    if log:
        _log(axes.yaxis)
    return _source(figure, axes)


@styled
def plot_points(rows: Sequence[str], series: Mapping[str, Sequence[Value | None]], label: str, scale: float = 1) -> str:
    """Figures with their 95 % intervals: a row a thing measured, a point a run.

    Args:
        rows: their labels, from the top.
        series: by the run's name, in the order of the colours, one value a row; None where it has none.
        label: of the horizontal axis.
        scale: what values are multiplied by.
    """
    shown = max(1, len(series))
    figure, axes = _axes(label, "", height=0.1 + len(rows) * (0.16 + 0.1 * shown))
    for i, (name, values) in enumerate(series.items()):
        known = [(row, value) for row, value in enumerate(values) if value is not None]
        if not known:
            continue
        y = [row + (i - (shown - 1) / 2) * 0.62 / shown for row, _ in known]
        ends = [[v if end is None else end for end in (lo, hi)] for _, (v, lo, hi, _) in known]
        low, high = scale * np.array(ends, dtype=float).T
        colour = COLOURS[i % len(COLOURS)]
        axes.hlines(y, low, high, color=colour, linewidth=1.4)
        axes.plot([scale * value.value for _, value in known], y, "o", color=colour, label=_plain(name))
    _rows(axes, rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    return _source(figure, axes)


@styled
def plot_places(share: Sequence[float]) -> str:
    """Share of the images in which each place of a square grid is an outlier, row by row."""
    side = round(len(share) ** 0.5)
    figure, axes = _axes("", "", height=2.4)
    grid = 100 * np.asarray(share, dtype=float).reshape(side, side)
    drawn = axes.imshow(grid, cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_axis_off()
    figure.colorbar(drawn, cax=axes.inset_axes((1.06, 0.1, 0.06, 0.8)), label="% of the images")
    return _source(figure, axes)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """One row a label, from the top."""
    axes.set_yticks(range(len(labels)), [textwrap.fill(_plain(label), LONGEST) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.grid(True, color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)


def _log(axis: Axis) -> None:
    """A logarithmic axis for what is drawn: plain figures at the decades, and in between where these are few."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    least, most = axis.get_view_interval()
    if most > 300 * least:
        axis.set_major_locator(LogLocator())
    elif most > 4 * least:
        decades = 10.0 ** np.arange(np.floor(np.log10(least)), np.log10(most))
        axis.set_major_locator(FixedLocator(np.outer(decades, (1, 2, 5)).ravel()))
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


def _plain(text: str) -> str:
    """Kept from matplotlib's formulas, and from its rule that a label with _ first is hidden."""
    return text.replace("$", r"\$").removeprefix("_")


def _axes(x: str, y: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_subplot()
    axes.set_xlabel(_plain(x))
    axes.set_ylabel(_plain(y))
    return figure, axes


def _source(figure: Figure, axes: Axes) -> str:
    """The figure as a data URI; the legend above the axes, where it hides nothing.

    Room is made for what is written: a layout engine of matplotlib would draw all of it several times to measure it.
    """
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, int(WIDTH / (0.5 + _width(labels))))
    below, inside, above = (
        0.45 if axes.axison else 0.05,
        figure.get_figheight(),
        0.08 + LINE * -(-len(labels) // columns),
    )
    height = below + inside + above
    figure.set_figheight(height)
    figure.subplots_adjust(bottom=below / height, top=1 - above / height)  # on which it depends what ticks there are
    ticks = _width(tick.get_text() for tick in axes.get_yticklabels())
    figure.subplots_adjust(left=(0.12 + LINE * bool(axes.get_ylabel()) + ticks) / WIDTH, right=1 - 0.15 / WIDTH)
    if labels:
        figure.legend(
            handles, labels, loc="upper left", ncols=columns, frameon=False, borderaxespad=0, columnspacing=1.2
        )
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    svg = file.getvalue().replace(INK, "currentColor").replace("<defs>", f"{SCHEMES}<defs>", 1)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _width(texts: Iterable[str]) -> float:
    """Inches of the longest line of the texts."""
    font, lines = FontProperties(size=STYLE["font.size"]), [line for text in texts for line in text.split("\n")]
    return max((text_to_path.get_text_width_height_descent(line, font, False)[0] / 72 for line in lines), default=0)
