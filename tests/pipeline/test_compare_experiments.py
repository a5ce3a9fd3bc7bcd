"""Experiments are compared by what lies in git and in DVC's cache, image by image, without a checkout."""

import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo
from git_repository import begin, commit, run
from report_example import params, write_predictions, write_study
from ruamel.yaml import YAML

from regvit.pipeline import compare_runs
from regvit.pipeline.compare_experiments import OUTPUTS


def leave(better: float) -> None:
    """A state of the study, tracked by git and DVC; `better`: of the cured run, in CLS cosine and in accuracy."""
    for output in OUTPUTS:
        shutil.rmtree(output, ignore_errors=True)
    study = write_study(Path("metrics"))
    for name in study.runs:
        write_predictions(
            Path(f"features/predictions/{name}.zarr"), study, name, 5 * better if name == "cured" else 0.0
        )
    images = Path("metrics/runs/cured/verify/images.csv")
    lines = images.read_text().splitlines()
    place = lines[0].split(",").index("cls_cosine")
    rows = [line.split(",") for line in lines[1:]]
    for row in rows:
        row[place] = str(float(row[place]) + 0.01 * better)
    images.write_text("\n".join([lines[0], *(",".join(row) for row in rows)]) + "\n")
    figures = images.with_name("figures.csv")
    figures.write_text(figures.read_text().replace("cls_cosine,0.96,", f"cls_cosine,{0.96 + 0.01 * better:.2f},"))
    with Repo() as repo:
        repo.add(list(OUTPUTS))
    commit(Path(), f"better {better}")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        begin(folder)
        YAML().dump(params(), Path("params.yaml"))
        leave(0.0)
        run(folder, "git", "tag", "first")
        leave(1.0)
    return folder


@pytest.fixture
def repository(built, monkeypatch) -> Path:
    monkeypatch.chdir(built)
    return built


def test_a_commit_and_the_working_tree_are_paired_image_by_image(repository, capsys):
    assert compare_runs.main("first", "workspace") == 0
    said = capsys.readouterr().out
    (cosine,) = [line for line in said.splitlines() if line.startswith("cured") and "CLS cosine" in line]
    assert "0.960" in cosine and "0.970" in cosine and "+0.010 [+0.010, +0.010] ▲" in cosine
    assert "intact" not in said and "original" not in said  # nothing differs there


def test_what_is_the_same_is_said_to_be(repository, capsys):
    compare_runs.main("main", "workspace")
    assert "workspace has the same figures as main" in capsys.readouterr().out


def test_an_unknown_name_and_one_name_alone_are_refused_in_a_line(repository):
    with pytest.raises(SystemExit, match=r"compare: nowhere: .*is it an experiment, branch or commit"):
        compare_runs.main("nowhere", "workspace")
    with pytest.raises(SystemExit, match="usage: make compare EXPS="):
        compare_runs.main("first")


def test_results_that_are_not_in_the_cache_are_named(repository, tmp_path, monkeypatch):
    shutil.copytree(repository, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    shutil.rmtree(".dvc/cache")
    with pytest.raises(SystemExit, match=r"compare: first: .*and its results in the cache"):
        compare_runs.main("first", "workspace")
