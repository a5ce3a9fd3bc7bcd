"""The tables of `dvc plots`: a chart each for all runs or backbones, in the columns that the two templates of the project
know (`pipeline.plots_template`): `run, panel, x, y, lo, hi`."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from regvit.report.results import Results
from regvit.report.summary import headlines
from regvit.stats.figures import write_csv

COLUMNS = ["run", "panel", "x", "y", "lo", "hi"]
MOST_NEURONS = 30
BY_LAYER = ("entropy", "on_outliers", "on_registers", "morans_i", "object_auroc")


def write_plots(results: Results) -> None:
    """metrics/plots/<name>.csv; a table of what was not measured has no rows."""
    for name, parts in plot_tables(results).items():
        table = pd.concat([part.reindex(columns=COLUMNS) for part in parts] or [pd.DataFrame(columns=COLUMNS)])
        write_csv(results.study.folder / f"plots/{name}.csv", table.dropna(subset="y"))


def plot_tables(results: Results) -> dict[str, Iterable[pd.DataFrame]]:
    """By name, the parts of which each table is put together."""
    study = results.study
    backbones = list(study.backbones)
    norms = {name: study.search(name, "norms") for name in backbones}
    histograms = {name: study.search(name, "histogram") for name in backbones}
    scores = {name: study.search(name, "scores").head(MOST_NEURONS) for name in backbones}
    return {
        "norms": [
            _part(table, name, column, "layer", column) for name, table in norms.items() for column in table.columns[1:]
        ],
        "histogram": [
            _part(table, side, name, "log10_norm", side)
            for name, table in histograms.items()
            for side in ("before", "after")
        ],
        "neurons": [
            _part(table[table["selected"].astype(int) == chosen], label, name, "rank", "attribution")
            for name, table in scores.items()
            for chosen, label in ((1, "selected"), (0, "others"))
        ],
        "roc": _roc(results),
        "lost": _lost(results),
        "attention": _attention(results),
        "headlines": [_headlines(results)],
    }


def _part(table: pd.DataFrame, run: str, panel: str, x: str, y: str) -> pd.DataFrame:
    """One curve."""
    ends = {end: table[f"{y}_{end}"] for end in ("lo", "hi") if f"{y}_{end}" in table}
    return pd.DataFrame({"run": run, "panel": panel, "x": table[x], "y": table[y], **ends})


def _roc(results: Results) -> list[pd.DataFrame]:
    """ID against each anomaly set, from CLS with the detector that is shown."""
    study, parts = results.study, []
    for run in study.runs:
        table = study.table(run, "evaluate", study.in_distribution, "roc")
        if table.empty:
            continue
        shown = (table["readout"] == "cls") & (table["detector"] == study.detectors[0])
        for dataset, curve in table[shown].groupby("dataset", sort=False):
            parts.append(_part(curve, run, dataset, "fpr", "tpr"))
    return parts


def _lost(results: Results) -> list[pd.DataFrame]:
    """CorLoc over the bias, the best of a feature's blocks and normalisations."""
    study, parts = results.study, []
    for dataset in study.measured["discover"]:
        for run in study.runs:
            table = study.table(run, "discover", dataset, "sweep")
            for kind, tried in table.groupby("kind", sort=False) if not table.empty else ():
                best = tried.groupby("bias", as_index=False)["corloc"].max()
                parts.append(_part(best, run, f"{dataset}: {kind}", "bias", "corloc"))
    return parts


def _attention(results: Results) -> list[pd.DataFrame]:
    """Figures of the CLS attention by block."""
    study = results.study
    return [
        _part(table, run, f"{dataset}: {metric}", "layer", metric)
        for dataset in study.measured["attention"]
        for metric in BY_LAYER
        for run in study.runs
        if metric in (table := study.table(run, "attention", dataset, "layers"))
    ]


def _headlines(results: Results) -> pd.DataFrame:
    """The figures of `dvc metrics show` that have an interval."""
    rows = []
    for run in results.study.runs:
        for name, value in headlines(results, run).items():
            if value is not None:
                rows.append({"run": run, "panel": name, "x": run, "y": value.value, "lo": value.lo, "hi": value.hi})
    return pd.DataFrame(rows, columns=COLUMNS)
