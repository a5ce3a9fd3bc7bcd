"""The stages `extract_patches`, `segment` and `depth` on a tiny model and tiny rooms."""

import csv
import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from run_example import write_run

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.manifest import read_dataset, write_dataset
from regvit.data.synthetic import rooms as relief
from regvit.data.transform import Transform
from regvit.features.store import FeatureStore
from regvit.measures.dense import load_image_values
from regvit.models.backbones import load_backbone, save_backbone
from regvit.registers.outliers import patch_norms
from regvit.registers.run_files import Variant

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "stages"))

from regvit.pipeline import params  # noqa: E402

SIZE, LAYER = 64, 3
KNOBS = {"datasets": ["rooms"], "learning_rates": [0.003, 0.03], "weight_decays": [0.0001],
         "steps": 30, "batch_size": 4}  # fmt: skip
PARAMS = {
    "seed": 0,
    "patches": {"datasets": ["rooms"], "img_size": SIZE},
    "segment": KNOBS,
    "depth": {**KNOBS, "min_depth": 0.001, "max_depth": 10.0, "crop": "none", "bins": 16, "upsample": 1},
}
STAGES = ("extract_patches", "segment", "depth")


def run(stage, folder, *names):
    """As `python stages/<stage>.py <names>` in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        patch.setenv("REGVIT_DEVICE", "cpu")
        patch.setattr(params, "load_params", lambda: PARAMS)
        patch.setattr(sys, "argv", [f"{stage}.py", *names])
        runpy.run_path(str(ROOT / "stages" / f"{stage}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two runs on one backbone, whose largest norms are called outliers, gone through all stages."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relief, "COUNTS", {"train": 8, "val": 4, "test": 5})
        draw = relief.render
        patch.setattr(relief, "render", lambda generator: draw(generator, 48))
        with DatasetBuilder("rooms", folder / "data/rooms", folder, folder, 0) as builder:
            relief.relief(builder, "")
    rows = builder.rows.rows()
    write_dataset(folder / "data/rooms", "rooms", rows, builder.classes, builder.about)
    torch.manual_seed(0)
    args = {"num_classes": 0, "img_size": 32, "dynamic_img_size": True}
    model = timm.create_model("test_vit", pretrained=False, **args).eval()
    transform = Transform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crop_pct=0.8)
    save_backbone(
        folder / "data/backbones/tiny", model, name="tiny", architecture="test_vit", model_args=args,
        transform=transform, source="random", licence="MIT",
    )  # fmt: skip
    backbone = load_backbone(folder / "data/backbones/tiny")
    images = torch.stack([Transform(SIZE, (0.5,) * 3, (0.5,) * 3).load(folder / "data/rooms" / row.path)
                          for row in rows[-5:]])  # fmt: skip
    norms = patch_norms(backbone.model, [transform.normalise(images)], [LAYER])[0]
    found = {"threshold": float(np.sort(norms.ravel())[-4]), "layer": LAYER}
    for name, kind, count in (("plain", "none", 0), ("cured", "test_time", 1)):
        run_file = folder / f"features/runs/{name}.json"
        write_run(run_file, folder / "data/backbones/tiny", Variant(kind, count), {2: (1, 5)}, found)
        for stage in STAGES:
            run(stage, folder, name, "rooms")
    return folder


def test_patches_are_of_the_whole_image_at_the_size_of_the_stage(work):
    dataset = read_dataset(work / "data/rooms")
    for name in ("plain", "cured"):
        store = FeatureStore.open(work / f"features/{name}/patches/rooms.zarr", dataset.digest)
        assert store.arrays == {"patches": (16, 64)}  # 64 px, patches of 16
        assert store.attributes["transform"]["size"] == SIZE and store.attributes["run"] == name
    record = json.loads((work / "metrics/extract_patches/cured/rooms.json").read_text())[0]
    assert record["store_sha256"] == store.digest() and record["rows_per_unit"] == 32
    backbone = load_backbone(work / "data/backbones/tiny")
    whole = Transform(SIZE, (0.5,) * 3, (0.5,) * 3)  # the rooms are square: nothing of them is cropped
    with torch.inference_mode():
        tokens = backbone.model.forward_features(whole.normalise(whole.load(dataset.image_path(6))[None]))[0, 1:]
    plain = FeatureStore.open(work / "features/plain/patches/rooms.zarr")
    np.testing.assert_allclose(plain.read("patches")[6], tokens, atol=5e-3)
    assert not (work / "work").exists() or not list((work / "work").iterdir())


@pytest.mark.parametrize(("stage", "value", "image_value"), [("segment", "miou", "miou"), ("depth", "rmse", "rmse")])
def test_metrics_have_intervals_and_tables_a_row_an_image(work, stage, value, image_value):
    for name in ("plain", "cured"):
        metrics = json.loads((work / f"metrics/{stage}/{name}/rooms.json").read_text())
        assert metrics["n"] == 5 and metrics["n_with_outliers"] >= 1
        assert metrics[f"{value}_lo"] <= metrics[value] <= metrics[f"{value}_hi"]
        assert all(number is None or math.isfinite(number) for number in metrics.values())
        assert metrics["learning_rate"] in KNOBS["learning_rates"]
        with open(work / f"metrics/{stage}/{name}/rooms/images.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["image_id"] for row in rows] == [f"relief_test_{i:03}" for i in range(5)]
        assert all(row[image_value] for row in rows)


def test_the_pixels_of_each_class_give_the_miou_again(work):
    with open(work / "metrics/segment/cured/rooms/pixels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["image_id"] for row in rows} == {f"relief_test_{i:03}" for i in range(5)}
    sums = {}
    for row in rows:
        found = sums.setdefault((row["mask_value"], row["class"]), np.zeros(3, int))
        found += [int(row[name]) for name in ("right", "predicted", "actual")]
    assert len(sums) == len({value for value, _ in sums}) > 1
    ious = [right / (predicted + actual - right) for right, predicted, actual in sums.values() if actual]
    metrics = json.loads((work / "metrics/segment/cured/rooms.json").read_text())
    assert np.mean(ious) == pytest.approx(metrics["miou"], abs=1e-6)


def test_both_runs_are_looked_at_where_the_model_without_registers_has_its_outliers(work):
    for stage, kind in (("segment", "segmentation"), ("depth", "depth")):
        plain, cured = (
            load_image_values(work / f"features/{name}/{stage}/rooms.safetensors", kind) for name in ("plain", "cured")
        )
        assert plain.outliers.sum() == 3 and np.array_equal(plain.outliers, cured.outliers)
        assert plain.about["image_ids_sha256"] == cured.about["image_ids_sha256"]


def test_the_same_input_gives_the_same_bytes(work):
    kept = {path: path.read_bytes() for path in sorted((work / "metrics").rglob("*")) if path.is_file()}
    kept |= {path: path.read_bytes() for path in sorted((work / "features").rglob("*.safetensors"))}
    assert len(kept) == 2 * (1 + 1 + 3 + 2 + 2)
    for stage in ("segment", "depth"):
        run(stage, work, "cured", "rooms")
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_set_without_ground_truth_is_refused(work):
    dataset = read_dataset(work / "data/rooms")
    folder = work / "data/blind"
    folder.mkdir()
    (folder / "images").symlink_to(work / "data/rooms/images")
    rows = [dataclasses.replace(row, mask="", depth="") for row in dataset.rows]
    write_dataset(folder, "blind", rows, dataset.classes, {})
    run("extract_patches", work, "plain", "blind")
    with pytest.raises(SystemExit, match="segment: data set blind has no train image with a mask"):
        run("segment", work, "plain", "blind")
