"""Tables and self-checks from metrics files written by hand."""

import copy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from regvit.report.compare import (
    Check,
    Measured,
    Table,
    accuracy_table,
    anomaly_table,
    classifier_table,
    control_table,
    detector_table,
    difference_table,
    outlier_fraction,
    outlier_table,
    points,
    self_checks,
)

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "stages"))

from regvit.pipeline.compare_runs import BEGIN, END, write_readme  # noqa: E402


def top1(value: float) -> dict:
    return {"top1": value, "top1_lo": value - 0.05, "top1_hi": value + 0.05, "n": 100}


def anomaly(auroc: float, fpr95: float) -> dict:
    return {
        "auroc": auroc, "auroc_lo": auroc - 0.02, "auroc_hi": auroc + 0.02,
        "fpr95": fpr95, "fpr95_lo": fpr95 - 0.1, "fpr95_hi": fpr95 + 0.1,
    }  # fmt: skip


READOUT = {
    "id": top1(0.625),
    "ood": {"lines": top1(0.4)},
    "anomaly": {"flags": {"msp": anomaly(0.7, 0.9)}, "digits": {"msp": anomaly(0.8, 0.5)}},
    "anomaly_mean": {"msp": anomaly(0.75, 0.7), "vim": anomaly(0.9, 0.3)},
    "knn": {"id": top1(0.5), "ood": {"lines": top1(0.3)}},
}


def shifted(**by: float) -> dict:
    """Differences by metric, each with an interval of half a point to both sides."""
    values = {}
    for name, value in by.items():
        values |= {name: value, f"{name}_lo": value - 0.005, f"{name}_hi": value + 0.005, f"{name}_p": 0.0004}
    return values


DIFFERENCES = {
    "id": shifted(top1=0.02),
    "ood": {"lines": shifted(top1=-0.02)},
    "pooled": shifted(top1=0.001),
    "anomaly": {"flags": {"msp": shifted(auroc=0.0, fpr95=0.03)}, "digits": {"msp": shifted(auroc=0.0, fpr95=-0.03)}},
    "anomaly_mean": {"msp": shifted(auroc=-0.01, fpr95=0.0), "vim": shifted(auroc=0.03, fpr95=0.0)},
}
IDENTIFY = {"outliers_found": True, "outlier_fraction": 0.012, "outlier_fraction_after": 0.0, "num_neurons": 6,
            "precision": 1.0, "recall": 1.0}  # fmt: skip


def around(**values: float) -> dict:
    """Each value with an interval of a hundredth to either side."""
    ends = {f"{key}_lo": value - 0.01 for key, value in values.items()}
    return values | ends | {f"{key}_hi": value + 0.01 for key, value in values.items()}


SPOILT = {"planted": True, **around(outlier_fraction=0.0185, cls_cosine=0.9, patch_mean_cosine=0.98, patch_cosine=0.95,
                                    outlier_patch_cosine=0.1, cls_attention_on_outliers=0.3)}  # fmt: skip
CURED = {"planted": True, **around(outlier_fraction=0.0, cls_cosine=0.97, patch_mean_cosine=0.99, patch_cosine=0.99,
                                   outlier_patch_cosine=0.985, cls_attention_on_outliers=0.007)}  # fmt: skip


def original(**changed) -> Measured:
    return Measured("original", "none", 0, {"cls": READOUT}, IDENTIFY, SPOILT | changed)


def cured(num_registers: int = 1, **changed) -> Measured:
    readouts = {"cls": READOUT, "reg_mean": READOUT, "cls_reg": READOUT}
    return Measured("cured", "test_time", num_registers, readouts, IDENTIFY, CURED | changed)


def test_a_row_is_a_run_and_readout_in_percent_with_intervals():
    table = accuracy_table([original(), cured()], "plain", ["lines"])
    assert table.header == ("run", "readout", "plain top-1", "lines top-1")
    assert stripped(table)[0] == ("original", "cls", "62.5 [57.5–67.5]", "40.0 [35.0–45.0]")
    assert [row[:2] for row in table.rows[1:]] == [("cured", "cls"), ("cured", "cls_reg")]
    table = anomaly_table([original()], ["digits", "flags"], "msp")
    assert table.header == ("run", "readout", "mean AUROC", "mean FPR95", "digits FPR95", "flags FPR95")
    assert stripped(table)[0][2:] == (
        "75.0 [73.0–77.0]", "70.0 [60.0–80.0]", "50.0 [40.0–60.0]", "90.0 [80.0–100.0]",
    )  # fmt: skip


def test_every_classifier_that_a_run_has_is_a_row():
    table = classifier_table([original()], "plain", ["lines"])
    assert stripped(table) == [
        ("original", "linear probe", "62.5 [57.5–67.5]", "40.0 [35.0–45.0]"),
        ("original", "kNN", "50.0 [45.0–55.0]", "30.0 [25.0–35.0]"),
    ]


def test_detectors_are_rows_and_runs_columns():
    table = detector_table([original(), cured()], ["msp", "vim"])
    assert table.header == ("detector", "original", "cured")
    assert stripped(table) == [("msp", *["75.0 [73.0–77.0]"] * 2), ("vim", *["90.0 [88.0–92.0]"] * 2)]


def against_reference() -> Measured:
    """Its CLS differs from that of `original`, its cls_reg from its CLS, and its patch means from nothing."""
    readouts = {"cls": READOUT, "cls_reg": READOUT, "patch_mean": READOUT}
    return Measured("cured", "test_time", 1, readouts, IDENTIFY, CURED, within={"cls_reg-cls": DIFFERENCES},
                    reference="original", against={"cls-cls": DIFFERENCES})  # fmt: skip


def test_figures_whose_difference_leaves_out_zero_are_marked_better_or_worse():
    rows = accuracy_table([original(), against_reference()], "plain", ["lines"]).rows
    marks = [[cell[-1] for cell in row[2:]] for row in rows]
    assert marks == [[" ", " "], ["▲", "▼"], ["▲", "▼"], [" ", " "]]
    rows = anomaly_table([against_reference()], ["flags", "digits"], "msp").rows
    assert [cell[-1] for cell in rows[0][2:]] == ["▼", " ", "▼", "▲"]  # of FPR95 the smaller is the better
    assert detector_table([against_reference()], ["msp", "vim"]).rows == (
        ("msp", "75.0 [73.0–77.0] ▼"), ("vim", "90.0 [88.0–92.0] ▲"),
    )  # fmt: skip


def test_the_note_says_what_was_held_against_what():
    tables = [
        accuracy_table([original(), against_reference()], "plain", []),
        detector_table([against_reference()], ["msp"]),
    ]
    assert tables[0].note.endswith("(cls: cured against original; other readouts: against cls of the same run).")
    assert tables[1].note.endswith("(cls: cured against original).")
    assert accuracy_table([original()], "plain", []).note == ""


def test_paired_differences_are_listed_with_interval_and_p():
    table = difference_table([original(), against_reference()], "plain", "msp")
    assert table.rows[:4] == (
        ("cured − original", "cls", "plain top-1", "+2.0 [+1.5, +2.5]", "< 0.001"),
        ("cured − original", "cls", "ID + OOD top-1", "+0.1 [−0.4, +0.6]", "< 0.001"),
        ("cured − original", "cls", "mean AUROC", "−1.0 [−1.5, −0.5]", "< 0.001"),
        ("cured − original", "cls", "mean FPR95", "±0.0 [−0.5, +0.5]", "< 0.001"),
    )
    assert [row[:2] for row in table.rows[4:]] == [("cured", "cls_reg − cls")] * 4
    assert "not corrected for the number of rows" in table.note
    assert difference_table([original()], "plain", "msp").rows == ()


def test_what_rounds_to_nothing_has_no_sign():
    assert points({"d": -0.0002, "d_lo": -0.021, "d_hi": 0.0004}, "d") == "±0.0 [−2.1, ±0.0]"


def stripped(table: Table) -> list[tuple[str, ...]]:
    return [tuple(cell.strip() for cell in row) for row in table.rows]


def test_a_data_set_that_was_not_evaluated_is_named():
    with pytest.raises(
        ValueError, match=r"run 'original' has no metrics for cls\.ood\.sketch: 'sketch' is not among lines"
    ):
        accuracy_table([original()], "plain", ["sketch"])


def test_a_run_without_outliers_says_so_and_has_nothing_to_compare():
    identify = {"outliers_found": False, "outlier_fraction": 0.0, "num_neurons": 0}
    plain = Measured("intact", "none", 0, {"cls": READOUT}, identify, {"planted": False})
    assert outlier_table([plain, original()]).rows == (
        ("intact", "none found", "0", "–", "–", "–", "–", "–"),
        ("original", "1.850", "6", "0.900 [0.890–0.910]", "0.980 [0.970–0.990]", "0.950 [0.940–0.960]",
         "0.100 [0.090–0.110]", "0.300 [0.290–0.310]"),
    )  # fmt: skip


def test_the_controls_stand_beside_the_cure_and_backbones_without_outliers_get_no_row():
    found = {"num_neurons": 6, **around(outlier_fraction=0.02, outlier_fraction_after=0.01, outlier_fraction_ablated=0.01,
                                        outlier_fraction_empty=0.019, outlier_fraction_random=0.021)}  # fmt: skip
    table = control_table({"planted": found, "plain": {"num_neurons": 0}})
    (row,) = table.rows
    assert row[0] == "planted" and row[1] == "2.00 [1.00–3.00]" and row[-1] == "2.10 [1.10–3.10]"
    assert "must not cure" in table.note
    assert control_table({"plain": {"num_neurons": 0}}).rows == ()


def test_outliers_of_an_unplanted_backbone_are_those_of_the_search():
    untreated = Measured("hub", "none", 0, {}, IDENTIFY, {"planted": False})
    treated = Measured("hub_reg", "test_time", 1, {}, IDENTIFY, {"planted": False})
    assert (outlier_fraction(untreated), outlier_fraction(treated)) == (0.012, 0.0)


def test_all_checks_hold_where_neurons_are_found_and_the_run_is_cured():
    checks = list(self_checks([original(), cured()]))
    assert len(checks) == 10
    assert all(check.passed for check in checks)


@pytest.mark.parametrize(
    ("run", "failed"),
    [
        (original(outlier_fraction=0.031), "outlier fraction"),
        (original(outlier_fraction=0.0049), "outlier fraction"),
        (original(cls_cosine=0.931), "CLS cosine"),
        (original(outlier_patch_cosine=0.31), "outlier patch cosine"),
        (original(cls_attention_on_outliers=0.249), "CLS attention on outliers"),
        (cured(outlier_fraction=0.00021), "outlier fraction"),
        (cured(cls_cosine=0.949), "CLS cosine"),
        (cured(patch_cosine=0.979), "patch cosine"),
        (cured(cls_attention_on_outliers=0.021), "CLS attention on outliers"),
    ],
)
def test_a_figure_beyond_its_limit_fails(run, failed):
    assert [check.what for check in self_checks([run]) if not check.passed] == [failed]


@pytest.mark.parametrize("key", ["precision", "recall"])
def test_a_planted_neuron_missed_or_one_too_many_fails(key):
    run = original()
    found = Measured(run.name, run.registers, 0, run.evaluate, {**IDENTIFY, key: 5 / 6}, run.verify)
    assert [check.what for check in self_checks([found]) if not check.passed] == [f"{key} of the register neurons"]


def test_a_missing_figure_fails():
    metrics = copy.deepcopy(CURED)
    del metrics["cls_cosine"]
    (failed,) = [c for c in self_checks([Measured("cured", "test_time", 1, {}, IDENTIFY, metrics)]) if not c.passed]
    assert failed.text() == "FAIL  cured: CLS cosine missing (≥ 0.95)"


def test_runs_without_ground_truth_and_runs_of_several_registers_are_not_checked():
    assert list(self_checks([Measured("hub", "none", 0, {}, IDENTIFY, {"planted": False}), cured(2)])) == []


@pytest.mark.parametrize(
    ("low", "high", "words"), [(1, 1, "= 1"), (0.25, 1, "≥ 0.25"), (0, 0.02, "≤ 0.02"), (0.005, 0.03, "0.005 to 0.03")]
)
def test_a_limit_is_said_in_words(low, high, words):
    assert Check("run", "figure", 0.5, low, high).limit == words


def test_controls_are_not_held_to_the_cure():
    control = Measured("random", "test_time", 1, {}, IDENTIFY, CURED | {"outlier_fraction": 0.02}, "random")
    assert list(self_checks([control])) == []


def test_a_table_for_the_terminal_has_numbers_to_the_right():
    table = Table("Sizes", ("name", "n"), (("a", "5"), ("long name", "12")))
    assert table.text().splitlines() == ["Sizes", "name        n", "---------  --", "a           5", "long name  12"]


def test_a_note_is_wrapped_below_the_table_and_a_paragraph_in_markdown():
    table = Table("Sizes", ("name", "n"), (("a", "−5 ▲"), ("b", "2  ")), "word " * 30 + "end")
    lines = table.text().splitlines()
    assert lines[3:5] == ["a     −5 ▲", "b      2"] and lines[-1].endswith("end") and max(map(len, lines)) <= 120
    assert table.markdown().splitlines()[1:5] == ["| --- | --: |", "| a | −5 ▲ |", "| b | 2 |", ""]


def test_a_table_in_markdown_escapes_bars():
    table = Table("Sizes", ("name", "n"), (("a|b", "5"),))
    assert table.markdown().splitlines() == ["| name | n |", "| --- | --: |", "| a\\|b | 5 |"]


def test_the_readme_gets_the_tables_between_its_markers_and_keeps_the_rest(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_readme(path, [Table("Title", ("a", "b"), (("x", "1"),))])
    assert path.read_text() == f"before\n{BEGIN}\n\nTitle:\n\n| a | b |\n| --- | --: |\n| x | 1 |\n\n{END}\nafter\n"


def test_a_readme_without_markers_is_left_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("mine")
    with pytest.raises(SystemExit, match="must hold the lines"):
        write_readme(path, [])
    assert path.read_text() == "mine"


def test_a_reader_that_leaves_early_ends_it_in_silence(tmp_path):
    """As `| head` does: the script writes into a pipe that nobody reads any more."""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/differences.json").write_text("{}")
    stages = ("tokens", "attention", "discover", "segment", "depth", "zeroshot")
    empty = {key: {} for key in ("runs", "backbones", "datasets")} | {
        stage: {"datasets": [], "runs": []} for stage in stages
    }
    params = empty | {
        "compare": {"references": {}},
        "evaluate": {"detectors": ["msp"]},
        "in_distribution": "home",
        "seed": 0,
    }
    script = (
        f"import runpy, sys, types; sys.path.insert(0, {str(ROOT / 'stages')!r}); sys.argv[1:] = [];"
        f" sys.modules['params'] = types.SimpleNamespace(load_params=lambda: {params!r});"
        f" runpy.run_path({str(ROOT / 'regvit/pipeline/compare_runs.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", script]
    assert "there are none" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as left:
        left.stdout.close()
        assert left.stderr.read() == ""
    assert left.returncode == -signal.SIGPIPE
