"""Every choice from download to report, as dvc.yaml orders it, on small copies of its sets in the published layouts.

Tiny models stand in for the published ones, sizes and steps are cut, and of runs that are alike some are left out.
"""

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import open_clip
import pandas as pd
import pytest
import small_copies
import torch
import torchvision.datasets.utils
from data.test_sources import use_wheels, write_wheels
from measures.test_zeroshot import TEXT
from ruamel.yaml import YAML
from safetensors.torch import save_file
from stage_runner import run_stage
from stock_models import make

from regvit.data.manifest import read_dataset
from regvit.measures import zeroshot
from regvit.pipeline import choose
from regvit.pipeline.schema import Params
from regvit.stats.figures import read_figures

ROOT = Path(__file__).parents[1]
CHOICES = sorted({file.stem for file in (ROOT / "choices").glob("*.yaml")} - set(choose.LISTS))
SIZE = 64
RUNS = {  # of choices whose other runs are like these, on other backbones or with other options of the same cure
    "imagenet": ["large", "large_test_time", "large_reg4"],
    "registers": ["frozen", "tokens_1", "tuned_2"],
    "clip": ["openai_base", "openai_base_test_time"],
    "zero_shot": ["laion", "laion_test_time"],
    "anatomy": ["dino_small", "dinov2_large"],
    "dense": ["original", "test_time_reg", "trained_reg"],
    "finetune": ["frozen", "tuned_0", "tuned_1"],
    "cures": ["original", "test_time_reg", "recursive", "ablate", "mask_attention", "interpolate", "interpolate_lof",
              "clip_norm", "remove_singular", "average_views", "prefix_kv", "registers_mean"],
}  # fmt: skip
IMAGES = {  # tested, of the sets that a user has
    "imagenet": {"imagenet_a": 6, "imagenet_r": 6, "imagenet_sketch": 6, "imagenet_v2": 6, "lsun_crop": 4,
                 "lsun_resize": 4, "inaturalist": 4},
    "openood": {"imagenet_v2": 6, "imagenet_c": 6, "imagenet_r": 6, "ssb_hard": 4, "ninco": 4, "inaturalist": 4,
                "textures": 4, "openimage_o": 4},
    "clip": {"imagenet_a": 6, "imagenet_r": 6, "imagenet_sketch": 6},
    "registers": {"imagenet_a": 6, "imagenet_r": 6, "imagenet_sketch": 6},
}  # fmt: skip
LESS = {  # work in the stages
    "identify": {"images": 12, "layer": 3, "top_k": 3},
    "probe": {"steps": 10, "batch_size": 16, "seeds": 2},
    "evaluate": {"bootstrap": 20},
    "verify": {"images": 4},
    "token_classes": {"steps": 5, "batch_size": 8},
    "discover": {"features": ["k", "token"], "biases": [0.0, -0.5]},
    "discover_published": {"head": 0},
    "segment": {"learning_rates": [0.01], "steps": 20, "batch_size": 4},
    "depth": {"learning_rates": [0.01], "steps": 20, "batch_size": 4, "bins": 16, "upsample": 1},
    "zeroshot": {"templates": "simple"},
}
YAML_FILE = YAML(typ="safe", pure=True)


def chosen(name: str, images: Path, file: Path) -> dict:
    """params.yaml after `make choose NAME=<name> IMAGES=<images>`."""
    file.write_text((ROOT / "params.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["choose", name, "--images", str(images), "--params", str(file)])
        choose.main()
    return YAML_FILE.load(file.read_text())


def small(found: dict, runs: list[str]) -> dict:
    """The same with these runs, on tiny models, and less work in every stage."""
    for stage, less in LESS.items():
        found[stage] |= less
    for kept in found["extract_dense"]["datasets"].values():
        kept["img_size"] = kept["img_size"] and SIZE
    for made in {"scenes", "relief"} & set(found["scenes"]):
        found["scenes"][made]["images"] = {"train": 4, "val": 2, "test": 2}
    found["runs"] = {run: found["runs"][run] for run in runs}
    entries = {}
    for run in found["runs"].values():
        published = found["backbones"][run["backbone"]]
        entry = {"source": "file:tiny.safetensors", "architecture": "test_vit"}
        entry |= (
            {} if found["zeroshot"]["runs"] else {"img_size": SIZE}
        )  # a text tower is of the size of its image tower
        train = published.get("train")
        if run["registers"] == "trained" and not train:
            train, run["num_registers"] = {"registers": 1}, 1
        less = {"steps": 4, "batch_size": 8, "warmup": 1, "validate_every": 2, "checkpoints": [0, 4]}
        entry |= {"train": train | less} if train else {}
        entry |= {"plant": published["plant"] | {"seed_layer": 2, "amplifier_layer": 3}} if "plant" in published else {}
        entries[run["backbone"]] = entry
    found["backbones"] = entries
    kept = found["compare"]["references"]
    found["compare"]["references"] = {run: other for run, other in kept.items() if {run, other} <= set(runs)}
    found["compare"]["pairs"] = [pair for pair in found["compare"]["pairs"] if set(pair) <= set(runs)]
    found["zeroshot"]["runs"] = [run for run in found["zeroshot"]["runs"] if run in runs]
    found["zeroshot"]["text"] = {each: "folder:text" for each in found["zeroshot"]["text"] if each in entries}
    return found


def commands(given: dict) -> Iterator[tuple[str, ...]]:
    """(stage's script, its arguments) of dvc.yaml under these parameters, in its order."""
    for name, stage in YAML_FILE.load((ROOT / "dvc.yaml").read_text())["stages"].items():
        over = stage.get("matrix") or ({"key": stage["foreach"]} if "foreach" in stage else {})
        for values in product(*(lookup(given, each) for each in over.values())):
            script, *arguments = stage.get("do", stage)["cmd"].removeprefix("python stages/").split()
            item = dict(zip(over, values, strict=True))
            if name != "fingerprint":
                yield script.removesuffix(".py"), *(item[re.search(r"\w+(?=})", each)[0]] for each in arguments)


def lookup(given: dict, reference: str) -> list[str]:
    """What `${runs}` or `${tokens.datasets}` stands for."""
    for key in reference.strip("${}").split("."):
        given = given[key]
    return list(given)


def save_tiny(folder: Path) -> None:
    """A ViT, and a CLIP model of which it is the image tower."""
    tower = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    config = {"embed_dim": 48, "vision_cfg": tower, "text_cfg": TEXT}
    with torch.random.fork_rng(devices=[]):
        vit = make(num_classes=0)
        clip = open_clip.CLIP(**config)
    for block in vit.blocks:  # at random weights CLS attends to all alike, and planting cannot turn it
        block.attn.qkv.weight.data[: vit.embed_dim] *= 40
    clip.visual.trunk.load_state_dict(vit.state_dict())
    save_file(vit.state_dict(), folder / "tiny.safetensors")
    (folder / "text").mkdir()
    about = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "text/open_clip_config.json").write_text(json.dumps(about))
    save_file(clip.state_dict(), folder / "text/open_clip_model.safetensors")


@pytest.fixture(scope="module")
def run_choice(tmp_path_factory) -> Callable[[str], tuple[Path, Params]]:
    """Runs a choice, once; the folder that it ran in, and its parameters."""
    copies = tmp_path_factory.mktemp("copies")
    small_copies.lay_out(copies / "images")
    small_copies.fetched(copies / "torchvision")
    wheels = write_wheels(copies)

    @cache
    def run_choice(name: str) -> tuple[Path, Params]:
        folder = tmp_path_factory.mktemp(name)
        images = copies / "images" / ("imagenet" if name == "mine" else "")
        found = chosen(name, images, folder / "params.yaml")
        found = small(found, RUNS.get(name, list(found["runs"])))
        given = Params.model_validate(found)
        save_tiny(folder)
        (folder / "work/downloads").mkdir(parents=True)
        (folder / "work/downloads/torchvision").symlink_to(copies / "torchvision")
        shutil.copytree(ROOT / "choices/classes", folder / "choices/classes")
        listed = folder / "choices/classes/imagenet_v2.csv"  # of a thousand classes
        listed.write_text("".join(listed.read_text().splitlines(keepends=True)[: 1 + len(small_copies.WNIDS)]))
        with pytest.MonkeyPatch.context() as patch:
            use_wheels(wheels, patch)
            patch.setattr(torchvision.datasets.utils, "check_md5", lambda *_: True)  # the copies have their own
            patch.setitem(zeroshot.TEMPLATES, "simple", [lambda name: f"a photo of a {name}."])
            for command in commands(found):
                run_stage(folder, given, *command)
        return folder, given

    return run_choice


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_runs_from_download_to_report_on_small_copies(run_choice, name):
    folder, given = run_choice(name)
    for each, entry in {**given.datasets, **given.scenes}.items():
        assert len(read_dataset(folder / "data" / each).subset("test"))
        if not entry.source.startswith("emoji:"):  # where a drawing is blank on purpose
            assert (folder / f"data/{each}/rejected.csv").read_text().count("\n") == 1  # the header
    known = set(read_dataset(folder / "data" / given.in_distribution).classes)
    alike = [each for each, entry in given.datasets.items() if entry.role == "ood"]
    assert all(set(read_dataset(folder / "data" / each).classes) <= known for each in alike)
    for run in given.runs:
        headline = json.loads((folder / f"metrics/{run}.json").read_text())
        assert "top1" in headline and ("ood_top1" in headline) == bool(alike)
    page = (folder / "metrics/report.html").read_text()
    assert len(page) > 10_000 and all(run in page for run in given.runs)


@pytest.mark.parametrize("name", IMAGES)
def test_every_image_of_a_users_sets_is_read(run_choice, name):
    folder, given = run_choice(name)
    found = {each: len(read_dataset(folder / "data" / each).subset("test")) for each in given.datasets}
    assert found[given.in_distribution] == 12 and IMAGES[name].items() <= found.items()


@pytest.mark.parametrize("name", ["imagenet", "openood", "registers", "cifar10", "finetune"])
def test_trained_registers_are_held_against_the_same_model_without(run_choice, name):
    folder, given = run_choice(name)
    trained = [run for run, entry in given.runs.items() if entry.registers == "trained"]
    differences = pd.read_csv(folder / "metrics/compare/differences.csv")
    against = differences[differences.run.isin(trained)].query("run != reference and metric == 'top1'")
    assert {("cls_reg", "cls"), ("cls_reg", "cls_patch")} <= set(
        zip(against.readout, against.reference_readout, strict=True)
    )


def test_the_choice_anatomy_shows_each_set_and_all_backbones(run_choice):
    folder, given = run_choice("anatomy")
    page = (folder / "metrics/report.html").read_text()
    assert all(f">{each}</th>" in page for each in given.token_classes.datasets) and "All backbones" in page


@pytest.mark.parametrize("name", ["clip", "zero_shot"])
def test_every_zero_shot_figure_is_measured_on_the_tower_of_the_text(run_choice, name):
    folder, given = run_choice(name)
    for run, (stage, sets) in product(given.zeroshot.runs, {
        "zeroshot": given.zeroshot.datasets, "zeroshot_segment": given.zeroshot_segment.datasets,
    }.items()):  # fmt: skip
        for each in sets:
            found = figures(folder, run, stage, each)
            assert found["value"].notna().all()
            assert stage == "zeroshot_segment" or found.loc["tower_cosine", "value"] > 0.9999


# The choice `dense`, whose sets have measurements of their own.

SETS = {  # images by split
    "voc07": {"val": 2, "test": 18},
    "voc12": {"val": 2, "test": 18},
    "coco20k": {"val": 2, "test": 18},
    "voc_masks": {"train": 9, "val": 1, "test": 4},
    "ade20k": {"train": 9, "val": 1, "test": 3},
    "nyu": {"train": 36, "val": 4, "test": 5},
    "spair": {"test": 5},
}
RUN = "test_time_reg"


@pytest.fixture
def dense(run_choice) -> Path:
    return run_choice("dense")[0]


def figures(folder: Path, run: str, stage: str, name: str) -> pd.DataFrame:
    return read_figures(folder / f"metrics/runs/{run}/{stage}/{name}/figures.csv").set_index("metric")


def test_every_dense_set_is_read_with_its_splits(dense):
    for name, splits in SETS.items():
        dataset = read_dataset(dense / "data" / name)
        assert {split: n for split in ("train", "val", "test") if (n := len(dataset.subset(split)))} == splits


@pytest.mark.parametrize("name", ["voc07", "voc12", "coco20k"])
def test_objects_are_sought_in_the_nine_tenths_that_did_not_choose_the_setting(dense, name):
    found = figures(dense, RUN, "discover", name)
    one = found.loc["corloc"]
    assert one["n"] == 18 and found.loc["corloc_chosen_on", "n"] == 2 and "corloc_published" in found.index
    assert 0 <= one["lo"] <= one["value"] <= one["hi"] <= 1


@pytest.mark.parametrize(("name", "classes"), [("voc_masks", ["background", "tvmonitor"]),
                                               ("ade20k", ["thing 150, item 150"])])  # fmt: skip
def test_pixels_are_classified_among_the_classes_of_the_set(dense, name, classes):
    found = figures(dense, RUN, "segment", name)
    assert found.loc["miou", "n"] == SETS[name]["test"] and 0 <= found.loc["miou", "value"] <= 1
    with open(dense / f"metrics/runs/{RUN}/segment/{name}/classes.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == classes  # 0 of ADE20k is no class


def test_depth_is_measured_in_metres_within_eigens_crop(dense):
    found = figures(dense, RUN, "depth", "nyu")
    # all is 1 m away; a layer that has learnt nothing says 5 m
    assert found.loc["rmse", "n"] == 5 and 0 < found.loc["rmse", "value"] < 3


def test_pixels_are_classified_in_context_and_keypoints_found_by_category(dense):
    found = figures(dense, RUN, "hummingbird", "ade20k")
    assert found.loc["miou", "n"] == SETS["ade20k"]["test"] and 0 <= found.loc["miou", "value"] <= 1
    assert figures(dense, RUN, "correspond", "spair").loc["pck_by_pair", "n"] == 3
    with open(dense / f"metrics/runs/{RUN}/correspond/spair/categories.csv", newline="") as file:
        assert [(row["category"], row["pairs"], row["points"]) for row in csv.DictReader(file)] == [
            ("cat", "2", "4"), ("dog", "1", "2")]  # fmt: skip
