import pytest
from report_example import params, write_predictions, write_study

from regvit.measures.forward_cost import Cost
from regvit.probing.predictions import open_predictions
from regvit.report.cure_table import Rows, as_markdown, columns_of, cure_differences, cure_tables, draw_cures, rows_of
from regvit.report.results import Results
from regvit.report.study import all_figures
from regvit.stats.intervals import Estimate


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The example with a masked run and one of constant registers, and predictions of all."""
    folder, of = tmp_path_factory.mktemp("study"), params()
    cured = of["runs"]["cured"]
    of["runs"] |= {"masked": {**of["runs"]["original"], "cure": "mask_attention"}}
    of["runs"] |= {"mean": {**cured, "cure": {"name": "constant_registers"}}}
    made = write_study(folder, of=of)
    for i, run in enumerate(made.runs):
        write_predictions(folder / f"{run}.zarr", made, run, right=float(i))
    return made


@pytest.fixture(scope="module")
def results(study):
    [rows] = rows_of(study)
    predictions = {run: open_predictions(study.folder / f"{run}.zarr") for run in rows.runs}
    return Results.of(study, all_figures(study), cure_differences(study, rows, predictions, 50))


def test_the_rows_are_the_runs_of_a_backbone_with_cures_held_against_its_plain_ones(study):
    assert rows_of(study) == [Rows(["original", "cured", "masked", "mean"], "original", "cured")]
    assert study.cure("mean") == "constant_registers"
    assert not study.untouched("masked")


def test_every_run_is_held_against_both_and_a_run_never_against_itself(study, results):
    pairs = {(run, other) for run, other, _, _ in results.differences}
    expected = {("cured", "original"), *((run, of) for run in ("masked", "mean") for of in ("original", "cured"))}
    assert pairs == expected | {("original", "cured")}
    place = next(place for place in columns_of(results)["Tokens"] if place.metric == "cls_cosine")
    change = results.differences["masked", "cured", "", place]
    tables = [study.table(run, "verify", "home", "images") for run in ("masked", "cured")]
    assert change.value == pytest.approx(float((tables[0]["cls_cosine"] - tables[1]["cls_cosine"]).mean()), abs=1e-6)


def test_the_tables_have_a_row_a_run_and_a_dash_where_nothing_was_measured(study, results):
    [rows] = rows_of(study)
    costs = {"cured": Cost(Estimate(1.1, 1.0, 1.25, 20), 1.02)}
    tables = list(cure_tables(results, rows, costs))
    titles = ["Tokens", "Maps", "Readouts"]
    assert [table.title for table in tables] == [
        *(title for each in titles for title in (each, f"{each}: run minus cured, same images")),
        "Why there are sinks",
        "Cost",
    ]
    sinks = tables[-2].frame.set_index("run").astype(str)
    assert sinks.loc["original", "verdict"] == "registers can help here"
    assert sinks.loc["cured"].tolist() == ["1.2", "1.2", "0.70", "5.0", "7: 12.3", "the outliers are gone"]
    assert list(tables[0].frame["run"]) == rows.runs
    assert list(tables[1].frame["run"]) == ["original", "masked", "mean"]
    assert str(tables[-1].frame.iloc[0]["time"]) == "1.10 [1.00–1.25]"
    assert "cls, ood, top-1, %" in tables[4].frame.columns
    text = as_markdown(tables)
    assert text.count("### ") == 8
    unmeasured = Results.of(study, all_figures(study).query("run != 'masked' or stage != 'depth'"), None)
    [maps] = [table for table in cure_tables(unmeasured, rows, {}) if table.title == "Maps"]
    assert maps.frame.set_index("run").loc["masked", "depth RMSE at outliers, m"] == "–"


def test_the_picture_has_a_panel_a_figure_and_a_line_a_run(study, results):
    [rows] = rows_of(study)
    figure = draw_cures(results, rows)
    assert [axes.get_title() for axes in figure.axes][:2] == ["outlier patches, %", "CLS cosine"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == rows.runs
