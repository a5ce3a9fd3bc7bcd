"""Cures beside each other: a row a run of a backbone, a column a figure, each held against the untreated model and against
test-time registers on the same images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from regvit.measures.evaluation import paired_differences
from regvit.measures.forward_cost import Cost
from regvit.probing.predictions import Predictions
from regvit.report.catalogue import METRICS, Metric
from regvit.report.comparison import sinks_table
from regvit.report.differences import COLUMNS, image_differences
from regvit.report.plots import COLOURS, STYLE
from regvit.report.results import Place, Results
from regvit.report.study import ANOMALIES, OOD, Study
from regvit.report.tables import NONE, Cell, Table, show, show_change

READOUTS = ("cls", "patch_mean")
MEASURED = {  # columns of the second table
    "attention": ("entropy", "morans_i"),
    "discover": ("corloc_mean",),
    "segment": ("pixel_accuracy_at_outliers",),
    "depth": ("rmse_at_outliers",),
}
DRAWN = (
    "outlier_fraction",
    "cls_cosine",
    "outlier_patch_cosine",
    "cls_attention_on_outliers",
    "corloc_mean",
    "rmse_at_outliers",
)
NAMES = {"corloc_mean": "CorLoc, %", "pixel_accuracy_at_outliers": "pixel accuracy at outliers, %"}
NAMES |= {"rmse_at_outliers": "depth RMSE at outliers, m", "entropy": "entropy of CLS attention, nats"}


class Rows(NamedTuple):
    """The runs of a backbone that are compared, and the two that all are held against."""

    runs: list[str]
    original: str
    registers: str | None


def rows_of(study: Study) -> list[Rows]:
    """One for each backbone that has a cured run and an untreated one; the first run with plain registers is `registers`."""
    found = []
    for backbone in dict.fromkeys(run["backbone"] for name, run in study.runs.items() if study.cure(name)):
        runs = [name for name, run in study.runs.items() if run["backbone"] == backbone]
        plain = [name for name in runs if not study.cure(name) and study.neurons(name) == "selected"]
        originals = [name for name in plain if study.untouched(name)]
        registers = [name for name in plain if study.runs[name]["registers"] == "test_time"]
        if originals:
            found.append(Rows(runs, originals[0], registers[0] if registers else None))
    return found


def cure_differences(study: Study, rows: Rows, predictions: Mapping[str, Predictions], resamples: int) -> pd.DataFrame:
    """Every run of the rows minus the untreated one and minus the one with registers, as a table of `compare`."""
    tables = [pd.DataFrame(columns=list(COLUMNS))]
    for run in rows.runs:
        for other in (rows.original, rows.registers):
            if other is None or run == other:
                continue
            tables.append(pd.DataFrame(list(image_differences(study, run, other)), columns=list(COLUMNS)))
            a, b = predictions[run], predictions[other]
            for readout in READOUTS:
                if readout in a.readouts and readout in b.readouts:
                    tables.append(
                        paired_differences(a, readout, b, readout, resamples, study.seed).assign(stage="evaluate")
                    )
    filled = [table for table in tables if not table.empty]
    return pd.concat(filled, ignore_index=True) if filled else tables[0]


def columns_of(results: Results) -> dict[str, list[Place]]:
    """The columns by table, as far as some run has them."""
    study, home = results.study, results.study.in_distribution
    names = ("outlier_fraction", "cls_cosine", "patch_cosine", "outlier_patch_cosine", "cls_attention_on_outliers")
    maps = [
        Place(stage, name, of) for stage, names in MEASURED.items() for name in names for of in study.measured[stage]
    ]
    top1 = [results.top1(readout, dataset) for dataset in (home, OOD) for readout in READOUTS]
    auroc = [results.anomaly("auroc", ANOMALIES, readout) for readout in READOUTS]
    tables = {
        "Tokens": [Place("verify", name, home) for name in names],
        "Maps": maps,
        "Readouts": [*top1, *auroc],
    }
    had = {place for _, place in results.figures}
    return {title: [place for place in places if place in had] for title, places in tables.items()}


def cure_tables(results: Results, rows: Rows, costs: Mapping[str, Cost]) -> Iterator[Table]:
    """The tables of a backbone: figures marked against the untreated model, differences to test-time registers, why there
    are sinks, cost."""
    against = f"▲ better, ▼ worse than {rows.original}: the 95 % interval of the paired difference leaves out zero."
    for title, places in columns_of(results).items():
        header = ("run", *(_label(place) for place in places))
        shown = [[run, *(_marked(results, run, rows.original, place) for place in places)] for run in rows.runs]
        yield Table.of(title, header, shown, against)
        if rows.registers is not None:
            others = [run for run in rows.runs if run != rows.registers]
            held = [[run, *(_change(results, run, rows.registers, place) for place in places)] for run in others]
            yield Table.of(f"{title}: run minus {rows.registers}, same images", header, held)
    yield sinks_table(results.study, rows.runs)
    spent = [(run, Cell(f"{costs[run].time.value:.2f}", f"[{costs[run].time.lo:.2f}–{costs[run].time.hi:.2f}]"),
              Cell(f"{costs[run].memory:.2f}")) for run in rows.runs if run in costs]  # fmt: skip
    note = f"A forward relative to {rows.original}, in turns: median time of the pairs, and the most that its tensors hold at once."
    yield Table.of("Cost", ("run", "time", "memory"), spent, note)


def draw_cures(results: Results, rows: Rows) -> Figure:
    """A panel a figure, a row a run: value and 95 % interval; the line is the run with registers."""
    places = [place for places in columns_of(results).values() for place in places if place.metric in DRAWN]
    with rc_context(STYLE | {"text.color": "black"}):
        figure = Figure(figsize=(2.1 * len(places) + 1.4, 0.26 * len(rows.runs) + 0.9), layout="constrained")
        panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        for axes, place in zip(panels, places, strict=True):
            metric = _metric(place)
            for at, run in enumerate(rows.runs):
                value = results.value(run, place)
                if value is not None:
                    colour = COLOURS[1 if run == rows.original else 2 if run == rows.registers else 0]
                    axes.plot(metric.scale * value.value, at, "o", color=colour)
                    if value.lo is not None:
                        axes.plot([metric.scale * value.lo, metric.scale * value.hi], [at, at], color=colour)
            if rows.registers and (line := results.value(rows.registers, place)):
                axes.axvline(metric.scale * line.value, color=COLOURS[2], linewidth=0.6, linestyle=":")
            axes.set_title(_label(place), fontsize=8)
        panels[0].set_yticks(range(len(rows.runs)), rows.runs)
        panels[0].invert_yaxis()
    return figure


def _label(place: Place) -> str:
    if place.stage == "evaluate":
        return f"{place.readout}, {place.dataset}, {_metric(place).label}"
    return NAMES.get(place.metric, _metric(place).label)


def _metric(place: Place) -> Metric:
    return METRICS[place.stage][place.metric]


def _marked(results: Results, run: str, other: str, place: Place) -> Cell | str:
    change = results.differences.get((run, other, place.readout, place))
    mark = _metric(place).better * change.side if change else 0
    return show(results.value(run, place), _metric(place), mark)


def _change(results: Results, run: str, other: str, place: Place) -> Cell | str:
    change = results.differences.get((run, other, place.readout, place))
    return show_change(change, _metric(place)) if change else NONE


def as_markdown(tables: Sequence[Table]) -> str:
    """All tables under their titles."""
    return "\n\n".join(f"### {table.title}\n\n{table.markdown()}" for table in tables if table) + "\n"
