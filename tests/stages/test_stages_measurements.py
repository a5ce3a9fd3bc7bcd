"""`extract_dense`, what is measured on it, and `verify`, on a tiny model and drawn squares whose boxes, masks and depth are known."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from run_example import write_run
from stage_runner import run_stage

from regvit.data.batches import Batches
from regvit.data.correspondences import Pair, write_pairs
from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.transform import Transform
from regvit.features.dense_set import DenseSet
from regvit.models.backbones import create, load_backbone, save_backbone
from regvit.pipeline import schema
from regvit.registers.outliers import patch_norms
from regvit.registers.run_files import Variant
from regvit.stats.figures import read_figures

ROOT = Path(__file__).parents[2]
SIZE, LAYER, SPLITS = 64, 3, ("train", "train", "val", "test", "test")
TRAINED = {"datasets": ["squares"], "learning_rates": [0.003, 0.03], "weight_decays": [0.0001], "steps": 20,
           "batch_size": 4}  # fmt: skip
KEPT = {"img_size": SIZE, "arrays": ["patches", "norms", "attention", "inside"]}
PARAMS = SimpleNamespace(
    seed=0,
    in_distribution="squares",
    extract=schema.Extract(precision="float32"),
    extract_dense=schema.ExtractDense(layers=2, datasets={"squares": KEPT, "blind": KEPT}),
    attention=schema.Attention(datasets=["squares"], first_layer=None),
    token_classes=schema.TokenClasses(datasets=["squares"], learning_rates=[0.1], steps=20, batch_size=8),
    discover=schema.Discover(
        datasets=["squares"],
        features=["k", "token"],
        normalised=[True, False],
        biases=[0.0, -0.5],
        k_patches=10,
        taus=[0.2, 0.5],
    ),
    discover_published=schema.DiscoverPublished(
        datasets=["squares"], kind="k", layer=-1, normalised=False, bias=0.0, k_patches=10, tau=0.2, head=1
    ),
    segment=schema.Trained(**TRAINED),
    depth=schema.Depth(**TRAINED, min_depth=0.001, max_depth=10.0, crop="none", bins=16, upsample=1),
    hummingbird=schema.Hummingbird(datasets=["squares"], memory=64, images=None, neighbours=5, temperature=0.02),
    correspond=schema.Measured(datasets=["squares"]),
    verify=schema.Verify(images=5, pictures="squares"),
)
MEASURED = (
    "tokens",
    "token_classes",
    "attention",
    "discover",
    "discover_published",
    "segment",
    "depth",
    "hummingbird",
    "correspond",
)


def run(stage, folder, *names):
    run_stage(folder, PARAMS, stage, *names)


def draw(folder, name, known=True):
    """Twenty images of a bright square on noise; the square is nearer, and its class that of the image."""
    (folder / "data" / name).mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(20):
        label = ("small", "large")[i % 2]
        pixels, side = rng.integers(60, 80, size=(48, 72, 3), dtype=np.uint8), (12, 24)[i % 2]
        x, y = (int(v) for v in rng.integers(0, 20, size=2))
        square = np.s_[y : y + side, x : x + side]
        pixels[square] = (230, 40, 40)
        mask, depth = np.zeros((48, 72), dtype=np.uint8), np.full((48, 72), 4000, dtype=np.uint16)
        mask[square], depth[square] = 1 + i % 2, 2000
        for what, array in (("image", pixels), ("mask", mask), ("depth", depth)):
            Image.fromarray(array).save(folder / f"data/{name}/{i}_{what}.png")
        truth = {"mask": f"{i}_mask.png", "depth": f"{i}_depth.png", "boxes": json.dumps([[x, y, x + side, y + side]])}
        rows.append(Row(f"{i}", f"{i}_image.png", label, SPLITS[i % 5], **truth if known else {}))
    write_dataset(folder / "data" / name, name, rows, ("small", "large"), {"source": "drawn"})
    points = np.array([[5.0, 5.0, 8.0, 8.0], [40, 30, 43, 33]])
    write_pairs(folder / "data" / name, [Pair(f"{i}", f"{i + 1}", points) for i in range(8)])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two runs on one backbone, whose largest norms are called outliers, gone through all stages."""
    folder = tmp_path_factory.mktemp("work")
    draw(folder, "squares")
    torch.manual_seed(0)
    args, tiny = {"num_classes": 0, "img_size": 32, "dynamic_img_size": True}, folder / "data/backbones/tiny"
    save_backbone(
        tiny, create("test_vit", args), name="tiny", architecture="test_vit", model_args=args,
        transform=Transform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crop_pct=0.8), source="random", licence="MIT",
    )  # fmt: skip
    whole = Transform(SIZE, (0.5,) * 3, (0.5,) * 3).whole()
    images = Batches(read_dataset(folder / "data/squares").subset("test"), whole)
    norms = patch_norms(load_backbone(tiny).model, images, [LAYER])[0]
    detection = {"layer": LAYER, "threshold": float(np.sort(norms.ravel())[-4])}  # three outliers
    (folder / "features/neurons").mkdir(parents=True)
    found = {"threshold": detection["threshold"], "detect_layer": LAYER, "selected": {"2": [1, 5]}}
    (folder / "features/neurons/tiny.json").write_text(json.dumps(found))
    for name, variant in (("plain", Variant("none", 0)), ("cured", Variant("test_time", 1))):
        write_run(folder / f"features/runs/{name}.json", tiny, variant, {2: (1, 5)}, detection)
        for stage in ("extract_dense", *MEASURED):
            run(stage, folder, name, "squares")
        run("verify", folder, name)
    return folder


def opened(work, name) -> DenseSet:
    return DenseSet.open(work / "data/squares", work / f"features/dense/{name}/squares.zarr")


def figures(work, name, stage) -> pd.DataFrame:
    return read_figures(work / f"metrics/runs/{name}/{stage}/figures.csv").set_index("metric")


def test_one_forward_is_kept_of_whole_images_at_the_size_of_the_stage(work):
    plain, cured = opened(work, "plain"), opened(work, "cured")
    assert plain.transform.size == SIZE and plain.store.attributes["run"] == "plain"
    assert plain.layout.prefix == 1 and cured.layout.prefix == 2
    assert plain.store.arrays["k"] == (2, 16, 64) and cured.store.arrays["attention"][2:] == (2, 18)  # 4 x 4 patches
    backbone = load_backbone(work / "data/backbones/tiny")
    with torch.inference_mode():
        tokens = backbone.model.forward_features(plain.images([6]))[:, 1:]
    np.testing.assert_allclose(plain.read("patches", [6]), tokens, atol=5e-3)
    assert not list((work / "work").iterdir())


def test_all_runs_are_looked_at_where_the_model_without_registers_has_its_outliers(work):
    plain, cured = opened(work, "plain"), opened(work, "cured")
    test = plain.rows("test")
    assert plain.outliers(test).sum() == 3 and np.array_equal(plain.outliers(test), cured.outliers(test))
    assert not np.array_equal(plain.read("norms", test), cured.read("norms", test))


@pytest.mark.parametrize(
    ("stage", "metric"),
    [("tokens/squares", "position_top1_normal"), ("attention/squares", "entropy"), ("discover/squares", "corloc"),
     ("segment/squares", "miou"), ("depth/squares", "rmse"), ("hummingbird/squares", "miou"),
     ("correspond/squares", "pck_by_pair"), ("verify", "outlier_fraction")],
)  # fmt: skip
def test_figures_have_intervals_and_images_a_row_each(work, stage, metric):
    for name in ("plain", "cured"):
        table = figures(work, name, stage)
        one = table.loc[metric]
        assert one["lo"] <= one["value"] <= one["hi"] and set(table["run"]) == {name}
        images = pd.read_csv(work / f"metrics/runs/{name}/{stage}/images.csv")
        assert len(images) == one["n"] == (5 if stage == "verify" else 8)
        if metric != "miou":  # no mean over images
            assert images[metric].mean() == pytest.approx(one["value"], abs=1e-5)


def test_every_measurement_leaves_its_tables_and_pictures(work):
    for stage, names in {
        "tokens/squares": {"norms.csv", "positions.csv", "anatomy.png"},
        "token_classes/squares": set(),
        "attention/squares": {"layers.csv", "heads.csv", "all_queries.csv", "maps.png", "heads.png"},
        "discover/squares": {"sweep.csv", "features.csv", "boxes.png"},
        "segment/squares": {"classes.csv", "pixels.csv"},
        "depth/squares": set(),
    }.items():
        found = {path.name for path in (work / "metrics/runs/cured" / stage).iterdir()}
        assert found == names | {"figures.csv", "images.csv"}
    verified = {"norms.csv", "diagnosis.csv", "heads.csv", "maps.png", "images.jpg"}
    assert verified <= {p.name for p in (work / "metrics/runs/cured/verify").iterdir()}


def test_classes_are_read_from_single_tokens(work):
    table = figures(work, "cured", "token_classes/squares")
    assert {"class_top1_cls", "class_top1_register", "class_top1_normal"} <= set(table.index)
    assert table.loc["class_top1_cls", "n"] == 8


def test_verify_measures_the_run_itself(work):
    plain, cured = figures(work, "plain", "verify"), figures(work, "cured", "verify")
    assert "cls_cosine" not in plain.index  # nothing was planted
    assert plain.loc["outlier_fraction", "value"] == plain.loc["untreated_outlier_fraction", "value"]
    assert "cls_attention_on_registers" in cured.index and "cls_attention_on_registers" not in plain.index
    before, after = (
        pd.read_csv(work / f"metrics/runs/{name}/verify/diagnosis.csv").set_index("model")
        for name in ("plain", "cured")
    )
    assert list(before.index) == ["untreated"] and list(after.index) == ["untreated", "cured"]
    assert before.loc["untreated", "verdict"] == after.loc["untreated", "verdict"]
    assert f"({after.loc['untreated', 'sink_norm']:.1f} before)" in after.loc["cured", "verdict"]


def test_the_same_input_gives_the_same_bytes(work):
    kept = {path: path.read_bytes() for path in sorted((work / "metrics").rglob("*")) if path.is_file()}
    for stage in MEASURED:
        run(stage, work, "cured", "squares")
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize(("stage", "lacks"), [("segment", "train images with a mask"), ("discover", "images with boxes"),
                                              ("depth", "train images with a depth")])  # fmt: skip
def test_a_set_without_ground_truth_is_refused(work, stage, lacks):
    if not (work / "data/blind").exists():
        draw(work, "blind", known=False)
        run("extract_dense", work, "plain", "blind")
    with pytest.raises(SystemExit, match=rf"{stage}: data set blind has no .*{lacks}"):
        run(stage, work, "plain", "blind")
