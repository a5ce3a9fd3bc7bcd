"""One table, the same cells in a terminal, in Markdown and in HTML."""

import pytest

from regvit.report.catalogue import HIGHER, LOWER, Metric
from regvit.report.study import Value
from regvit.report.tables import Cell, Table, number, show, show_change

PERCENT, METRES = Metric("top-1, %", HIGHER), Metric("RMSE, m", LOWER, 1, 3)
TABLE = Table.of(
    "t", ("run", "top-1"), [("a|b", Cell("62.2", "[57.5–66.6]", "▲")), ("木", "–")], "▲ better; `dvc repro`"
)


def test_figures_stand_to_the_right_and_wide_characters_keep_the_columns():
    assert TABLE.text().splitlines() == [
        "t",
        "run                 top-1",
        "-----  ------------------",
        "a|b    62.2 [57.5–66.6] ▲",
        "木                      –",
        "▲ better; `dvc repro`",
    ]


def test_markdown_escapes_what_would_end_a_cell():
    lines = TABLE.markdown().splitlines()
    assert lines[1].startswith("|:") and lines[1].endswith("-:|")
    assert r"| a\|b " in lines[2] and "62.2 [57.5–66.6] ▲ |" in lines[2]
    assert lines[-1] == "▲ better; `dvc repro`"


def test_columns_are_told_apart_by_what_is_in_them():
    table = Table.of("t", ("run", "n", "top-1"), [("a", Cell("4"), Cell("1.0", "[0.9–1.1]")), ("b", "–", "–")])
    assert table.kinds == ["t", "n", "v"]
    assert not Table.of("t", ("run",), [], "note").note and not Table.of("t", ("run",), [])


@pytest.mark.parametrize(
    ("value", "metric", "expected"),
    [
        (Value(0.6517, 0.61, 0.691), PERCENT, "65.2 [61.0–69.1]"),
        (Value(0.0, -0.01, 0.02), PERCENT, "0.0 [−1.0, 2.0]"),
        (Value(0.5), METRES, "0.500"),
        (None, METRES, "–"),
    ],
)
def test_a_figure_has_its_interval_as_far_as_there_is_one(value, metric, expected):
    assert str(show(value, metric)) == expected


@pytest.mark.parametrize(
    ("value", "metric", "expected"),
    [
        (Value(0.012, -0.003, 0.027), PERCENT, "+1.2 [−0.3, +2.7]"),
        (Value(0.02, 0.01, 0.03), PERCENT, "+2.0 [+1.0, +3.0] ▲"),
        (Value(0.2, 0.1, 0.3), METRES, "+0.200 [+0.100, +0.300] ▼"),
        (Value(0.0, 0.0, 0.0), PERCENT, "±0.0 [±0.0, ±0.0]"),
        (Value(0.2, 0.1, 0.3), Metric("entropy", 0, 1, 1), "+0.2 [+0.1, +0.3]"),
        (None, PERCENT, "–"),
    ],
)
def test_a_difference_is_marked_where_its_interval_leaves_out_zero_and_a_direction_is_better(value, metric, expected):
    assert str(show_change(value, metric)) == expected


def test_a_minus_has_its_own_width():
    assert number(-1.25, 1) == "−1.2" and number(-0.01, 1, signed=True) == "±0.0"
