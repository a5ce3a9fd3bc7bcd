"""The comparison's tables say of each run what was measured on it, and a dash where nothing was."""

import dataclasses

import pandas as pd
import pytest
from report_example import MEASURED, params, write_study

from regvit.report.comparison import (
    accuracy_table,
    anomaly_table,
    class_table,
    classifier_table,
    comparison,
    control_table,
    cost_table,
    detector_table,
    difference_table,
    glance_table,
    measurement_table,
    readme_table,
    runs_table,
    sets_table,
)
from regvit.report.differences import COLUMNS
from regvit.report.results import Place, Results
from regvit.report.study import ANOMALIES, Study, all_figures


def gained(results: Results, **of) -> Results:
    """With one more difference, of +2 points [+1, +3]."""
    row = dict.fromkeys(COLUMNS, "") | {"difference": 0.02, "lo": 0.01, "hi": 0.03, "p": 0.01, "n": 40} | of
    more = Results.of(results.study, pd.DataFrame(columns=["value"]), pd.DataFrame([row]))
    return dataclasses.replace(results, differences={**results.differences, **more.differences})


def row_of(table, *starts: str) -> list[str]:
    (row,) = [row for row in table.frame.map(str).values.tolist() if row[: len(starts)] == list(starts)]
    return row


def test_the_first_table_has_a_column_a_run_and_a_column_a_reference(results):
    table = glance_table(results)
    assert list(table.frame.columns) == ["measure", "data set", "n", "intact", "original", "cured", "original − intact", "cured − original"]  # fmt: skip
    row = row_of(table, "CLS attention on outliers, %")
    assert row[3] == "–" and row[4].startswith("30.0") and row[6] == "–"
    assert row[7].startswith("+3.0") and row[7].endswith("▼")  # more attention on outliers is worse
    assert row_of(table, "depth RMSE, m")[6].endswith("▲")


def test_outliers_of_a_run_are_those_of_its_own_model(results):
    home = results.study.in_distribution
    assert results.outliers("intact") is None  # its backbone shows none
    assert [results.outliers(run).value for run in ("original", "cured")] == [0.02, 0.0]
    without = {key: v for key, v in results.figures.items() if key[1] != Place("verify", "outlier_fraction", home)}
    assert dataclasses.replace(results, figures=without).outliers("cured") is None  # the search's is not its own


def test_the_readme_has_at_most_ten_rows_that_are_in_the_first_table(results):
    table = readme_table(results)
    assert 8 <= len(table.frame) <= 10
    assert set(table.frame["measure"]) <= set(glance_table(results).frame["measure"])


def test_readouts_are_marked_against_cls_of_the_same_run_and_cls_against_the_reference(results):
    of = {"stage": "evaluate", "metric": "top1", "dataset": "lines", "classifier": "linear"}
    marked = gained(results, **of, run="cured", reference="original", readout="cls", reference_readout="cls")
    assert [cell.endswith("▲") for cell in row_of(accuracy_table(marked), "cured", "cls")] == [
        False,
        False,
        False,
        True,
    ]
    marked = gained(results, **of, run="cured", reference="cured", readout="cls_reg", reference_readout="cls")
    assert row_of(accuracy_table(marked), "cured", "cls_reg")[3].endswith("▲")
    assert "▲" not in str(accuracy_table(results).frame)


def test_a_lower_fpr_is_better(results):
    of = {"stage": "evaluate", "metric": "fpr95", "dataset": ANOMALIES, "detector": "msp"}
    marked = gained(results, **of, run="cured", reference="original", readout="cls", reference_readout="cls")
    assert row_of(anomaly_table(marked), "cured", "cls")[3].endswith("▼")


def test_differences_to_each_base_stand_with_their_intervals_and_what_they_are_relative_to_it(results):
    of = {"stage": "evaluate", "metric": "top1", "dataset": "home", "classifier": "linear", "run": "cured"}
    marked = gained(results, **of, reference="cured", readout="cls_reg", reference_readout="patch_mean")
    before = results.value("cured", results.top1("patch_mean", "home")).value
    row = row_of(difference_table(marked), "cured", "cls_reg − patch_mean")
    assert row[2:4] == ["home top-1", "+2.0 [+1.0, +3.0] ▲"]
    assert float(row[4]) == pytest.approx(2 / before, abs=0.06)
    assert not difference_table(results)


def test_a_run_with_registers_is_held_against_the_bases_of_one_without_and_against_a_second_one(results):
    of = {"stage": "evaluate", "metric": "top1", "dataset": "home", "classifier": "linear", "run": "cured"}
    marked = gained(results, **of, reference="original", readout="cls_reg", reference_readout="patch_mean")
    assert row_of(difference_table(marked), "cured − original", "cls_reg − patch_mean")
    second = gained(results, **of, reference="intact", readout="cls", reference_readout="cls")
    assert not difference_table(second)
    study = dataclasses.replace(second.study, pairs=(("cured", "intact"),))
    assert row_of(difference_table(dataclasses.replace(second, study=study)), "cured − intact", "cls")
    assert study.held()[-1] == ("cured", "intact") and set(study.references.items()) < set(study.held())


def test_classes_from_one_token_have_a_column_a_set_where_there_are_several(results):
    assert not class_table(results)
    measured = {**results.study.measured, "token_classes": ("scenes", "flags")}
    of = dataclasses.replace(results, study=dataclasses.replace(results.study, measured=measured))
    row = row_of(class_table(of), "cured", "outlier patch")
    assert row[2].startswith("5") and row[3] == "–"


def test_every_readout_has_a_row_unless_some_are_chosen(results):
    assert set(accuracy_table(results).frame["readout"]) == {
        r for run in results.study.runs for r in results.readouts(run)
    }
    chosen = dataclasses.replace(results, study=dataclasses.replace(results.study, readouts=("cls",)))
    for table in (accuracy_table(chosen), anomaly_table(chosen)):
        assert set(table.frame["readout"]) == {"cls"}


def test_a_readout_costs_channels_parameters_and_the_forward_that_it_is_read_from(results):
    assert not cost_table(results)
    of = {"dataset": "home", "readout": "", "classifier": "", "detector": "", "lo": None, "hi": None, "n": None}
    probe = of | {"stage": "probe", "readout": "cls_reg", "classifier": "linear", "run": "cured"}
    rows = [probe | {"metric": "width", "value": 768.0}, probe | {"metric": "head_parameters", "value": 5383.0}]
    rows += [of | {"stage": "verify", "run": "cured", "metric": "gflops", "value": 1.5}]
    more = Results.of(results.study, pd.DataFrame(rows)).figures
    costly = dataclasses.replace(results, figures={**results.figures, **more})
    assert row_of(cost_table(costly), "cured", "cls_reg") == ["cured", "cls_reg", "768", "5383", "1.500", "–"]


def test_classifiers_and_detectors_have_a_row_each(results):
    assert list(classifier_table(results).frame["classifier"])[:2] == ["linear probe", "kNN"]
    assert list(detector_table(results).frame["detector"]) == ["msp", "knn"]


def test_the_controls_of_the_search_stand_beside_the_cure(results):
    (row,) = control_table(results).frame.map(str).values.tolist()  # the plain backbone has no outliers
    assert row[:2] == ["planted", "6"] and row[3].startswith("0.00") and row[6].startswith("2.00")


def test_a_measurement_has_a_row_a_run_and_only_columns_that_somebody_has(results):
    table = measurement_table(results, "attention", "scenes")
    assert list(table.frame["run"]) == ["intact", "original", "cured"]
    assert "on CLS, %" not in table.frame.columns
    assert not measurement_table(results, "zeroshot", "scenes")


def test_runs_and_sets_say_what_they_are(results):
    assert row_of(runs_table(results), "cured")[4:] == ["planted", "1 at test time", "selected", "original"]
    assert row_of(runs_table(results), "intact")[4:] == ["as it came", "none", "–", "–"]
    assert row_of(sets_table(results), "lines")[2:] == ["the same classes, another look", "40"]
    assert (
        row_of(sets_table(results), "scenes")[2]
        == "attention, tokens, token_classes, discover, segment, depth, hummingbird, correspond, retrieve"
    )


def test_without_outliers_and_without_measurements_the_tables_hold_and_say_so(tmp_path):
    bare = params()
    for stage in MEASURED:
        bare[stage]["datasets"] = []
    for block, name in (("runs", "intact"), ("backbones", "plain")):
        bare[block] = {name: bare[block][name]}
    study = Study.of(bare, tmp_path)
    write_study(tmp_path)
    titles = [table.title for table in comparison(Results.of(study, all_figures(study)))]
    assert titles[:2] == ["What registers change", "Accuracy, % [95 % interval]"]
    assert not any(title.startswith("Outlier") for title in titles)


def test_a_set_that_was_taken_away_is_not_looked_at_and_a_missing_file_is_named(tmp_path):
    study = write_study(tmp_path)
    (tmp_path / "runs/cured/depth/scenes/figures.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*runs/cured/depth/scenes/figures\.csv: run `dvc repro`"):
        all_figures(study)
    less = params()
    less["depth"]["datasets"] = []
    assert "depth" not in set(all_figures(Study.of(less, tmp_path))["stage"])
