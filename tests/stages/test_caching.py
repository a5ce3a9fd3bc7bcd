"""What reruns: `dvc repro`, as `make repro` runs it, with this repository's dvc.yaml and stages, on drawings and timm's `test_vit`.

One pipeline is built once (folders of images and a weights file as sources, so that nothing is fetched), and every test
starts from it: it changes one thing, reads from DVC's output which stages ran, and the fixture puts the change back.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from small_pipeline import WARM, YAML_FILE, Pipeline, commit, lay_out

from regvit.pipeline.warm_python import warm_python

RUNS = ("original", "cured")
AFTER_PROBES = {"compare", "report", *(f"{stage}@{run}" for stage in ("evaluate", "summary") for run in RUNS)}
UNUSED = {"discover", "discover_published", "zeroshot", "zeroshot_segment"}  # without a data set
MEASURED = ("tokens", "attention", "segment", "depth", "hummingbird", "correspond")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Iterator[Pipeline]:
    """The pipeline, run once."""
    folder = tmp_path_factory.mktemp("pipeline")
    lay_out(folder, {})
    with warm_python(**WARM) as python:
        pipeline = Pipeline(folder, python)
        ran, restored = pipeline.repro()
        stages = set(YAML_FILE.load(folder / "dvc.yaml")["stages"]) - UNUSED
        assert {name.partition("@")[0] for name in ran} == stages
        assert not restored
        commit(folder, "results")
        yield pipeline


@pytest.fixture
def pipeline(built) -> Iterator[Pipeline]:
    """The pipeline as built; afterwards its parameters, code and outputs are put back."""
    yield built
    (built.folder / "runtime.yaml").unlink(missing_ok=True)
    for name in ("data", "features", "metrics"):
        shutil.rmtree(built.folder / name)
    subprocess.run(["git", "checkout", "--quiet", "."], cwd=built.folder, check=True)
    built.run("dvc", "checkout", "--quiet", "--force")


def users_of(pipeline: Pipeline, module: str) -> set[str]:
    """Stages whose script imports a file of the library."""
    stages = YAML_FILE.load(pipeline.folder / "dvc.yaml")["stages"]
    recorded = pipeline.folder.glob("metrics/fingerprint/*.json")
    scripts = {f"stages/{file.stem}.py" for file in recorded if module in json.loads(file.read_text())}
    return {name for name, stage in stages.items() if stage.get("do", stage)["cmd"].split()[1] in scripts} - UNUSED


def test_what_is_made_is_not_in_git_but_the_figures_of_the_runs_and_the_lock(pipeline):
    tracked = pipeline.run("git", "ls-files", "data", "features", "metrics", "dvc.lock").stdout.split()
    assert tracked == ["dvc.lock", "metrics/cured.json", "metrics/original.json"]
    assert pipeline.run("git", "status", "--short").stdout == ""
    made = [pipeline.folder / name for name in ("data", "features", "metrics")]
    assert not [file for folder in made for file in folder.rglob(".gitignore")]  # DVC wrote none
    figures = json.loads((pipeline.folder / "metrics/cured.json").read_text())
    assert 1 <= len(figures) <= 16 and all(isinstance(value, float | int) for value in figures.values())


def test_nothing_reruns_where_nothing_changed_but_batch_size_workers_and_device(pipeline):
    (pipeline.folder / "runtime.yaml").write_text("batch_size: 3\n")
    assert pipeline.repro(REGVIT_WORKERS="1", REGVIT_DEVICE="cpu") == (set(), set())


def test_a_probe_learning_rate_reruns_the_probes_and_what_follows_and_going_back_restores(pipeline):
    pipeline.change("probe", "learning_rates", to=[0.5])
    following = {"probe@original", "probe@cured"} | AFTER_PROBES
    ran, _ = pipeline.repro()
    assert {"probe@original", "probe@cured", "evaluate@original", "evaluate@cured"} <= ran <= following
    pipeline.change("probe", "learning_rates", to=[0.1])
    ran, restored = pipeline.repro()
    assert not ran and {"probe@original", "probe@cured", "evaluate@original", "evaluate@cured"} <= restored <= following


def test_a_new_ood_set_runs_its_own_download_and_extract_then_evaluate_and_what_compares(pipeline):
    datasets = YAML_FILE.load(pipeline.folder / "params.yaml")["datasets"]
    pipeline.change("datasets", to={"later": {"source": "folder:images/later", "role": "ood"}} | datasets)
    ran, restored = pipeline.repro()
    assert ran == {"download@later", "extract@original-later", "extract@cured-later"} | AFTER_PROBES
    assert not restored


def test_the_number_of_registers_reruns_only_what_test_time_runs_make(pipeline):
    pipeline.change("runs", "cured", "num_registers", to=2)
    assert pipeline.would_run() == {"compose@cured", "compare", "report", "summary@cured"}
    following = pipeline.would_run("--force", "--downstream", "compose@cured")
    extracted = {"extract@cured-plain", "extract@cured-shifted"}
    extracted |= {f"extract_dense@cured-{name}" for name in ("rooms", "plain")}
    measured = {f"{stage}@cured" for stage in ("probe", "baselines", "evaluate", "verify", "summary")}
    measured |= {f"{stage}@cured-rooms" for stage in MEASURED} | {"retrieve@cured-shifted", "token_classes@cured-plain"}
    assert following == {"compose@cured", "compare", "report"} | extracted | measured


@pytest.mark.parametrize("module", ["regvit/stats/bootstrap.py", "regvit/report/page.py"])
def test_editing_figures_or_pages_extracts_nothing(pipeline, module):
    with open(pipeline.folder / module, "a") as file:
        file.write("\nCHANGED = True\n")
    pipeline.run("dvc", "repro", "fingerprint")
    using = users_of(pipeline, module)
    assert using and not using & {"extract", "extract_dense", "compose", "probe"}
    assert {name.partition("@")[0] for name in pipeline.would_run()} == using


def test_the_precision_of_extraction_reruns_extractions_and_no_search(pipeline):
    pipeline.change("extract", "precision", to="bfloat16")
    assert {name.partition("@")[0] for name in pipeline.would_run()} == {"extract", "extract_dense"}


def test_a_data_set_taken_out_is_not_reported_though_its_files_still_lie_there(pipeline):
    datasets = YAML_FILE.load(pipeline.folder / "params.yaml")["datasets"]
    pipeline.change("datasets", to={"plain": datasets["plain"]})
    pipeline.change("retrieve", "datasets", to=[])
    ran, _ = pipeline.repro()
    assert ran == AFTER_PROBES
    assert (pipeline.folder / "features/cured/shifted.zarr").exists()
    assert "shifted" not in (pipeline.folder / "metrics/compare/figures.csv").read_text()


def test_a_clone_without_cache_can_be_checked_for_staleness(pipeline, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(pipeline.folder), str(clone)], check=True)
    said = pipeline.run("dvc", "repro", "--dry", "--allow-missing", folder=clone).stdout
    assert "Running stage" not in said
    edited = Pipeline(clone, pipeline.python)
    edited.change("probe", "steps", to=5)
    with pytest.raises(
        AssertionError, match="failed to reproduce 'probe@"
    ):  # it would run, and its inputs are not there
        pipeline.run("dvc", "repro", "--dry", "--allow-missing", folder=clone)


def test_a_clone_with_a_remote_gets_every_result_without_computing(pipeline, tmp_path):
    pipeline.run("dvc", "remote", "add", "--default", "shared", str(tmp_path / "remote"))
    pipeline.run("dvc", "push", "--quiet")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(pipeline.folder), str(clone)], check=True)
    shutil.copy(pipeline.folder / ".dvc/config", clone / ".dvc/config")
    pipeline.run("dvc", "pull", "--quiet", folder=clone)
    assert "Running stage" not in pipeline.run("dvc", "repro", folder=clone).stdout
    for name in ("features/cured/plain.zarr/zarr.json", "metrics/report.html", "metrics/compare/figures.csv"):
        assert (clone / name).read_bytes() == (pipeline.folder / name).read_bytes()
