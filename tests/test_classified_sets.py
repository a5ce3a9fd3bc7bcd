"""The choices of classified sets on small copies of these, in the published layouts: from download to the report.

Sets that are fetched are left out, tiny models stand in for the hub's, and sizes and steps are cut.
"""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file
from stage_runner import run_stage

from regvit.data.manifest import read_dataset
from regvit.pipeline import choose
from regvit.pipeline.schema import Params

ROOT = Path(__file__).parents[1]
WNIDS = ("n01440764", "n01443537", "n01484850")
SIZE = 48
ROLES = {  # sets of a choice that are no ImageNet itself: images, classes
    "imagenet": {"imagenet_a": 6, "imagenet_r": 6, "imagenet_sketch": 6, "imagenet_v2": 6, "lsun_crop": 4,
                 "lsun_resize": 4, "inaturalist": 4},
    "openood": {"imagenet_v2": 6, "imagenet_c": 6, "imagenet_r": 6, "ssb_hard": 4, "ninco": 4, "inaturalist": 4,
                "textures": 4, "openimage_o": 4},
    "clip": {"imagenet_a": 6, "imagenet_r": 6, "imagenet_sketch": 6},
    "registers": {"imagenet_a": 6, "imagenet_r": 6, "imagenet_sketch": 6},
    "anatomy": {},
}  # fmt: skip


def picture(path: Path, kind: int, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 120, (56, 60, 3), dtype=np.uint8)
    pixels[10:40, 10:40, kind % 3] = 250
    Image.fromarray(pixels).save(path)


def copies(folder: Path) -> None:
    """ImageNet and its relatives as they are published and unpacked; and OpenOOD's lists, one of them made as the choice says."""
    rng = np.random.default_rng(0)
    for kind, wnid in enumerate(WNIDS):
        for i in range(16):
            picture(folder / f"imagenet/train/{wnid}/{wnid}_{i}.JPEG", kind, rng)
        for i in range(4):
            picture(folder / f"imagenet/val/{wnid}/ILSVRC2012_val_{kind}{i}.JPEG", kind, rng)
        for i in range(2):
            for name in ("imagenet-a", "imagenet-r", "sketch"):
                picture(folder / name / wnid / f"{i}.jpg", kind, rng)
            picture(folder / f"imagenetv2-matched-frequency-format-val/{kind}/{i}.jpeg", kind, rng)
        for i in range(30):
            picture(folder / f"CUB_200_2011/images/{kind:03}.Bird/{i}.jpg", kind, rng)
    for name in ("LSUN/test", "LSUN_resize/LSUN_resize", "iNaturalist/images"):
        for i in range(4):
            picture(folder / name / f"{i}.jpg", i, rng)
    lines = {f"test_{name}": [] for name in ROLES["openood"]}
    for name, count in ROLES["openood"].items():
        for i in range(count):
            path, label = f"{name}/{i % 3}/{i}.jpg", i % 3 if count == 6 else -1
            picture(folder / path, i, rng)
            lines[f"test_{name}"].append(f"{path} {label}")
    own = []
    for split, count in (("train", 36), ("val", 9), ("test", 12)):
        for i in range(count):
            picture(folder / f"imagenet_1k/{split}/{i}.JPEG", i, rng)
            own.append(f"imagenet_1k/{split}/{i}.JPEG,{i % 3},{split}")
    for name, text in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(text) + "\n")
    (folder / "imagenet.csv").write_text("\n".join(own) + "\n")


def chosen(name: str, images: Path) -> Params:
    """params.yaml after `make choose NAME=<name> IMAGES=<images>` with its first runs on tiny models, and less work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        merged = choose.ROUND_TRIP.load(Path("params.yaml").read_text())
        for text in (choose.read_choice("emoji", None), choose.read_choice(name, str(images))):
            choose.merge(merged, choose.ROUND_TRIP.load(text))
    text = io.StringIO()
    choose.ROUND_TRIP.dump(merged, text)
    found = YAML(typ="safe", pure=True).load(text.getvalue())
    if name == "anatomy":  # whose sets are all fetched: of the ID set a copy, and the recipe for those in class folders
        found["datasets"]["imagenette"]["source"] = f"folder:{images}/imagenet"
        found["scenes"] = {
            k: v | {"source": f"folder:{images}/CUB_200_2011/images"} for k, v in found["scenes"].items()
        }
    found["datasets"] = {k: v for k, v in found["datasets"].items() if not v["source"].startswith("torchvision:")}
    wanted = {"imagenet": ["large", "large_test_time", "large_reg4"], "registers": ["frozen", "tokens_1", "tuned_2"],
              "clip": ["openai_base", "openai_base_test_time"],
              "anatomy": ["dino_small", "dinov2_large"]}.get(name, list(found["runs"]))  # fmt: skip
    found["runs"] = {run: found["runs"][run] for run in wanted}
    entries = {}
    for run in found["runs"].values():
        trained = run["registers"] == "trained" and "train" not in found["backbones"][run["backbone"]]
        entry = {"source": "file:plain.safetensors", "architecture": "test_vit", "img_size": SIZE}
        train = {"registers": 1} if trained else found["backbones"][run["backbone"]].get("train")
        less = {"steps": 4, "batch_size": 8, "warmup": 1, "validate_every": 2, "checkpoints": [0, 4]}
        entry |= {"train": train | less} if train else {}
        entries[run["backbone"]] = entry
        if trained:
            run["num_registers"] = 1
    found["backbones"] = entries
    kept = found["compare"]["references"]
    found["compare"]["references"] = {run: other for run, other in kept.items() if {run, other} <= set(wanted)}
    found["compare"]["pairs"] = [pair for pair in found["compare"]["pairs"] if set(pair) <= set(wanted)]
    found["zeroshot"] |= {"runs": [], "datasets": [], "text": {}}
    found["identify"] |= {"images": 12, "layer": 3, "top_k": 3}
    found["probe"] |= {"steps": 10, "batch_size": 16, "seeds": 2}
    found["evaluate"] |= {"bootstrap": 20, "detectors": ["msp", "energy"]}
    found["token_classes"] |= {"steps": 5, "batch_size": 8}
    found["verify"]["images"] = 4
    return Params.model_validate(found)


@pytest.mark.parametrize("name", ROLES)
def test_a_choice_runs_from_download_to_report_on_small_copies(name, tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("images")
    copies(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), folder / "plain.safetensors")
    (folder / "choices/classes").mkdir(parents=True)
    lines = (ROOT / "choices/classes/imagenet_v2.csv").read_text().splitlines(keepends=True)
    (folder / "choices/classes/imagenet_v2.csv").write_text("".join(lines[: 1 + len(WNIDS)]))
    given = chosen(name, images)
    for dataset in (*given.datasets, *given.scenes):
        run_stage(folder, given, "download", dataset)
    found = {each: len(read_dataset(folder / "data" / each).subset("test")) for each in given.datasets}
    assert found.pop(given.in_distribution) == 12 and found == ROLES[name]
    classes = {
        read_dataset(folder / "data" / each).classes
        for each in given.datasets
        if given.datasets[each].role != "anomaly"
    }
    assert classes == {WNIDS if name != "openood" else ("0", "1", "2")}
    for backbone in given.backbones:
        run_stage(folder, given, "backbone", backbone)
        run_stage(folder, given, "identify", backbone)
    for each in given.runs:
        run_stage(folder, given, "compose", each)
        for dataset in given.datasets:
            run_stage(folder, given, "extract", each, dataset)
        for stage in ("probe", "baselines", "evaluate", "verify"):
            run_stage(folder, given, stage, each)
        for stage in ("extract_dense", "tokens", "token_classes", "attention"):
            for dataset in getattr(given, stage).datasets:
                run_stage(folder, given, stage, each, dataset)
    run_stage(folder, given, "compare")
    for each in given.runs:
        run_stage(folder, given, "summary", each)
    run_stage(folder, given, "report")
    headline = json.loads((folder / f"metrics/{each}.json").read_text())
    assert "top1" in headline and ("ood_top1" in headline or not ROLES[name])
    differences = pd.read_csv(folder / "metrics/compare/differences.csv")
    if name not in ("clip", "anatomy"):  # trained registers against the same model without
        against = differences.query("run == @each and run != reference and metric == 'top1'")
        assert {("cls_reg", "cls"), ("cls_reg", "cls_patch")} <= set(
            zip(against.readout, against.reference_readout, strict=True)
        )
    page = (folder / "metrics/report.html").read_text()
    assert len(page) > 10_000
    if name == "anatomy":
        assert all(f">{each}</th>" in page for each in given.token_classes.datasets) and "All backbones" in page
