"""What reruns: the real `dvc repro` with this repository's dvc.yaml and stage scripts, on drawings and timm's `test_vit`.

One pipeline is built once (folders of images and a weights file as sources, so that nothing is fetched), and every test
starts from it: it changes one thing, reads from DVC's output which stages ran, and the fixture puts the change back.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from small_pipeline import YAML_FILE, Pipeline, lay_out, warm_python


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Iterator[Pipeline]:
    """The pipeline, run once."""
    folder = tmp_path_factory.mktemp("pipeline")
    lay_out(folder, {})
    with warm_python(tmp_path_factory.mktemp("python")) as python:
        pipeline = Pipeline(folder, python)
        ran, restored = pipeline.repro()
        stages = set(YAML_FILE.load(folder / "dvc.yaml")["stages"]) - {"discover", "zeroshot"}
        assert {name.partition("@")[0] for name in ran} == stages
        assert not restored
        yield pipeline


@pytest.fixture
def pipeline(built) -> Iterator[Pipeline]:
    """The pipeline as built; afterwards its parameters, code and outputs are put back."""
    kept = {
        path: path.read_bytes()
        for name in ("params.yaml", "dvc.lock", "regvit/*.py")
        for path in built.folder.glob(name)
    }
    metrics = built.folder.with_name("metrics-kept")
    shutil.copytree(built.folder / "metrics", metrics)
    yield built
    for path, content in kept.items():
        path.write_bytes(content)
    (built.folder / "runtime.yaml").unlink(missing_ok=True)
    shutil.rmtree(built.folder / "metrics")
    shutil.move(metrics, built.folder / "metrics")
    built.run("dvc", "checkout", "--quiet", "--force")


def test_nothing_reruns_where_nothing_changed_but_batch_size_workers_and_device(pipeline):
    (pipeline.folder / "runtime.yaml").write_text("batch_size: 3\n")
    assert pipeline.repro(REGVIT_WORKERS="1", REGVIT_DEVICE="cpu") == (set(), set())


def test_a_probe_learning_rate_reruns_probe_evaluate_and_report_and_going_back_restores(pipeline):
    pipeline.change("probe", "learning_rates", to=[0.5])
    ran, _ = pipeline.repro()
    assert ran == {"probe@original", "probe@cured", "evaluate@original", "evaluate@cured", "differences", "report"}
    pipeline.change("probe", "learning_rates", to=[0.1])
    ran, restored = pipeline.repro()
    assert ran <= {"report"}
    assert restored == {"probe@original", "probe@cured", "evaluate@original", "evaluate@cured", "differences"}


def test_a_new_ood_set_runs_its_own_download_and_extract_then_evaluate_and_report(pipeline):
    datasets = YAML_FILE.load(pipeline.folder / "params.yaml")["datasets"]
    pipeline.change("datasets", to={"later": {"source": "folder:images/later", "role": "ood"}} | datasets)
    ran, restored = pipeline.repro()
    assert ran == {
        "download@later", "extract@original-later", "extract@cured-later", "evaluate@original", "evaluate@cured",
        "differences", "report",
    }  # fmt: skip
    assert not restored


def test_the_number_of_registers_reruns_only_what_test_time_runs_make_and_going_back_restores(pipeline):
    pipeline.change("runs", "cured", "num_registers", to=2)
    ran, _ = pipeline.repro()
    following = {f"{stage}@cured" for stage in ("probe", "evaluate", "verify")} | {"differences", "report"}
    following |= {f"{stage}@cured-rooms" for stage in ("tokens", "attention", "segment", "depth")}
    extracted = {"extract@cured-plain", "extract@cured-shifted", "extract_patches@cured-rooms"}
    assert {"compose@cured"} | extracted | {"probe@cured", "evaluate@cured", "verify@cured"} <= ran
    assert ran <= {"compose@cured"} | extracted | following
    pipeline.change("runs", "cured", "num_registers", to=1)
    ran, restored = pipeline.repro()
    assert ran <= {"report"}
    assert {"compose@cured"} | extracted <= restored


def test_editing_the_metrics_extracts_nothing(pipeline):
    with open(pipeline.folder / "regvit/stats/accuracy.py", "a") as file:
        file.write("\nCHANGED = True\n")
    ran, _ = pipeline.repro()
    fingerprints = (pipeline.folder / "metrics/fingerprint").glob("*.json")
    using = {file.stem for file in fingerprints if "regvit/stats/accuracy.py" in file.read_text()}
    assert {"probe", "evaluate"} <= using and not using & {"extract", "extract_patches", "identify", "compose"}
    assert {name.partition("@")[0] for name in ran} == using - {"discover", "zeroshot"} | {"fingerprint"}


def test_a_comment_and_a_new_module_that_nothing_imports_rerun_nothing_but_the_fingerprint(pipeline):
    path = pipeline.folder / "regvit/models/tokens.py"
    path.write_text("# A remark.\n" + path.read_text().replace('"""', '"""Said again. ', 1))
    (pipeline.folder / "regvit/unused.py").write_text("UNUSED = 1\n")
    assert pipeline.repro() == ({"fingerprint"}, set())
    (pipeline.folder / "regvit/unused.py").unlink()


def test_the_precision_of_extraction_reruns_what_features_decide_and_no_measurement(pipeline):
    pipeline.change("extract", "precision", to="float32")
    ran, _ = pipeline.repro()
    assert {"compose@original", "extract@original-plain", "extract_patches@cured-rooms", "probe@cured"} <= ran
    assert not {name.partition("@")[0] for name in ran} & {"identify", "verify", "tokens", "attention"}


def test_a_data_set_taken_out_is_not_reported_though_its_files_still_lie_there(pipeline):
    datasets = YAML_FILE.load(pipeline.folder / "params.yaml")["datasets"]
    pipeline.change("datasets", to={"plain": datasets["plain"]})
    ran, _ = pipeline.repro()
    assert ran == {"evaluate@original", "evaluate@cured", "differences", "report"}
    assert (pipeline.folder / "metrics/extract/cured/shifted.json").exists()
    assert "shifted" not in (pipeline.folder / "metrics/evaluate/cured.json").read_text()


def test_a_clone_without_cache_can_be_checked_for_staleness(pipeline, tmp_path):
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns("data", "features", "cache", "tmp", "__pycache__")
    shutil.copytree(pipeline.folder, clone, ignore=ignored)
    said = pipeline.run("dvc", "repro", "--dry", "--allow-missing", folder=clone).stdout
    assert re.findall("Running stage.*", said) == []


def test_a_clone_with_a_remote_gets_every_result_without_computing(pipeline, tmp_path):
    git = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    pipeline.run("dvc", "remote", "add", "--default", "shared", str(tmp_path / "remote"))
    pipeline.run("dvc", "push", "--quiet")
    subprocess.run([*git, "add", "--all"], cwd=pipeline.folder, check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "results"], cwd=pipeline.folder, check=True)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(pipeline.folder), str(clone)], check=True)
    pipeline.run("dvc", "pull", "--quiet", folder=clone)
    assert "Running stage" not in pipeline.run("dvc", "repro", folder=clone).stdout
    assert (clone / "features/cured/plain.zarr/zarr.json").is_file()
    assert (clone / "metrics/report.html").read_bytes() == (pipeline.folder / "metrics/report.html").read_bytes()
