"""Experiments are read out of git and DVC's cache, in a repository of two commits and one experiment."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from test_experiments import PLAN, predictions

from regvit.measures.evaluation import draw, evaluate, rounded
from regvit.probing.predictions import save_predictions

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "stages"))

from regvit.pipeline.experiment_commands import main, show  # noqa: E402
from regvit.pipeline.experiment_trees import commit_of  # noqa: E402

KEPT = Path("features/cured/predictions.safetensors")
PARAMS = {
    "seed": 0,
    "in_distribution": "home",
    "datasets": {"home": {"role": "id"}, "lines": {"role": "ood"}, "flags": {"role": "anomaly"}},
    "runs": {"cured": {"backbone": "vit", "registers": "test_time", "num_registers": 1}},
    "evaluate": {"detectors": ["msp"], "bootstrap": 50},
}
LOCK = {"stages": {"download@home": {"outs": [{"path": "data/home", "md5": "a.dir"}]}}}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def leave(seed: int, shift: float) -> None:
    """Metrics and predictions of one state, tracked by git and DVC."""
    found = predictions(seed, shift=shift)
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    save_predictions(KEPT, found)
    digest = hashlib.sha256(KEPT.read_bytes()).hexdigest()
    for path, content in {
        "evaluate/cured.json": rounded(evaluate(draw(found, PLAN), PLAN)),
        "evaluate/cured/differences.json": {"predictions_sha256": digest},
        "identify/vit.json": {"outliers_found": True, "outlier_fraction_after": 0.0, "images": 8},
        "verify/cured.json": {"planted": True, "outlier_fraction": seed / 100, "images": 8},
        "summary.json": {"cured": {"top1": seed / 10, "auroc": 0.5}},
    }.items():
        file = Path("metrics") / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    run(sys.executable, "-m", "dvc", "add", "--quiet", str(KEPT))
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "--message", f"state {seed}")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """`first`: a tag; `trial`: an experiment; the working tree is that of the experiment."""
    folder = tmp_path_factory.mktemp("repository")
    before = os.getcwd()
    os.chdir(folder)
    try:
        run("git", "init", "--quiet", "--initial-branch", "main")
        for key, value in (("user.name", "t"), ("user.email", "t@t"), ("commit.gpgsign", "false")):
            run("git", "config", key, value)
        run(sys.executable, "-m", "dvc", "init", "--quiet")
        for name, content in (("params.yaml", PARAMS), ("dvc.lock", LOCK)):
            YAML().dump(content, Path(name))
        leave(1, 0.0)
        run("git", "tag", "first")
        leave(2, 2.0)
        head = run("git", "rev-parse", "HEAD").strip()
        run("git", "update-ref", f"refs/exps/ab/{'c' * 38}/trial", head)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def repository(built, monkeypatch) -> Path:
    monkeypatch.chdir(built)
    return built


def compare(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["experiments.py", "compare", *arguments])
    main()


def test_experiments_are_tabled_with_paired_intervals_and_a_picture(repository, monkeypatch, capsys, tmp_path):
    compare(monkeypatch, "first", "trial", "--out", str(tmp_path / "out"))
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "top-1 from cls, %" in line and "home" in line]
    assert "▲" in line and "†" not in line  # the right class was made likelier, and the images pair
    (line,) = [line for line in text.splitlines() if "outlier patches, %" in line]
    assert "+1.00 †" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.csv", "compare.md", "compare.png"]


def test_the_working_tree_can_be_one_of_them_and_is_left_as_it_is(repository, monkeypatch, capsys, tmp_path):
    compare(monkeypatch, "trial", "workspace", "--out", str(tmp_path))
    assert "rows in which nothing differs are left out" in capsys.readouterr().out
    assert run("git", "status", "--porcelain") == ""


def test_without_the_predictions_in_the_cache_it_says_so_and_pairs_nothing(repository, monkeypatch, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    monkeypatch.chdir(copy)
    shutil.rmtree(copy / ".dvc/cache")
    compare(monkeypatch, "first", "workspace", "--out", str(tmp_path))
    said = capsys.readouterr()
    assert "first: features/cured/predictions.safetensors is neither in the cache nor on a remote" in said.err
    (line,) = [line for line in said.out.splitlines() if "top-1 from cls, %" in line and "home" in line]
    assert "†" in line


def test_predictions_that_the_metrics_were_not_made_from_are_not_used(repository, monkeypatch, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    monkeypatch.chdir(copy)
    (copy / KEPT).unlink()
    (copy / KEPT).write_bytes(b"another")
    compare(monkeypatch, "first", "workspace", "--out", str(tmp_path))
    assert f"workspace: {KEPT} is not what its metrics were made from" in capsys.readouterr().err


def test_an_experiment_is_found_by_its_name_and_an_unknown_one_is_refused(repository):
    assert commit_of("trial") == commit_of("HEAD") != commit_of("first")
    with pytest.raises(SystemExit, match="there is no experiment, branch, tag or commit 'gone'; experiments: trial"):
        commit_of("gone")


def test_columns_are_what_was_changed_and_the_summary(repository, monkeypatch):
    called = []
    monkeypatch.setattr(subprocess, "call", lambda command: called.append(command) or 0)
    assert show(["--md"]) == 0
    (command,) = called

    drop, keep = (re.compile(command[command.index(option) + 1]) for option in ("--drop", "--keep"))
    columns = ["Experiment", "Created", "cured.top1", "cured.auroc", "metrics/summary.json:cured.top1", "seed", "datasets.home.role", "params.yaml:seed"]  # fmt: skip
    assert not any(drop.match(column) for column in columns)
    assert (
        drop.match("cls.id.top1")
        and drop.match("metrics/verify/cured.json:outlier_fraction")
        and drop.match("data/home")
    )
    assert [column for column in columns if keep.match(column)] == ["cured.top1", "metrics/summary.json:cured.top1"]
    assert command[-1] == "--md"
