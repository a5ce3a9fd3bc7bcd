"""Differences pair the same images, and are not given where there is no pair."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
from report_example import MEASURED, params, write_study

from regvit.report.comparison import glance_table
from regvit.report.differences import at_outliers, difference_rows, image_differences, paired_mean, paired_miou
from regvit.report.results import Results
from regvit.report.study import all_figures


def table(values, images="abcd", **columns) -> pd.DataFrame:
    return pd.DataFrame({"image_id": list(images), "rmse": values, **columns})


def test_images_are_paired_by_their_name_and_those_without_a_value_are_left_out():
    found = paired_mean(table([1.0, 2.0, 3.0, np.nan]), table([3.0, 1.0, 0.5, 4.0], "cbad"), "rmse")
    assert found.n == 3
    assert found.value == pytest.approx(np.mean([1 - 0.5, 2 - 1, 3 - 3]))
    assert found.lo <= found.value <= found.hi


def test_where_images_weigh_differently_the_sums_are_divided():
    first, second = table([1.0, 0.5, 0.9, 0.3]), table([0.0, 0.5, 0.4, 0.9])
    for each in (first, second):
        each["rmse_weight"] = [3, 1, 0, 2]
    found = paired_mean(first, second, "rmse")
    assert found.value == pytest.approx((3 * 1 + 1 * 0 + 2 * -0.6) / 6) and found.n == 3
    second["rmse_weight"] = [3, 1, 0, 1]
    assert paired_mean(first, second, "rmse") is None  # counted on other patches


def test_without_a_shared_value_there_is_no_difference():
    assert paired_mean(table([1.0] * 4), table([1.0] * 4, "efgh"), "rmse") is None
    assert paired_mean(table([1.0] * 4), table([1.0] * 4).drop(columns="rmse"), "rmse") is None


def pixels(right: list[int], actual: int = 10) -> pd.DataFrame:
    rows = [(image, value, right[value], 10, actual) for image in "ab" for value in (0, 1)]
    return pd.DataFrame(rows, columns=["image_id", "mask_value", "right", "predicted", "actual"])


def test_miou_is_paired_from_counts_of_pixels():
    found = paired_miou(pixels([8, 10]), pixels([5, 10]))
    assert found.value == pytest.approx((8 / 12 + 1) / 2 - (5 / 15 + 1) / 2) and found.n == 2
    assert paired_miou(pixels([8, 10]), pixels([8, 10], actual=11)) is None  # other masks
    assert paired_miou(pixels([8, 10]), pixels([8, 10]).assign(image_id="z")) is None


def test_what_is_measured_at_outliers_pairs_within_a_backbone_only(results):
    rows = difference_rows(results.study)
    within, across = (set(rows.loc[rows["run"] == run, "metric"]) for run in ("cured", "original"))
    assert {"on_outliers", "position_top1_normal", "rmse_at_outliers", "rmse", "miou"} <= within
    assert {"rmse", "miou", "entropy"} <= across
    assert not any(
        at_outliers(stage, metric) for stage, metric in rows.loc[rows["run"] == "original", ["stage", "metric"]].values
    )
    assert at_outliers("tokens", "pixels_l2_normal") and not at_outliers("verify", "outlier_fraction")


def test_trained_registers_are_held_against_the_same_model_without_them_where_the_choice_says_so(tmp_path):
    of = params()
    of["backbones"]["reg4"] = {"source": "timm:reg4", "architecture": "vit", "img_size": 112}
    of["runs"]["trained"] = {"backbone": "reg4", "registers": "trained", "num_registers": 4}
    of["compare"]["references"] = {"trained": "intact"}
    of |= {stage: {"datasets": []} for stage in MEASURED if stage not in ("attention", "depth")}
    study = write_study(tmp_path, of=of)
    results = Results.of(study, all_figures(study), difference_rows(study))
    assert study.references == {"original": "intact", "cured": "original", "trained": "intact"}
    table = glance_table(results).frame.set_index("measure")["trained − intact"].map(str)
    assert table["depth RMSE, m"] != table["CLS attention on outliers, %"] == "–"  # of other places in another backbone


def test_a_run_pairs_with_itself_in_another_experiment(results, tmp_path):
    shutil.copytree(results.study.folder, tmp_path, dirs_exist_ok=True)
    other = dataclasses.replace(results.study, folder=tmp_path)
    rows = list(image_differences(other, "cured", "cured", results.study))
    assert {row["metric"] for row in rows} >= {"cls_cosine", "morans_i", "miou"}
    assert all(row["difference"] == 0 for row in rows)


def test_columns_that_are_no_figures_are_not_compared(results):
    assert "pixel_accuracy_at_outliers_weight" not in {place.metric for *_, place in results.differences}
