"""The gate fails on a regression, passes noise, and says so in a table that a person reads in a minute."""

import json
import re
import sys
from pathlib import Path

import pytest
from git_repository import begin, commit, run

from regvit.pipeline.gate import Change, Rule, judge, main, markdown, read_rules

ROOT = Path(__file__).parents[2]
HIGHER = Rule("top1", "higher", 0.01)


def fails(old: float | None, new: float | None, rule: Rule) -> list[str]:
    return list(judge([Change("a", "top1", old, new)], [rule]).values())


@pytest.mark.parametrize(
    ("old", "new", "rule", "said"),
    [
        (0.6, 0.5, HIGHER, "0.6 → 0.5: 0.1 worse, more than the 0.01 allowed"),
        (0.6, 0.62, Rule("top1", "lower", 0.01), "0.02 worse"),
        (0.6, 0.62, Rule("top*", "equal", 0.01, "a"), "0.02 worse"),
        (0.6, None, HIGHER, "was 0.6 and is gone"),
        (0.6, 0.5, Rule("typo", "higher", 0), "the rule guards no metric"),
        (0.6, 0.5, Rule("top1", "higher", 0, "b"), "the rule guards no metric"),
    ],
)
def test_what_is_worse_than_allowed_gone_or_guarded_by_no_rule_fails(old, new, rule, said):
    (fault,) = fails(old, new, rule)
    assert said in fault


@pytest.mark.parametrize(("old", "new"), [(0.6, 0.59), (0.6, 0.7), (None, 0.1)])
def test_noise_gains_and_what_is_new_pass(old, new):
    assert fails(old, new, HIGHER) == []


def test_a_rule_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="better is 'up'; expected higher, lower, equal"):
        Rule("top1", "up", 0)
    with pytest.raises(ValueError, match="tolerance is -1; expected a number of at least 0"):
        Rule("top1", "higher", -1)


def test_the_markdown_has_a_row_a_figure_and_a_column_a_run_and_marks_what_fell():
    changes = [Change("a", "top1", 0.6, 0.5), Change("b", "top1", 0.6, 0.61), Change("a", "rmse", 0.5, 0.5)]
    text = markdown(changes, judge(changes, [HIGHER]), [("probe.steps", "1000", "500")])
    (row,) = [line for line in text.splitlines() if line.startswith("| top1")]
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["0.6 → 0.5 (-0.1000) ✗", "0.6 → 0.61 (+0.0100)"]
    assert "rmse" not in text and re.search(r"\| probe.steps +\| 1000 +\| 500 +\|", text)
    assert "**1 guarded figure(s) fell:**" in text and "- `a: top1`: 0.6 → 0.5" in text


def test_whatever_changed_it_fits_on_a_page():
    changes = [Change(f"run_{i}", f"m{j}", 0.6, 0.1) for i in range(3) for j in range(16)]
    params = [(f"probe.p{i}", "1", "2") for i in range(100)]
    text = markdown(changes, judge(changes, [Rule("*", "higher", 0)]), params)
    assert len(text.splitlines()) <= 60
    for said in ("**48 guarded figure(s) fell:**", "… and 33 more", "… and 85 more: `dvc params diff`"):
        assert said in text


def test_the_rules_of_the_repository_are_of_figures_that_the_summary_has():
    names = ["outliers", "cls_cosine", "on_outliers", "morans_i", "corloc", "miou", "rmse", "top1", "ood_top1", "ood_pair", "auroc", "fpr95"]  # fmt: skip
    changes = [Change(run, name, 0.5, 0.5) for run in ("original", "silenced", "test_time_reg") for name in names]
    rules = read_rules(ROOT / "guard.yaml")
    assert judge(changes, rules) == {}
    for name in names:
        assert any(rule.guards(Change("test_time_reg", name, 0, 0)) for rule in rules), name


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository with DVC, one parameter and the figures of one run; its main branch is the base."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "dvc.yaml").write_text("metrics: [metrics/run.json]\nparams: [params.yaml]\n")
    (folder / "guard.yaml").write_text("- {metric: top1, better: higher, tolerance: 0.05}\n")
    write(folder, 0.6, 1000)
    begin(folder)
    commit(folder, "base")
    return folder


def write(folder: Path, value: float | None, steps: int) -> None:
    (folder / "metrics").mkdir(exist_ok=True)
    (folder / "metrics/run.json").write_text(json.dumps({} if value is None else {"top1": value}))
    (folder / "params.yaml").write_text(f"probe: {{steps: {steps}}}\n")


@pytest.fixture
def gate(repository, monkeypatch, capsys):
    """What the gate ends with and prints in the repository."""
    monkeypatch.chdir(repository)

    def gate(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gate", *arguments])
        return main(), capsys.readouterr().out

    return gate


def test_a_regression_fails_noise_passes_and_no_metric_fails(repository, gate):
    write(repository, 0.4, steps=10)
    fell = run(repository, sys.executable, "-m", "regvit.pipeline.gate", "--out", "comment.md", check=False)
    assert fell.returncode == 1 and "0.6 → 0.4" in fell.stdout and "probe.steps" in fell.stdout, fell.stderr
    assert (repository / "comment.md").read_text().strip() == fell.stdout.strip()
    write(repository, 0.57, steps=1000)
    code, noise = gate()
    assert code == 0 and "No guarded figure fell." in noise and "-0.0300" in noise
    write(repository, None, steps=1000)
    code, gone = gate()
    assert code == 1 and "was 0.6 and is gone" in gone


def test_it_says_what_is_wrong_without_a_traceback(repository, gate, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"^gate: dvc metrics diff nowhere failed: "):
        gate("--against", "nowhere")
    (tmp_path / "guard.yaml").write_text("- {metric: a, better: higher, limit: 1}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="an entry has the keys metric, better and tolerance"):
        gate()
