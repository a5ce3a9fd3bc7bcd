"""The stages `probe` and `evaluate` on small made-up features, run in a folder of their own."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from regvit.detectors import energy
from regvit.manifest import Row, read_dataset, write_dataset
from regvit.predictions import load_predictions
from regvit.store import FeatureStore, StoreWriter

ROOT = Path(__file__).parents[1]
CENTRES = np.random.default_rng(0).normal(size=(3, 8)) * 0.8
DATASETS = {"home": "id", "away": "ood", "alien": "anomaly"}


def params_text():
    text = (ROOT / "params.yaml").read_text()
    text = re.sub(r"(?ms)^in_distribution:.*?(?=^scenes:)", "in_distribution: home\n\ndatasets:\n" + "".join(
        f"  {name}: {{source: digits, role: {role}}}\n" for name, role in DATASETS.items()) + "\n", text)  # fmt: skip
    return text


def make(folder, name, classes, counts, shift):
    """A data set without images and its features: CLS, patch mean, one register."""
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
    arrays = {"cls": cls, "patch_mean": cls + 0.5, "registers": np.stack([cls, -cls], 1)[:, :1]}
    shapes = {key: values.shape[1:] for key, values in arrays.items()}
    final = folder / "features" / "one" / f"{name}.zarr"
    with StoreWriter(final, folder / "p", len(rows), shapes, {"manifest_sha256": dataset.digest}) as writer:
        for unit in writer.missing_units():
            start, stop = writer.unit_rows(unit)
            writer.write(unit, {key: values[start:stop] for key, values in arrays.items()})
        writer.finish()


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
    for stage in ("probe", "evaluate"):
        run(stage, folder, "one")
    return folder


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_probe_stage_leaves_metrics_and_curves(done):
    metrics = json.loads((done / "metrics/probe/one.json").read_text())
    assert list(metrics) == ["cls", "reg_mean", "patch_mean", "cls_reg", "cls_patch"]
    assert metrics["cls"]["val_top1_lo"] < metrics["cls"]["val_top1"] < metrics["cls"]["val_top1_hi"]
    assert (metrics["cls"]["n"], metrics["cls"]["n_train"]) == (60, 150)
    curves = table(done / "metrics/probe/one/curves.csv")
    assert list(curves[0]) == ["readout", "learning_rate", "step", "train_loss", "val_top1"]


def test_evaluation_has_every_data_set_under_its_role_with_intervals_and_counts(done):
    metrics = json.loads((done / "metrics/evaluate/one.json").read_text())
    for readout in metrics.values():
        assert readout["id"]["n"] == 80 and list(readout["ood"]) == ["away"] and readout["ood"]["away"]["n"] == 50
        assert list(readout["anomaly"]["alien"]) == ["msp", "energy"]
        for block in (readout["id"], readout["ood"]["away"], *readout["anomaly"]["alien"].values()):
            values = [key for key in block if f"{key}_lo" in block]
            assert all(0 <= block[f"{key}_lo"] <= block[key] <= block[f"{key}_hi"] <= 1 for key in values)
            assert all(round(block[key], 6) == block[key] for key in values)
            assert len(values) == (1 if "top1" in block else 5)
        assert readout["anomaly"]["alien"]["msp"]["n"] == 70 and readout["anomaly"]["alien"]["msp"]["n_id"] == 80


def test_labels_of_other_sets_are_matched_by_name(done):
    metrics = json.loads((done / "metrics/evaluate/one.json").read_text())
    assert metrics["cls"]["id"]["top1"] > 0.6 and metrics["cls"]["ood"]["away"]["top1"] > 0.6


def test_metrics_are_those_of_the_saved_predictions(done):
    predictions = load_predictions(done / "features/one/predictions.safetensors")
    metrics = json.loads((done / "metrics/evaluate/one.json").read_text())["cls"]
    home, alien = (energy(predictions.logits["cls", name]) for name in ("home", "alien"))
    expected = roc_auc_score(np.r_[np.zeros(80), np.ones(70)], np.r_[home, alien])
    assert metrics["anomaly"]["alien"]["energy"]["auroc"] == pytest.approx(expected, abs=1e-6)
    assert metrics["id"]["top1"] == pytest.approx(predictions.correct("cls", "home").mean(), abs=1e-6)
    confusion = table(done / "metrics/evaluate/one/confusion.csv")
    assert sum(row["actual"] == row["predicted"] for row in confusion) == predictions.correct("cls", "home").sum()
    roc = table(done / "metrics/evaluate/one/roc.csv")
    assert {(row["dataset"], row["detector"]) for row in roc} == {("alien", "msp"), ("alien", "energy")}


def test_running_again_gives_the_same_bytes(done):
    files = [
        path for folder in ("metrics", "features") for path in sorted((done / folder).rglob("*")) if path.is_file()
    ]
    before = [path.read_bytes() for path in files]
    for stage in ("probe", "evaluate"):
        run(stage, done, "one")
    assert [path.read_bytes() for path in files] == before


def test_features_of_another_manifest_are_refused(done, tmp_path):
    for name in ("params.yaml", "features", "metrics"):
        (tmp_path / name).symlink_to(done / name)
    dataset = read_dataset(done / "data/home")
    write_dataset(tmp_path / "data/home", "home", dataset.rows[::-1], dataset.classes, {})
    with pytest.raises(SystemExit, match=r"probe: .*home\.zarr was made from a manifest with SHA-256"):
        run("probe", tmp_path, "one")
    assert FeatureStore.open(done / "features/one/home.zarr", dataset.digest)
