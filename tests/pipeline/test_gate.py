import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from regvit.pipeline.gate import Change, Rule, changes, flatten, judge, markdown

STAGES = Path(__file__).parents[2] / "stages"


def top1(value, low=None, high=None):
    return {"cls": {"id": {"top1": value} | ({} if low is None else {"top1_lo": low, "top1_hi": high})}}


def compared(old, new, rule):
    return judge(changes(flatten({"m.json": old}), flatten({"m.json": new})), [rule])


HIGHER = Rule("m.json:*.top1", "higher", 0.01)


def test_flatten_names_values_by_file_and_keys_and_leaves_out_text():
    assert flatten({"a/b.json": {"x": {"y": 0.5, "why": "text"}, "ok": True}}) == {
        "a/b.json:x.y": 0.5,
        "a/b.json:ok": 1.0,
    }


def test_the_ends_of_an_interval_get_no_row_of_their_own():
    (change,) = changes(flatten({"m.json": top1(0.6, 0.5, 0.7)}), {})
    assert change == Change("m.json:cls.id.top1", 0.6, None, (0.5, 0.7), None)


def test_a_drop_outside_the_old_interval_fails_and_says_by_how_much():
    (failure,) = compared(top1(0.6, 0.55, 0.65), top1(0.5, 0.45, 0.55), HIGHER)
    assert failure.name == "m.json:cls.id.top1"
    assert (
        failure.reason
        == "0.6 → 0.5: 0.1 worse, more than the 0.01 allowed and lies outside the old interval [0.55, 0.65]"
    )


@pytest.mark.parametrize("new", [0.56, 0.595, 0.7])
def test_noise_inside_the_interval_and_gains_pass(new):
    assert not compared(top1(0.6, 0.55, 0.65), top1(new, new - 0.05, new + 0.05), HIGHER)


def test_without_an_interval_the_tolerance_alone_decides():
    assert not compared(top1(0.6), top1(0.59), HIGHER)
    assert compared(top1(0.6), top1(0.58), HIGHER)
    assert not compared(top1(0.6), top1(0.61), Rule("m.json:*top1", "lower", 0.01))
    assert compared(top1(0.6), top1(0.62), Rule("m.json:*top1", "lower", 0.01))
    assert compared(top1(0.6), top1(0.62), Rule("m.json:*top1", "equal", 0.01))


def test_a_guarded_metric_that_is_gone_fails():
    (failure,) = compared(top1(0.6), {"cls": {"id": {}}}, HIGHER)
    assert "was 0.6 and is gone" in failure.reason


def test_a_rule_that_guards_nothing_fails():
    (failure,) = compared(top1(0.6), top1(0.6), Rule("metrics/typo.json:*", "higher", 0))
    assert "guards no metric" in failure.reason


def test_a_new_metric_has_nothing_to_fall_from():
    assert not compared({"cls": {"id": {}}}, top1(0.1), HIGHER)


def test_an_unknown_direction_and_a_negative_tolerance_are_refused():
    with pytest.raises(ValueError, match="better is 'up'; expected higher, lower, equal"):
        Rule("*:*", "up", 0)
    with pytest.raises(ValueError, match="tolerance is -1; expected a number of at least 0"):
        Rule("*:*", "higher", -1)


def test_a_pattern_without_file_or_key_and_an_exception_that_is_no_list_are_refused():
    for metric in ("*top1", "a.json:", ":top1", 7):
        with pytest.raises(ValueError, match="expected '<file>:<key>'"):
            Rule(metric, "higher", 0)
    with pytest.raises(ValueError, match="without is 'cls'; expected a list of patterns of keys"):
        Rule("*:*", "higher", 0, "cls")


def test_a_star_stays_in_its_folder_and_an_exception_is_of_keys():
    rule = Rule("a/*.json:*.top1", "higher", 0, ["noise.*"])
    assert rule.guards("a/run.json:cls.id.top1")
    assert not rule.guards("a/run/differences.json:cls.id.top1")
    assert not rule.guards("run.json:cls.id.top1")
    assert not rule.guards("a/run.json:noise.id.top1")
    assert not rule.guards("a/run.json:cls.id.top1_lo")
    assert Rule("a/*/*.json:n", "equal", 0).guards("a/run/data.json:n")


def test_the_markdown_shows_changes_with_intervals_and_parameters():
    table = changes(flatten({"m.json": top1(0.6, 0.5, 0.7)}), flatten({"m.json": top1(0.65, 0.6, 0.7)}))
    text = markdown(table, [], [("probe.steps", "1000", "500")])
    assert "| `m.json:cls.id.top1` | 0.6 [0.5, 0.7] | 0.65 [0.6, 0.7] | +0.05 |" in text
    assert "| `probe.steps` | 1000 | 500 |" in text
    assert "No guarded metric fell." in text


def test_guarded_metrics_come_first_and_of_the_others_those_that_moved_furthest():
    def content(guarded, little, far, plain):
        values = {
            "top1": guarded,
            "a": little,
            "a_lo": 0.0,
            "a_hi": 1.0,
            "b": far,
            "b_lo": 0.4,
            "b_hi": 0.6,
            "c": plain,
        }
        return flatten({"m.json": {"z": values}})

    table = changes(content(0.5, 0.5, 0.5, 5), content(0.6, 0.6, 0.6, 500))
    text = markdown(table, [], [], [HIGHER])
    assert re.findall(r"`m.json:z\.(\w+)`", text) == ["top1", "b", "a", "c"]
    first, second = text.split("| other metric |")
    assert "| guarded metric |" in first and "z.top1" in first and "z.top1" not in second
    assert "z.top1" in markdown(table, [], [], [HIGHER], limit=1000)
    assert "guarded" not in markdown(table, [], []).replace("No guarded metric fell.", "")


def test_a_comment_is_cut_to_the_length_that_it_may_have_and_says_what_is_left_out():
    old = flatten({"m.json": {f"cls{i}": top1(0.6, 0.5, 0.7)["cls"] for i in range(900)}})
    new = flatten({"m.json": {f"cls{i}": top1(0.3, 0.2, 0.4)["cls"] for i in range(900)}})
    table = changes(old, new)
    failures = judge(table, [HIGHER])
    params = [(f"probe.{i}", "1", "2") for i in range(5000)]
    whole = markdown(table, failures, params)
    assert len(whole) > 100_000 and whole.count("| 0.6 [0.5, 0.7] | 0.3 [0.2, 0.4] | -0.3 |") == 900
    cut = markdown(table, failures, params, limit=65_536)
    assert 50_000 < len(cut) <= 65_536
    assert "**900 guarded metric(s) fell:**" in cut
    left = [
        int(number) for number in re.findall(r"… and (\d+) more, which `regvit/pipeline/gate_commands.py` prints.", cut)
    ]
    shown = [cut.count("- `m.json:"), cut.count("| `probe."), cut.count("| `m.json:")]
    assert [a + b for a, b in zip(left, shown, strict=True)] == [900, 5000, 900]
    assert markdown(table, failures, [], limit=10**9) == markdown(table, failures, [])


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with DVC, one parameter and one metric; its main branch is the base."""
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for name, value in {"PATH": path, "GIT_CONFIG_GLOBAL": os.devnull}.items():
        monkeypatch.setenv(name, value)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "tester")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "tester@example.org")
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main"], check=True)
    subprocess.run(["dvc", "init", "--quiet"], check=True)
    Path("guard.yaml").write_text('- {metric: "metrics/*.json:*.top1", better: higher, tolerance: 0.01}\n')
    write(0.6, steps=1000)
    Path("dvc.yaml").write_text("params:\n  - params.yaml\n")
    subprocess.run("git add --all && git commit --quiet --message base", shell=True, check=True)
    return tmp_path


def write(value, steps):
    Path("metrics").mkdir(exist_ok=True)
    Path("metrics/run.json").write_text(json.dumps(top1(value, value - 0.05, value + 0.05)))
    Path("params.yaml").write_text(f"probe: {{steps: {steps}}}\n")


def gate(*arguments):
    return subprocess.run([sys.executable, STAGES / "gate.py", *arguments], capture_output=True, text=True)


def test_the_script_fails_on_a_regression_and_passes_on_noise(repository):
    write(0.4, steps=10)
    fell = gate("--out", "comment.md")
    assert fell.returncode == 1, fell.stderr
    assert "0.6 → 0.4" in fell.stdout and "| `probe.steps` | 1000 | 10 |" in fell.stdout
    assert Path("comment.md").read_text().strip() == fell.stdout.strip()
    write(0.57, steps=1000)
    noise = gate()
    assert noise.returncode == 0, noise.stderr
    assert "No guarded metric fell." in noise.stdout and "-0.03" in noise.stdout


def test_the_script_says_what_is_wrong_without_a_traceback(repository):
    unknown = gate("--against", "nowhere")
    assert unknown.returncode == 1 and "gate: git ls-tree" in unknown.stderr and "Traceback" not in unknown.stderr
    Path("guard.yaml").write_text("- {metric: a, better: higher, limit: 1}\n")
    wrong = gate()
    assert wrong.returncode == 1 and "an entry has the keys metric, better and tolerance" in wrong.stderr


@pytest.fixture(scope="module")
def committed():
    """The rules of the repository, and contents of its metric files by path."""
    root = Path(__file__).parents[2]
    sys.path.insert(0, str(STAGES))
    try:
        from regvit.pipeline.gate_commands import read_rules
    finally:
        sys.path.remove(str(STAGES))
    paths = sorted(root.glob("metrics/**/*.json"))
    files = {path.relative_to(root).as_posix(): json.loads(path.read_text()) for path in paths}
    return read_rules(root / "guard.yaml"), files


def shifted(files, readout, by):
    """The metrics if one readout got `by` more (or fewer) of openmoji right in every run, and nothing else changed."""
    files = copy.deepcopy(files)

    def add(values, amount):
        for name in ("top1", "top1_lo", "top1_hi"):
            values[name] += amount

    for path, content in files.items():
        if re.fullmatch(r"metrics/evaluate/\w+\.json", path):
            add(content[readout]["ood"]["openmoji"], by)
        elif re.fullmatch(r"metrics/evaluate/\w+/differences\.json", path):
            for pair, values in content["differences"].items():
                better, reference = pair.split("-")
                sign = (better == readout) - (reference == readout)
                add(values["ood"]["openmoji"], sign * by)
    return files


def test_every_rule_of_the_repository_guards_a_metric_that_is_committed(committed):
    rules, files = committed
    assert judge(changes(flatten(files), flatten(files)), rules) == []


@pytest.mark.parametrize(("readout", "by"), [("cls", 0.06), ("cls", 0.3), ("cls_noise", -0.3)])
def test_a_gain_of_one_readout_and_a_loss_of_a_control_pass(committed, readout, by):
    rules, files = committed
    table = changes(flatten(files), flatten(shifted(files, readout, by)))
    moved = [change.name for change in table if change.old != change.new]
    assert any("differences.json" in name for name in moved) and any("differences" not in name for name in moved)
    assert judge(table, rules) == []


@pytest.mark.parametrize("readout", ["cls", "patch_mean"])
def test_a_loss_of_one_readout_fails_in_every_run(committed, readout):
    rules, files = committed
    failures = judge(changes(flatten(files), flatten(shifted(files, readout, -0.1))), rules)
    runs = {path for path in files if re.fullmatch(r"metrics/evaluate/\w+\.json", path)}
    assert {failure.name for failure in failures} == {f"{run}:{readout}.ood.openmoji.top1" for run in runs}
