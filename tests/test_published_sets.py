"""The choice `dense` on small copies of the published sets: every set goes through the real stages to its measurement.

The copies are in the formats and under the names that the choice expects; sizes and steps are cut, and a tiny model stands
in for DINOv2.
"""

import csv
import io
from pathlib import Path

import pytest
import torch
from data.test_dense_sets import make_ade, make_coco, make_devkit
from data.test_nyu import make_nyu
from data.test_pair_sets import make_spair
from ruamel.yaml import YAML
from run_example import write_run
from stage_runner import run_stage

from regvit.data.manifest import read_dataset
from regvit.data.transform import Transform
from regvit.models.backbones import create, save_backbone
from regvit.pipeline import choose
from regvit.pipeline.schema import Params
from regvit.registers.run_files import Variant
from regvit.stats.figures import read_figures

ROOT = Path(__file__).parents[1]

SIZE, RUN = 64, "test_time_reg"
SETS = {  # images by split
    "voc07": {"val": 2, "test": 18},
    "voc12": {"val": 2, "test": 18},
    "coco20k": {"val": 2, "test": 18},
    "voc_masks": {"train": 9, "val": 1, "test": 4},
    "ade20k": {"train": 9, "val": 1, "test": 3},
    "nyu": {"train": 36, "val": 4, "test": 5},
    "spair": {"test": 5},
}


def chosen(images: Path) -> Params:
    """params.yaml after `make choose NAME=dense IMAGES=<images>`, with less work in every stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        merged = choose.ROUND_TRIP.load(Path("params.yaml").read_text())
        for text in (choose.read_choice("emoji", None), choose.read_choice("dense", str(images))):
            choose.merge(merged, choose.ROUND_TRIP.load(text))
    text = io.StringIO()
    choose.ROUND_TRIP.dump(merged, text)
    found = YAML(typ="safe", pure=True).load(text.getvalue())
    found["discover"] |= {"features": ["k", "token"], "biases": [0.0, -0.5]}
    for kept in found["extract_dense"]["datasets"].values():
        kept["img_size"] = SIZE
    for stage in ("segment", "depth"):
        found[stage] |= {"learning_rates": [0.01], "steps": 20, "batch_size": 4}
    found["depth"] |= {"bins": 16, "upsample": 1}
    return Params.model_validate(found)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """All sets of the choice, downloaded and measured with test-time registers."""
    folder, images = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("images")
    for make in (make_devkit, make_coco, make_ade):
        make(images)
    make_nyu(images / "nyu")
    make_spair(images)
    given = chosen(images)
    for name in given.scenes:
        run_stage(folder, given, "download", name)
    torch.manual_seed(0)
    args = {"num_classes": 0, "img_size": SIZE, "dynamic_img_size": True}
    save_backbone(
        folder / "data/backbones/tiny", create("test_vit", args), name="tiny", architecture="test_vit",
        model_args=args, transform=Transform(SIZE, (0.5,) * 3, (0.5,) * 3), source="random", licence="MIT",
    )  # fmt: skip
    write_run(
        folder / f"features/runs/{RUN}.json", folder / "data/backbones/tiny", Variant("test_time", 1), {2: (1, 5)}
    )
    for stage in ("extract_dense", "discover", "segment", "depth", "hummingbird", "correspond"):
        for name in getattr(given, stage).datasets:
            if name in given.scenes:
                run_stage(folder, given, stage, RUN, name)
    return folder


def metrics(work, stage, name):
    return read_figures(work / f"metrics/runs/{RUN}/{stage}/{name}/figures.csv").set_index("metric")


def test_every_set_of_the_choice_is_read_with_its_splits(work):
    assert sorted(folder.name for folder in (work / "data").iterdir()) == sorted(["backbones", *SETS])
    for name, splits in SETS.items():
        dataset = read_dataset(work / "data" / name)
        assert {split: n for split in ("train", "val", "test") if (n := len(dataset.subset(split)))} == splits
        assert (work / "data" / name / "rejected.csv").read_text().count("\n") == 1  # the header


@pytest.mark.parametrize("name", ["voc07", "voc12", "coco20k"])
def test_objects_are_sought_in_the_nine_tenths_that_did_not_choose_the_setting(work, name):
    found = metrics(work, "discover", name)
    one = found.loc["corloc"]
    assert one["n"] == 18 and found.loc["corloc_chosen_on", "n"] == 2 and "corloc_published" in found.index
    assert 0 <= one["lo"] <= one["value"] <= one["hi"] <= 1


@pytest.mark.parametrize(("name", "classes"), [("voc_masks", ["background", "tvmonitor"]),
                                               ("ade20k", ["thing 150, item 150"])])  # fmt: skip
def test_pixels_are_classified_among_the_classes_of_the_set(work, name, classes):
    found = metrics(work, "segment", name)
    assert found.loc["miou", "n"] == SETS[name]["test"] and 0 <= found.loc["miou", "value"] <= 1
    with open(work / f"metrics/runs/{RUN}/segment/{name}/classes.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == classes  # 0 of ADE20k is no class


def test_depth_is_measured_in_metres_within_eigens_crop(work):
    found = metrics(work, "depth", "nyu")
    # all is 1 m away; a layer that has learnt nothing says 5 m
    assert found.loc["rmse", "n"] == 5 and 0 < found.loc["rmse", "value"] < 3


def test_pixels_are_classified_in_context_and_keypoints_found_by_category(work):
    found = metrics(work, "hummingbird", "ade20k")
    assert found.loc["miou", "n"] == SETS["ade20k"]["test"] and 0 <= found.loc["miou", "value"] <= 1
    assert metrics(work, "correspond", "spair").loc["pck_by_pair", "n"] == 3
    with open(work / f"metrics/runs/{RUN}/correspond/spair/categories.csv", newline="") as file:
        assert [(row["category"], row["pairs"], row["points"]) for row in csv.DictReader(file)] == [
            ("cat", "2", "4"), ("dog", "1", "2")]  # fmt: skip
