"""compare, summary and report on the tables of the default run's stages: every figure gets where it belongs."""

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from report_example import write_predictions, write_study

from regvit.pipeline import compare_runs
from regvit.pipeline.params import load_params
from regvit.report.study import Study

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "stages"))
import compare  # noqa: E402
import report  # noqa: E402
import summary  # noqa: E402


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Study:
    """Everything that the three stages leave, for the parameters of the repository."""
    folder = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(ROOT / "params.yaml", folder)
        study = write_study(Path("metrics"), of=load_params().model_dump())
        for run in study.runs:
            write_predictions(
                Path(f"features/predictions/{run}.zarr"), study, run, 5.0 if run == "test_time_reg" else 0.0
            )
        compare.main()
        for run in study.runs:
            summary.main(run)
        report.main()
    return study


@pytest.fixture
def project(built, tmp_path_factory, monkeypatch) -> Study:
    monkeypatch.chdir(next(path for path in tmp_path_factory.getbasetemp().glob("reported*")))
    return built


def test_figures_and_differences_of_every_stage_stand_in_one_table_each(project):
    figures = pd.read_csv("metrics/compare/figures.csv")
    assert set(figures["stage"]) == {"identify", "probe", "evaluate", "verify", "attention", "tokens", "discover", "segment", "depth",
                                    "hummingbird", "correspond", "retrieve"}  # fmt: skip
    assert set(figures["run"]) == {*project.runs, *project.backbones}
    differences = pd.read_csv("metrics/compare/differences.csv").query(
        "run == 'test_time_reg' and reference == 'original'"
    )
    assert {"evaluate", "verify", "attention", "tokens", "segment", "depth"} <= set(differences["stage"])
    (top1,) = differences.query("metric == 'top1' and dataset == 'twemoji' and readout == 'cls'").itertuples()
    assert top1.difference > 0.3 and top1.lo > 0 and top1.p < 0.05


def test_readouts_are_held_against_cls_of_the_same_run(project):
    differences = pd.read_csv("metrics/compare/differences.csv").query("run == reference")
    assert set(differences["reference_readout"]) == {"cls"}
    assert set(differences["readout"]) == {"patch_mean"}


def test_a_run_has_its_row_of_figures(project):
    figures = json.loads(Path("metrics/test_time_reg.json").read_text())
    assert {"outliers", "top1", "ood_top1", "miou"} <= set(figures) and len(figures) <= 16
    assert {"outliers", "top1", "ood_top1"} <= set(json.loads(Path("metrics/original.json").read_text()))


def test_page_and_plots_are_there(project):
    assert "test_time_reg − original" in Path("metrics/report.html").read_text()
    assert len(list(Path("metrics/plots").glob("*.csv"))) == 7


def test_the_comparison_is_printed_and_fails_with_a_check(project, capsys):
    assert compare_runs.main() == 0
    said = capsys.readouterr().out
    assert "What registers change" in said and "All 12 self-checks hold." in said
    assert re.search(r"twemoji +40 ", said)  # images are counted in whole numbers
    table = Path("metrics/compare/figures.csv")
    before = table.read_text()
    table.write_text("\n".join(line for line in before.splitlines() if ",recall," not in line) + "\n")
    assert compare_runs.main() == 1
    assert "FAIL  original: recall of the register neurons missing (= 1)" in capsys.readouterr().out
    table.write_text(before)


def test_the_readme_gets_the_table_between_its_markers(project, capsys):
    readme = Path("README.md")
    readme.write_text(f"before\n{compare_runs.BEGIN}\nold\n{compare_runs.END}\nafter\n")
    compare_runs.main("--readme")
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert 10 <= sum(line.startswith("|") for line in text.splitlines()) <= 12
    readme.write_text("nothing")
    with pytest.raises(SystemExit, match="must hold the lines"):
        compare_runs.main("--readme")


def test_without_results_it_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    with pytest.raises(SystemExit, match=r"there is no metrics/compare/figures\.csv: run `dvc repro` first"):
        compare_runs.main()
