"""Tables and self-checks from metrics files written by hand."""

import copy
import sys
from pathlib import Path

import pytest

from regvit.compare import Check, Measured, Table, accuracy_table, outlier_fraction, outlier_table, self_checks

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "stages"))

from compare import BEGIN, END, write_readme  # noqa: E402
from reproduce import follow, times  # noqa: E402


def top1(value: float) -> dict:
    return {"top1": value, "top1_lo": value - 0.05, "top1_hi": value + 0.05, "n": 100}


def anomaly(auroc: float, fpr95: float) -> dict:
    return {"msp": {"auroc": auroc, "fpr95": fpr95, "fpr95_lo": fpr95 - 0.1, "fpr95_hi": fpr95 + 0.1}}


READOUT = {
    "id": top1(0.625),
    "ood": {"lines": top1(0.4)},
    "anomaly": {"flags": anomaly(0.7, 0.9), "digits": anomaly(0.8, 0.5)},
}
IDENTIFY = {"outliers_found": True, "outlier_fraction": 0.012, "outlier_fraction_after": 0.0, "num_neurons": 6,
            "precision": 1.0, "recall": 1.0}  # fmt: skip
SPOILT = {"planted": True, "outlier_fraction": 0.0185, "cls_cosine": 0.9, "patch_cosine": 0.95,
          "outlier_patch_cosine": 0.1, "cls_attention_on_outliers": 0.3}  # fmt: skip
CURED = {"planted": True, "outlier_fraction": 0.0, "cls_cosine": 0.97, "patch_cosine": 0.99,
         "outlier_patch_cosine": 0.985, "cls_attention_on_outliers": 0.007}  # fmt: skip


def original(**changed) -> Measured:
    return Measured("original", "none", 0, {"cls": READOUT}, IDENTIFY, SPOILT | changed)


def cured(num_registers: int = 1, **changed) -> Measured:
    readouts = {"cls": READOUT, "reg_mean": READOUT, "cls_reg": READOUT}
    return Measured("cured", "test_time", num_registers, readouts, IDENTIFY, CURED | changed)


def test_a_row_is_a_run_and_readout_in_percent_with_intervals():
    table = accuracy_table([original(), cured()], "plain", ["lines"], ["digits", "flags"], "msp")
    assert table.header == (
        "run", "readout", "plain top-1", "lines top-1", "mean AUROC", "digits FPR95", "flags FPR95",
    )  # fmt: skip
    assert table.rows[0] == (
        "original", "cls", "62.5 [57.5–67.5]", "40.0 [35.0–45.0]", "75.0", "50.0 [40.0–60.0]", "90.0 [80.0–100.0]",
    )  # fmt: skip
    assert [row[:2] for row in table.rows[1:]] == [("cured", "cls"), ("cured", "cls_reg")]


def test_without_anomaly_sets_there_are_no_anomaly_columns():
    assert accuracy_table([original()], "plain", ["lines"], [], "msp").header[-1] == "lines top-1"


def test_a_data_set_that_was_not_evaluated_is_named():
    with pytest.raises(
        ValueError, match=r"run 'original' has no metrics for cls\.ood\.sketch: 'sketch' is not among lines"
    ):
        accuracy_table([original()], "plain", ["sketch"], [], "msp")


def test_a_run_without_outliers_says_so_and_has_nothing_to_compare():
    identify = {"outliers_found": False, "outlier_fraction": 0.0, "num_neurons": 0}
    plain = Measured("intact", "none", 0, {"cls": READOUT}, identify, {"planted": False})
    assert outlier_table([plain, original()]).rows == (
        ("intact", "none found", "0", "–", "–", "–", "–"),
        ("original", "1.850", "6", "0.900", "0.950", "0.100", "0.300"),
    )


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


def test_a_table_for_the_terminal_has_numbers_to_the_right():
    table = Table("Sizes", ("name", "n"), (("a", "5"), ("long name", "12")))
    assert table.text().splitlines() == ["Sizes", "name        n", "---------  --", "a           5", "long name  12"]


def test_a_table_in_markdown_escapes_bars():
    table = Table("Sizes", ("name", "n"), (("a|b", "5"),))
    assert table.markdown().splitlines() == ["| name | n |", "| --- | --: |", "| a\\|b | 5 |"]


def test_the_time_of_each_stage_is_taken_from_what_dvc_says(capsys):
    lines = [
        "Stage 'download@a' didn't change, skipping\n",
        "Running stage 'extract@r-a':\n", "> python stages/extract.py r a\n", "Updating lock file 'dvc.lock'\n", "\n",
        "Stage 'probe@r' is cached - skipping run, checking out outputs\n",
        "Running stage 'report':\n", "> python stages/report.py\n",
    ]  # fmt: skip
    seconds = iter([10.0, 14.5, 20.0, 21.0])
    ran, restored = follow(lines, clock=lambda: next(seconds))
    assert ran == [("extract@r-a", 4.5), ("report", 1.0)]
    assert restored == ["probe@r"]
    assert "download@a" not in capsys.readouterr().out
    assert times(ran, restored, 12.0).splitlines() == [
        "extract@r-a     4.5 s", "report          1.0 s", "2 stages ran, 1 restored from the cache: 12.0 s",
    ]  # fmt: skip


def test_it_says_so_when_nothing_reran():
    assert times([], [], 2.04) == "nothing reran: everything is up to date (2.0 s)"


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
