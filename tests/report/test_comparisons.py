"""Paired differences against values by hand, and only between the same images and patches."""

import pytest

from regvit.report.compare import Measured
from regvit.report.comparisons import (
    Measurements,
    Value,
    column_mean,
    paired_difference,
    paired_miou_difference,
    value_of,
)


def run(columns: dict, name: str = "a") -> Measurements:
    return Measurements(Measured(name, "none", 0, {}, {}, {}), "vit", {}, {("segment", "scenes", "images"): columns})


FIRST = run({"image_id": ["x", "y", "z"], "miou": ["0.5", "0.9", ""], "right": ["6", "3", "1"], "at": ["10", "5", "0"]})
SECOND = run(
    {"image_id": ["y", "x", "w"], "miou": ["0.6", "0.4", "1"], "right": ["1", "5", "0"], "at": ["5", "10", "7"]}
)


def test_images_are_paired_by_name_and_those_that_only_one_run_has_are_left_out():
    found = paired_difference(FIRST, SECOND, "segment", "scenes", "miou")
    assert found.value == pytest.approx(((0.5 - 0.4) + (0.9 - 0.6)) / 2)
    assert found.n == 2
    assert found.lo == pytest.approx(0.1)  # of two images, hundreds of resamples hold one twice
    assert found.hi == pytest.approx(0.3)


def test_images_weigh_as_much_as_they_have_pixels():
    found = paired_difference(FIRST, SECOND, "segment", "scenes", "right", "at")
    assert found.value == pytest.approx(((6 - 5) + (3 - 1)) / (10 + 5))
    assert (found.lo, found.hi) == (pytest.approx(1 / 10), pytest.approx(2 / 5))
    assert found.n == 2


def test_an_image_without_a_value_is_left_out():
    both = run({"image_id": ["x", "z"], "miou": ["0.2", "0.3"]})
    assert paired_difference(FIRST, both, "segment", "scenes", "miou").n == 1


def test_what_was_counted_on_other_patches_is_no_pair():
    other = run({"image_id": ["x", "y", "z"], "right": ["6", "3", "1"], "at": ["10", "4", "0"]})
    nowhere = run({"image_id": ["x", "y", "z"], "right": ["0", "0", "0"], "at": ["0", "0", "0"]})
    assert paired_difference(FIRST, other, "segment", "scenes", "right", "at") is None
    assert paired_difference(nowhere, nowhere, "segment", "scenes", "right", "at") is None


def test_without_a_table_a_column_or_a_shared_image_there_is_no_difference():
    stranger = run({"image_id": ["q"], "miou": ["1"], "right": ["1"], "at": ["1"]})
    assert paired_difference(FIRST, SECOND, "depth", "scenes", "miou") is None
    assert paired_difference(FIRST, SECOND, "segment", "scenes", "rmse") is None
    assert paired_difference(FIRST, stranger, "segment", "scenes", "miou") is None
    assert paired_difference(FIRST, stranger, "segment", "scenes", "right", "at") is None


def test_a_run_does_not_differ_from_itself():
    found = paired_difference(FIRST, FIRST, "segment", "scenes", "miou")
    assert (found.value, found.lo, found.hi) == (0, 0, 0)


def test_the_mean_of_a_column_leaves_out_images_without_a_value():
    found = column_mean(FIRST, "segment", "scenes", "miou")
    assert (found.value, found.n) == (pytest.approx(0.7), 2)
    assert column_mean(FIRST, "segment", "scenes", "rmse") is None


def test_a_figure_comes_with_its_interval_and_number_of_images():
    assert value_of({"a": 1.0, "a_lo": 0.5, "a_hi": 2.0}, "a", 7) == Value(1.0, 0.5, 2.0, 7)
    assert value_of({"a": 1.0, "n": 3}, "a", 7) == Value(1.0, None, None, 3)
    assert value_of({"a": None, "a_lo": None, "a_hi": None}, "a") is None
    assert value_of({}, "a") is None


@pytest.mark.parametrize(("lo", "hi", "side"), [(0.1, 0.2, 1), (-0.2, -0.1, -1), (-0.1, 0.1, 0), (0, 0.2, 0), (None, None, 0)])  # fmt: skip
def test_a_difference_has_a_side_where_its_interval_leaves_out_zero(lo, hi, side):
    assert Value(0.1, lo, hi).side == side


def of_pixels(name: str, rows: list[tuple]) -> Measurements:
    columns = dict(
        zip(("image_id", "mask_value", "right", "predicted", "actual"), zip(*rows, strict=True), strict=True)
    )
    tables = {("segment", "scenes", "pixels"): {key: [str(cell) for cell in cells] for key, cells in columns.items()}}
    return Measurements(Measured(name, "none", 0, {}, {}, {}), "vit", {}, tables)


def test_miou_is_paired_over_the_images_that_both_runs_have():
    better = [("a", 0, 8, 8, 8), ("a", 2, 2, 2, 2), ("b", 0, 5, 6, 5), ("b", 2, 4, 4, 5), ("c", 0, 9, 9, 9)]
    worse = [("b", 0, 5, 9, 5), ("a", 0, 8, 10, 8), ("a", 2, 0, 0, 2), ("b", 2, 1, 1, 5)]
    found = paired_miou_difference(of_pixels("better", better), of_pixels("worse", worse), "scenes")
    of = [(13 / 14 + 6 / 7) / 2, (13 / 19 + 1 / 7) / 2]
    assert found.value == pytest.approx(of[0] - of[1]) and found.n == 2
    of_a, of_b = 1 - (8 / 10) / 2, (5 / 6 + 4 / 5) / 2 - (5 / 9 + 1 / 5) / 2  # all draws of a alone, of b alone
    assert (found.lo, found.hi) == (pytest.approx(min(of_a, of_b)), pytest.approx(max(of_a, of_b)))


def test_miou_is_not_paired_over_other_masks_nor_over_other_images():
    one = of_pixels("one", [("a", 0, 8, 8, 8), ("a", 1, 2, 2, 2)])
    other_mask = of_pixels("other", [("a", 0, 8, 8, 9), ("a", 1, 1, 2, 1)])
    assert paired_miou_difference(one, other_mask, "scenes") is None
    assert paired_miou_difference(one, of_pixels("other", [("b", 0, 8, 8, 8)]), "scenes") is None
    assert paired_miou_difference(one, one, "rooms") is None
