"""One HTML page about the runs: tables, self-checks and plots, with nothing to load, in light and dark.

The bytes depend on the metrics alone: no date, no random identifier, no version.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .compare import Check, Measured, Table

INK = "#010203"  # stands for the page's own text colour, which is another in the dark
COLOURS = ("#3b82c4", "#e07b39", "#3a9d6e", "#b85fa8", "#9a8a2c", "#d05555", "#6f6fd0", "#5a9aa8")
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # matplotlib's own, with its version and the time
STYLE = {
    "svg.hashsalt": "regvit",  # identifiers from the content instead of from chance
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{--ink: #1c1e21; --page: #ffffff; --line: #d8dbe0; --pass: #1d7a4c; --fail: #b3261e}}
@media (prefers-color-scheme: dark) {{
  :root {{--ink: #e4e6ea; --page: #16181c; --line: #3a3e46; --pass: #6fcf9b; --fail: #ff8a80}}
}}
body {{margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif}}
h1 {{font-size: 1.5rem}} h2 {{font-size: 1.15rem; margin-top: 2rem}}
.wide {{overflow-x: auto}}
table {{border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums}}
th, td {{padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap}}
.plots {{display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem}}
figure {{margin: 0}} figcaption {{font-size: .875rem}} svg, img {{max-width: 100%; height: auto}}
.pass {{color: var(--pass)}} .fail {{color: var(--fail); font-weight: bold}}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """The page.

    Args:
        title: plain text.
        sections: heading as plain text, and content as HTML (of the functions below).
    """
    body = "\n".join(f"<section>\n<h2>{html.escape(name)}</h2>\n{content}\n</section>" for name, content in sections)
    return PAGE.format(title=html.escape(title), body=body)


def table(content: Table) -> str:
    """A table as HTML; its title is left to the section's heading."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in content.header)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in content.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def check_list(checks: Sequence[Check]) -> str:
    """The self-checks as HTML, or a sentence that there are none."""
    if not checks:
        return "<p>No run is on a planted backbone, so there is no ground truth to check against.</p>"
    items = (f'<li class="{"pass" if c.passed else "fail"}">{html.escape(c.text())}</li>' for c in checks)
    return "<ul>\n" + "\n".join(items) + "\n</ul>"


def figures(content: Sequence[tuple[str, str]]) -> str:
    """Figures side by side: (caption as plain text, SVG or img element)."""
    each = (f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>" for caption, image in content)
    return '<div class="plots">\n' + "\n".join(each) + "\n</div>"


def picture(path: Path, alternative: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alternative, quote=True)}">'


def plot_norms(columns: Mapping[str, Sequence[float]]) -> str:
    """Patch norms by layer: `layer`, and one line for each other column."""
    figure, axes = _axes("block", "L2 norm of the patches")
    for name in [name for name in columns if name != "layer"]:
        axes.plot(columns["layer"], columns[name], marker=".", label=_plain(name))
    axes.set_yscale("log")
    return _svg(figure, axes, "patch norms by layer")


def plot_histogram(columns: Mapping[str, Sequence[float]], threshold: float | None) -> str:
    """Number of patches by log10 norm, before and after; the threshold as a dashed line."""
    figure, axes = _axes("L2 norm in the detection layer", "patches")
    for name in ("before", "after"):
        axes.step(10 ** np.asarray(columns["log10_norm"]), columns[name], where="mid", label=name)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linestyle="--", linewidth=1, label="threshold")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    return _svg(figure, axes, "histogram of patch norms")


def plot_scores(columns: Mapping[str, Sequence[float]], most: int = 30) -> str:
    """Attribution of the best neurons by rank; filled where a neuron was selected."""
    figure, axes = _axes("rank of the neuron", "share of the outliers' excess")
    rank, share = (np.asarray(columns[name], dtype=float)[:most] for name in ("rank", "attribution"))
    selected = np.asarray(columns["selected"], dtype=float)[:most] > 0
    axes.bar(rank[selected], share[selected], color=COLOURS[1], label="selected")
    axes.bar(rank[~selected], share[~selected], color=COLOURS[0], label="others")
    return _svg(figure, axes, "neuron scores")


def plot_accuracy(runs: Sequence[Measured], in_distribution: str, ood: Sequence[str], readout: str = "cls") -> str:
    """Top-1 of each run on the ID and every OOD set, with its 95 % interval."""
    runs = [run for run in runs if readout in run.evaluate]
    names = [in_distribution, *ood]
    figure, axes = _axes("", "top-1, %")
    width = 0.8 / max(1, len(runs))
    for i, run in enumerate(runs):
        values = [run.evaluate[readout]["id"], *(run.evaluate[readout]["ood"][name] for name in ood)]
        top1, low, high = (100 * np.array([v[key] for v in values]) for key in ("top1", "top1_lo", "top1_hi"))
        error = np.maximum(0, [top1 - low, high - top1])
        x = np.arange(len(names)) + (i - (len(runs) - 1) / 2) * width
        axes.bar(x, top1, 0.9 * width, yerr=error, label=_plain(run.name), error_kw={"ecolor": INK, "linewidth": 1})
    axes.set_xticks(range(len(names)), [_plain(name) for name in names])
    return _svg(figure, axes, "accuracy by data set")


def _plain(text: str) -> str:
    """Kept from matplotlib's formulas, and from its rule that a label with _ first is hidden."""
    return text.replace("$", r"\$").removeprefix("_")


def _axes(x: str, y: str):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    return figure, axes


def _svg(figure: Figure, axes, alternative: str) -> str:
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
        figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    label = html.escape(alternative, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
