"""The stage `discover` on a tiny model and drawn squares whose boxes are known."""

import csv
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_example import write_run

from regvit.data.manifest import Row, write_dataset
from regvit.data.transform import Transform
from regvit.models.backbones import create, save_backbone
from regvit.registers.run_files import Variant

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "stages"))

from regvit.pipeline import params  # noqa: E402

SIZE = 96
PARAMS = {
    "seed": 0,
    "discover": {
        "datasets": ["squares"],
        "img_size": SIZE,
        "fit": "pad",
        "layers": 2,
        "features": ["k", "token"],
        "normalised": [True, False],
        "biases": [0.0, -0.5],
        "k_patches": 10,
        "choose_images": 4,
    },
}


def discover(folder, *names):
    """As `python stages/discover.py <names>` in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("REGVIT_DEVICE", "cpu")
        patch.setattr(params, "load_params", lambda: PARAMS)
        patch.setattr(sys, "argv", ["discover.py", *names])
        runpy.run_path(str(ROOT / "stages/discover.py"), run_name="__main__")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """One run, and twelve images of a bright square on noise."""
    folder = tmp_path_factory.mktemp("work")
    rng, rows = np.random.default_rng(0), []
    (folder / "data/squares/images").mkdir(parents=True)
    for i in range(12):
        pixels = rng.integers(60, 80, size=(120, 90, 3), dtype=np.uint8)
        x, y = (int(v) for v in rng.integers(0, 50, size=2))
        pixels[y : y + 40, x : x + 40] = (230, 40, 40)
        Image.fromarray(pixels).save(folder / f"data/squares/images/{i}.png")
        split, boxes = ("train", "val", "test", "test")[i % 4], [[x, y, x + 40, y + 40]]
        rows.append(Row(f"{i}", f"images/{i}.png", "", split, boxes=json.dumps(boxes)))
    write_dataset(folder / "data/squares", "squares", rows, (), {"source": "drawn"})
    torch.manual_seed(0)
    args = {"num_classes": 0, "dynamic_img_size": True}
    save_backbone(
        folder / "data/backbones/tiny", create("test_vit", args), name="tiny", architecture="test_vit",
        model_args=args, transform=Transform(160, (0.5,) * 3, (0.5,) * 3), source="random", licence="MIT",
    )  # fmt: skip
    write_run(folder / "features/runs/plain.json", folder / "data/backbones/tiny", Variant("none", 0), {})
    discover(folder, "plain", "squares")
    return folder


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_corloc_is_of_the_test_split_with_its_interval_and_the_setting_was_chosen_on_the_others(work):
    metrics = json.loads((work / "metrics/discover/plain/squares.json").read_text())
    assert metrics["n"] == 6 and metrics["chosen_on"]["n"] == 4 and metrics["without_boxes"] == 0
    assert 0 <= metrics["corloc_lo"] <= metrics["corloc"] <= metrics["corloc_hi"] <= 1
    hits = [float(row["hit"]) for row in table(work / "metrics/discover/plain/squares/images.csv")]
    assert len(hits) == 6 and np.mean(hits) == pytest.approx(metrics["corloc"], abs=1e-6)


def test_every_setting_has_a_row_in_the_sweep(work):
    rows = table(work / "metrics/discover/plain/squares/sweep.csv")
    assert len(rows) == 2 * 2 * 2 * 2  # features x layers x normalised x biases
    assert {float(row["bias"]) for row in rows} == {0.0, -0.5}


def test_the_gallery_shows_the_images_with_their_boxes(work):
    with Image.open(work / "metrics/discover/plain/squares/boxes.png") as picture:
        assert picture.width > 200
        colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
        assert len(colours) > 20


def test_the_same_input_gives_the_same_bytes(work):
    kept = {path: path.read_bytes() for path in (work / "metrics").rglob("*") if path.is_file()}
    discover(work, "plain", "squares")
    assert kept == {path: path.read_bytes() for path in (work / "metrics").rglob("*") if path.is_file()}


def test_a_set_without_boxes_is_refused(work):
    Image.new("RGB", (96, 96)).save(work / "blank.png")
    (work / "data/blank").mkdir(exist_ok=True)
    Image.new("RGB", (96, 96)).save(work / "data/blank/a.png")
    write_dataset(work / "data/blank", "blank", [Row("a", "a.png", "", "test")], (), {"source": "drawn"})
    with pytest.raises(SystemExit, match=r"discover: data set blank has no .* images with boxes"):
        discover(work, "plain", "blank")
