"""The table at a glance, from metrics written by hand."""

import dataclasses

import pytest
from report_example import measured

from regvit.report.comparisons import Value
from regvit.report.measurements import NONE, measurement_table, number, outliers, show, show_change

INTACT = measured("intact", outliers=False)
ORIGINAL = measured("original", reference="intact", shift=-0.1)
CURED = measured("cured", "test_time", reference="original")


def rows(*runs) -> dict[str, list[str]]:
    return {row[0]: [cell.strip() for cell in row[1:]] for row in measurement_table(runs, "home").rows}


def test_there_is_a_column_for_each_run_and_one_for_each_run_held_against_another():
    table = measurement_table([INTACT, ORIGINAL, CURED], "home")
    assert table.header == ("measure", "data set", "n", "intact", "original", "cured", "original − intact", "cured − original")  # fmt: skip
    assert {len(row) for row in table.rows} == {8}
    assert "▲ better" in table.note
    assert len(table.text().splitlines()) > len(table.rows)


def test_every_measure_has_its_row():
    assert set(rows(ORIGINAL)) == {
        "outlier patches, %", "CLS cosine to the unplanted model",
        "CLS attention on outliers, %", "CLS attention on registers, %", "largest weight of CLS attention, %",
        "entropy of CLS attention, nats", "coherence of CLS attention",
        "object AUROC of CLS attention, %", "position, normal patch, top-1 %", "position, outlier patch, top-1 %",
        "pixels, normal patch, L2 error", "pixels, outlier patch, L2 error",
        "CorLoc of the chosen setting, %", "CorLoc, mean over all features, %", "segmentation mIoU, %",
        "segmentation mIoU by image, %", "pixel accuracy, %", "pixel accuracy at outliers, %", "depth RMSE, m",
        "depth RMSE at outliers, m", "top-1 from cls, %", "top-1 from patch_mean, %",
    }  # fmt: skip


def test_a_difference_is_marked_by_what_is_better_for_the_measure():
    found = rows(INTACT, ORIGINAL, CURED)
    assert found["CLS attention on outliers, %"][-1] == "−20.0 [−30.0, −10.0] ▲"  # less is better
    assert found["coherence of CLS attention"][-1] == "−0.200 [−0.300, −0.100] ▼"
    assert found["entropy of CLS attention, nats"][-1] == "−0.20 [−0.30, −0.10]"  # neither
    assert found["top-1 from cls, %"][-1] == "+2.0 [−1.0, +5.0]"  # zero is in the interval


def test_differences_of_images_are_paired():
    better = dict(CURED.tables)
    key = ("depth", "scenes", "images")
    better[key] = {**better[key], "rmse": ["0.4", "0.5", "0.6", "0.5"]}
    cured = dataclasses.replace(CURED, tables=better)
    assert rows(ORIGINAL, cured)["depth RMSE, m"][-1] == "−0.100 [−0.100, −0.100] ▲"
    assert rows(ORIGINAL, cured)["depth RMSE at outliers, m"][-1] == "±0.000 [±0.000, ±0.000]"


def test_the_miou_is_paired_though_it_is_no_mean_over_images():
    found = rows(INTACT, ORIGINAL)["segmentation mIoU, %"][-1]
    expected = 100 * ((15 / 25 + 17 / 23) / 2 - 18 / 22)
    assert found.startswith(f"−{-expected:.1f} [−") and found.endswith("▼")


def test_attention_on_outliers_is_compared_only_where_these_are_the_same():
    elsewhere = rows(ORIGINAL, dataclasses.replace(CURED, backbone="another"))
    assert elsewhere["CLS attention on outliers, %"][-1] == NONE
    assert elsewhere["coherence of CLS attention"][-1] == "−0.200 [−0.300, −0.100] ▼"


def test_what_tokens_know_is_paired_between_runs_on_one_backbone():
    found = rows(ORIGINAL, CURED)
    assert found["position, outlier patch, top-1 %"][-1] == "+50.0 [+40.0, +60.0] ▲"
    assert found["pixels, outlier patch, L2 error"][-1] == "+0.50 [+0.40, +0.60] ▼"  # less is better
    assert found["position, normal patch, top-1 %"][-1] == "±0.0 [±0.0, ±0.0]"
    elsewhere = rows(ORIGINAL, dataclasses.replace(CURED, backbone="another"))
    assert elsewhere["position, outlier patch, top-1 %"][-1] == NONE


def test_outliers_and_the_way_back_to_the_unplanted_model_are_paired():
    found = rows(INTACT, ORIGINAL, CURED)
    assert found["outlier patches, %"][-1] == "−1.50 [−3.00, ±0.00]"
    assert found["CLS cosine to the unplanted model"][-1] == "+0.040 [+0.030, +0.050] ▲"
    assert found["outlier patches, %"][-2] == NONE


def test_zero_shot_accuracy_has_a_row_and_the_gain_that_the_stage_measured():
    def with_clip(run, **metrics):
        return dataclasses.replace(run, found={**run.found, "zeroshot": {"words": {"n": 9, **metrics}}})

    untreated = with_clip(ORIGINAL, top1=0.5, top1_lo=0.4, top1_hi=0.6)
    treated = with_clip(CURED, top1=0.6, top1_lo=0.5, top1_hi=0.7, gain=0.1, gain_lo=0.05, gain_hi=0.15)
    found = rows(untreated, treated)["zero-shot top-1, %"]
    assert found == ["words", "9", "50.0 [40.0–60.0]", "60.0 [50.0–70.0]", "+10.0 [+5.0, +15.0] ▲"]
    assert rows(untreated, dataclasses.replace(treated, backbone="another"))["zero-shot top-1, %"][-1] == NONE


def test_a_backbone_without_outliers_has_no_figure_at_outliers():
    found = rows(INTACT, ORIGINAL)
    for name in ("outlier patches, %", "pixel accuracy at outliers, %", "depth RMSE at outliers, m"):
        assert found[name][2] == NONE != found[name][3]
        assert found[name][4] == NONE
    assert "outlier patches, %" not in rows(INTACT)


def test_measurements_that_were_not_made_have_no_row():
    bare = dataclasses.replace(ORIGINAL, found={}, tables={})
    assert set(rows(bare)) == {
        "outlier patches, %", "CLS cosine to the unplanted model", "top-1 from cls, %", "top-1 from patch_mean, %"
    }  # fmt: skip


def test_the_number_of_images_is_that_behind_the_figure():
    found = rows(INTACT, ORIGINAL)
    assert found["depth RMSE, m"][:2] == ["scenes", "4"]
    assert found["coherence of CLS attention"][:2] == ["scenes", "4"]
    assert found["CLS attention on outliers, %"][1] == "2"
    assert found["depth RMSE at outliers, m"][:2] == ["scenes", "2"]
    assert found["segmentation mIoU by image, %"][1] == "3"  # one image has no class to count
    assert found["top-1 from cls, %"][:2] == ["home", "100"]


def test_outliers_are_those_of_held_out_images_else_those_of_the_search():
    assert outliers(ORIGINAL) == Value(0.02, 0.02, 0.02, 80)
    unverified = dataclasses.replace(CURED, run=dataclasses.replace(CURED.run, verify={"planted": False}))
    assert outliers(unverified) == Value(0.0, None, None, 64)
    assert outliers(INTACT) is None


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [(1.25, False, "1.2"), (-0.04, False, "0.0"), (0.04, True, "±0.0"), (-1.3, True, "−1.3"), (2.0, True, "+2.0")],
)
def test_numbers_have_a_true_minus_and_no_sign_where_they_round_to_zero(value, signed, text):
    assert number(value, 1, signed) == text


def test_a_figure_is_shown_with_its_interval():
    assert show(Value(0.5, 0.4, 0.6), 100, 1) == "50.0 [40.0–60.0]"
    assert show(Value(-0.5, -0.6, 0.1), 1, 1) == "−0.5 [−0.6, 0.1]"
    assert show(Value(0.5), 100, 0) == "50"
    assert show(None, 100, 1) == NONE
    assert show_change(Value(0.1, 0.05, 0.2), 100, 1, -1) == "+10.0 [+5.0, +20.0] ▼"
