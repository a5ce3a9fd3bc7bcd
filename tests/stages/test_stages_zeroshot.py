"""`zeroshot_segment` on the sets' real layouts in small, with a small CLIP model of random weights."""

import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from measures.test_zeroshot import ARCHITECTURES, save_clip, save_tower
from PIL import Image
from run_example import write_run
from sklearn.metrics import average_precision_score, jaccard_score
from stage_runner import run_stage

from regvit.data.sources import make_dataset
from regvit.measures.training_free.clip_patches import FOILS
from regvit.pipeline import schema
from regvit.registers.run_files import Variant
from regvit.stats.figures import read_figures

SIZE = 64
SETS = {"context": "context60:VOCdevkit", "coco": "coco_object:coco_object", "objects": "imagenet_seg:imagenet_seg"}
KINDS = ["cat", "dog, puppy"]


def photograph(path, mask_path, seed, values):
    """An image of its model's size in four colours, and a mask of its quarters."""
    rng = np.random.default_rng(seed)
    for each, quarters in ((path, rng.integers(0, 255, (2, 2, 3))), (mask_path, np.array(values).reshape(2, 2))):
        each.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(quarters.astype(np.uint8).repeat(SIZE // 2, 0).repeat(SIZE // 2, 1)).save(each)


def make_mask_sets(folder):
    """PASCAL Context, COCO-Object and ImageNet-Segmentation with three images each."""
    voc, coco = folder / "VOCdevkit/VOC2010", folder / "coco_object"
    for i in range(3):
        photograph(voc / f"JPEGImages/2008_{i}.jpg", voc / f"SegmentationClassContext/2008_{i}.png", i, [0, 59, i, 255])
        masks = coco / f"annotations/val2017/00{i}_instanceTrainIds.png"
        photograph(coco / f"images/val2017/00{i}.jpg", masks, i, [0, 1, 2, 1])
        photograph(
            folder / f"imagenet_seg/images/0{i}.png", folder / f"imagenet_seg/masks/0{i}.png", i, [0, 1, 0, i % 2]
        )
    listed = voc / "ImageSets/SegmentationContext/val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("2008_0\n2008_1\n2008_2\n")
    kinds = [{"id": 9, "name": KINDS[1]}, {"id": 1, "name": KINDS[0]}]
    (coco / "annotations/instances_val2017.json").write_text(json.dumps({"categories": kinds}))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_mask_sets(folder)
    for name, source in SETS.items():
        kind, _, where = source.partition(":")
        make_dataset(f"{kind}:{folder / where}", name, folder / "data" / name, folder / "p", 0, False)
    clip = save_clip(folder / "text", True)
    save_tower(folder / "data/backbones/tower", clip, ARCHITECTURES[True])
    for name, variant in {"plain": ("none", 0), "cured": ("test_time", 1)}.items():
        write_run(
            folder / f"features/runs/{name}.json",
            folder / "data/backbones/tower",
            Variant(*variant, scale=100.0),
            {0: (1, 2)},
        )
    given = SimpleNamespace(
        seed=0,
        zeroshot=SimpleNamespace(text={"tower": f"folder:{clip}"}, templates="simple"),
        zeroshot_segment=schema.ZeroshotSegment(
            datasets=list(SETS), objects=["objects"], foils=list(FOILS), scale=5.0, threshold=0.0,
            background={"coco": ["sky", "wall"]},
        ),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "IMAGENET_CLASSNAMES", ["apple", "boat", "cup"])
        for run, name in (("plain", "context"), ("plain", "coco"), ("cured", "coco"), ("plain", "objects")):
            run_stage(folder, given, "zeroshot_segment", run, name)
    return folder


def figures(work, run, name):
    return read_figures(work / f"metrics/runs/{run}/zeroshot_segment/{name}/figures.csv").set_index("metric")


def opened(work):
    whole = open_clip.create_model(f"local-dir:{work / 'text'}").eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return whole, lambda names: open_clip.build_zero_shot_classifier(
        whole, tokenizer, names, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )


def pixels(path):
    return torch.from_numpy((np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) / 255 - 0.5) / 0.5).float()[
        None
    ]


def test_classes_of_pixels_are_those_of_open_clips_own_patches(work):
    whole, classifier = opened(work)
    texts, found, truth = classifier(["sky", "wall", "cat", "dog", "puppy"]), [], []
    whole.visual.output_tokens = True
    for i in range(3):
        with torch.no_grad():
            tokens = whole.visual(pixels(work / f"coco_object/images/val2017/00{i}.jpg"))[1]
        shares = (5 * F.normalize(tokens @ whole.visual.proj, dim=-1) @ texts).softmax(-1)[0].T.reshape(1, 5, 4, 4)
        shares = torch.stack([shares[:, :2].amax(1), shares[:, 2], shares[:, 3:].amax(1)], dim=1)
        found.append(F.interpolate(shares, (SIZE, SIZE), mode="bilinear")[0].argmax(0).numpy())
        truth.append(np.asarray(Image.open(work / f"coco_object/annotations/val2017/00{i}_instanceTrainIds.png")))
    expected = jaccard_score(np.ravel(truth), np.ravel(found), labels=[0, 1, 2], average="macro", zero_division=0)
    table = figures(work, "plain", "coco")
    assert table.loc["miou", "value"] == pytest.approx(expected, abs=1e-5) and len(np.unique(found)) > 1
    assert table.loc["pixel_accuracy_plain", "value"] == pytest.approx((np.array(truth) == found).mean(), abs=1e-5)


def test_every_foil_has_its_figures_and_registers_change_them(work):
    plain, cured = figures(work, "plain", "coco"), figures(work, "cured", "coco")
    assert {f"miou_{foil}" for foil in FOILS} <= set(plain.index) and plain.loc["miou", "n"] == 3
    images = [pd.read_csv(work / f"metrics/runs/{run}/zeroshot_segment/coco/images.csv") for run in ("plain", "cured")]
    assert (images[0]["pixel_accuracy_plain"] != images[1]["pixel_accuracy_plain"]).any()
    assert set(images[0].columns) >= {"image_id", "miou_by_image_qq", "pixel_accuracy_qq", "pixel_accuracy_qq_weight"}
    assert list(cured.index) == list(plain.index)
    assert (work / "metrics/runs/plain/zeroshot_segment/context/masks.png").is_file()
    pixel = pd.read_csv(work / "metrics/runs/plain/zeroshot_segment/context/pixels.csv")
    assert pixel.groupby("image_id")["actual"].sum().tolist() == [3 * SIZE**2 // 4] * 3  # 255 is not asked for


def test_objects_are_told_from_background_by_the_published_protocol(work):
    """Pooled accuracy and IoU, and the mean of each image's AP, from open_clip's weights by the test of `clip_patches`."""
    from measures.test_clip_patches import published_attributions

    whole, classifier = opened(work)
    texts, hits, areas, precision = classifier(["apple", "boat", "cup"]), 0, np.zeros((2, 2)), []
    for i in range(3):
        with torch.no_grad():
            embedding, added = published_attributions(whole, pixels(work / f"imagenet_seg/images/0{i}.png"))
        by_class = (added @ texts)[0]
        heat = by_class[:, (embedding @ texts).argmax()] - by_class.mean(1)
        heat = F.interpolate(heat.reshape(1, 1, 4, 4), scale_factor=16, mode="bilinear")[0, 0].clip(min=0)
        heat = ((heat - heat.min()) / (heat.max() - heat.min())).numpy()
        truth = np.asarray(Image.open(work / f"imagenet_seg/masks/0{i}.png"))
        guess = heat > heat.mean()
        hits += (guess == truth).sum()
        areas += [[((guess == k) & (truth == k)).sum(), ((guess == k) | (truth == k)).sum()] for k in (0, 1)]
        precision.append(
            average_precision_score(np.stack([truth == 0, truth == 1]).ravel(), np.stack([1 - heat, heat]).ravel())
        )
    table = figures(work, "plain", "objects")
    assert table.loc["pixel_accuracy_objects", "value"] == pytest.approx(hits / (3 * SIZE**2), abs=1e-5)
    assert table.loc["miou", "value"] == pytest.approx((areas[:, 0] / areas[:, 1]).mean(), abs=1e-5)
    assert table.loc["ap", "value"] == pytest.approx(np.mean(precision), abs=1e-5)


def test_a_set_without_its_lists_or_masks_is_refused(tmp_path):
    for source in ("context60", "coco_object", "imagenet_seg"):
        with pytest.raises(FileNotFoundError, match=r"lay the set out as regvit/data/sources/mask_sets.py says"):
            make_dataset(f"{source}:{tmp_path}", "made", tmp_path / "made", tmp_path / "p", 0, False)
