"""Plots are SVG that says its text, follows light and dark, and is the same each time; those of DVC have the columns that
the templates know."""

import base64

import pandas as pd
import pytest

from regvit.report import plots
from regvit.report.plot_tables import COLUMNS, plot_tables, write_plots
from regvit.report.plots import (
    INK,
    plot_distributions,
    plot_histogram,
    plot_layers,
    plot_norms,
    plot_places,
    plot_points,
    plot_scores,
)
from regvit.report.study import Value

LAYERS = pd.DataFrame({"layer": [0, 1], "x": [0.1, 0.2], "x_lo": [0.0, 0.1], "x_hi": [0.2, 0.3]})
DRAWN = {
    "norms": lambda: plot_norms(pd.DataFrame({"layer": [0, 1], "$max": [1.0, 60.0]})),
    "histogram": lambda: plot_histogram(pd.DataFrame({"log10_norm": [0, 1], "before": [5, 1], "after": [6, 0]}), 5.0),
    "distributions": lambda: plot_distributions(
        {name: pd.DataFrame({"log10_norm": [0, 1], "before": [5, 1], "after": [6, 0]}) for name in ("$a", "b")}
    ),
    "scores": lambda: plot_scores(pd.DataFrame({"rank": [1, 2], "attribution": [0.6, 0.1], "selected": [True, False]})),
    "layers": lambda: plot_layers({"a": LAYERS, "_b": pd.DataFrame(), "c": LAYERS}, "x", "share"),
    "points": lambda: plot_points(["row"], {"a": [Value(0.5, 0.4, 0.6)], "b": [Value(0.5)], "c": [None]}, "%", 100),
    "places": lambda: plot_places([0.5, 0, 0, 0.1]),
}


def svg_of(source: str) -> str:
    kind, _, data = source.partition("base64,")
    assert kind == "data:image/svg+xml;"
    return base64.b64decode(data).decode()


@pytest.mark.parametrize("name", DRAWN)
def test_it_is_the_same_each_time_and_takes_the_colours_of_the_page(name):
    svg = svg_of(DRAWN[name]())
    assert svg == svg_of(DRAWN[name]())
    assert INK not in svg and "prefers-color-scheme" in svg
    assert (svg.count("currentColor") > 3) or name == "places"
    assert "<dc:date>" not in svg and "Matplotlib" not in svg


def test_names_are_text_and_no_formulas():
    norms = svg_of(DRAWN["norms"]()).replace("&gt;", ">")
    assert ">$max<" in norms and ">50<" in norms  # at the logarithmic axis
    assert ">c<" in svg_of(DRAWN["layers"]()) and ">b<" not in svg_of(DRAWN["layers"]())  # b has no curve


def test_distributions_of_any_bins_are_compared_by_their_density_around_the_median():
    """The same patches in bins of a fifth and of a tenth of a decade reach the same height at the median, at 1."""
    coarse = pd.DataFrame({"log10_norm": [0.0, 0.2, 0.4], "before": [20, 60, 20], "after": [20, 60, 20]})
    fine = pd.DataFrame({"log10_norm": [5.1, 5.2, 5.3, 5.4], "before": [20, 30, 30, 20], "after": [40, 30, 30, 0]})
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_source", lambda figure, axes: drawn.append(axes))
        plot_distributions({"coarse": coarse, "fine": fine})
    one, other, cured = (line for line in drawn[0].lines if len(line.get_xdata()))
    tops = [row - line.get_ydata()[1] for row, line in ((0, one), (1, other), (1, cured))]
    assert (
        tops[0] == pytest.approx(tops[1]) == pytest.approx(tops[2]) and one.get_xdata()[1] == other.get_xdata()[1] == 1
    )
    assert cured.get_ydata()[3] == 1  # nothing is left there, and the line lies on the row
    assert [text.get_text() for text in drawn[0].get_yticklabels()] == ["coarse", "fine"]


def test_the_tables_of_dvc_have_one_chart_for_all_runs_and_say_which(results):
    tables = plot_tables(results)
    assert list(tables) == ["norms", "histogram", "neurons", "roc", "lost", "attention", "headlines"]
    curves = pd.concat(tables["attention"])
    assert set(curves["run"]) == {"intact", "original", "cured"} and "scenes: entropy" in set(curves["panel"])
    headlines = pd.concat(tables["headlines"])
    assert {"top1", "miou"} <= set(headlines["panel"]) and headlines["lo"].notna().any()


def test_they_are_written_without_rows_that_say_nothing(results):
    write_plots(results)
    for path in (results.study.folder / "plots").glob("*.csv"):
        table = pd.read_csv(path)
        assert list(table.columns) == COLUMNS and len(table) and table["y"].notna().all()
