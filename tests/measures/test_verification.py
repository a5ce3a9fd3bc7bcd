import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from run_example import write_run

from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.transform import Transform
from regvit.measures import verification
from regvit.measures.gallery import as_picture
from regvit.measures.verification import (
    Models,
    compare_with_intact,
    draw_verification,
    most_outliers,
    open_models,
    verify,
    write_images,
)
from regvit.models.backbones import create, save_backbone
from regvit.registers.outliers import Detection
from regvit.registers.run_files import Variant


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False).eval()


def test_a_model_equals_itself(model):
    x = torch.randn(3, 3, 160, 160)
    outliers = np.zeros((3, 100), bool)
    outliers[0, 5] = outliers[2, 7] = True
    found = compare_with_intact(model, model, outliers, Detection(4, 1e9, 0.0), [x[:2], x[2:]], [4, 5])
    for field in ("cls_cosine", "patch_cosine", "outlier_patch_cosine"):
        values = getattr(found, field)
        assert np.isnan(values).tolist() == [False, True, False]  # image 1 has no outlier
        assert values[[0, 2]] == pytest.approx(1.0, abs=1e-5)
    assert np.allclose(found.cls_attention_on_outliers, found.intact_attention_on_outliers, equal_nan=True)
    assert found.cls_attention_on_registers[0] == 0
    assert found.outlier_fraction.tolist() == [0, 0, 0]


def test_attention_on_outliers_is_summed_over_the_marked_patches(model):
    x = torch.randn(1, 3, 160, 160)
    everywhere = np.ones((1, 100), bool)
    found = compare_with_intact(model, model, everywhere, Detection(4, 1e9, 0.0), [x], [5])
    assert 0.9 < found.cls_attention_on_outliers[0] < 1  # all but what CLS gives itself


def test_without_outliers_there_is_nothing_to_compare(model):
    with pytest.raises(ValueError, match="none of 1 images has an outlier"):
        compare_with_intact(model, model, np.zeros((1, 100), bool), Detection(4, 1.0, 0.0), [], [5])


ARGS = {"num_classes": 0, "dynamic_img_size": True}


@pytest.fixture
def folder(tmp_path):
    """A backbone `tiny` that says of itself that neuron 3 of block 1 was planted, its search result and two runs."""
    torch.manual_seed(0)
    model = create("test_vit", ARGS)
    name = "blocks.1.mlp.fc2.weight"
    replaced = {name: model.get_parameter(name).detach().clone()}
    model.get_parameter(name).data[:, 3] = 1.0
    save_backbone(
        tmp_path / "tiny", model, name="tiny", architecture="test_vit", model_args=ARGS,
        transform=Transform(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), source="random weights", licence="MIT",
        planted={"neurons": {1: [3]}}, replaced=replaced,
    )  # fmt: skip
    found = {"threshold": 1.0, "detect_layer": 3, "selected": {"1": [3]}}
    (tmp_path / "tiny.json").write_text(json.dumps(found))
    for run, registers, count in (("plain", "none", 0), ("cured", "test_time", 1)):
        write_run(tmp_path / f"{run}.json", tmp_path / "tiny", Variant(registers, count), {1: (3,)})
    return tmp_path


def opened(folder, run: str) -> Models:
    return open_models(folder / f"{run}.json", folder, folder)


def test_a_run_opens_beside_the_models_before_planting_and_before_registers(folder):
    models = opened(folder, "cured")
    assert models.intact.planted is None and models.untreated.planted == {1: [3]}
    assert models.run.model.num_prefix_tokens == 2 and models.untreated.model.num_prefix_tokens == 1
    assert models.later == [2, 3, 4, 5] and models.detection.layer == 3


def test_figures_are_means_over_images_with_their_intervals(folder):
    models, batches = opened(folder, "plain"), list(torch.randn(4, 3, 64, 64).split(2))
    metrics = verify(models, batches).metrics
    assert metrics["planted"] and metrics["images"] == metrics["images_with_outliers"] == 4  # all norms exceed 1
    assert metrics["outlier_fraction"] == metrics["outlier_fraction_lo"] == 1
    everywhere = np.ones((4, 16), bool)
    recovery = compare_with_intact(
        models.run.model, models.intact.model, everywhere, models.detection, batches, models.later
    )
    assert metrics["cls_cosine"] == pytest.approx(recovery.cls_cosine.mean(), abs=1e-6)
    assert metrics["cls_cosine_lo"] <= metrics["cls_cosine"] <= metrics["cls_cosine_hi"]


def test_without_ground_truth_or_outliers_no_image_is_looked_at(folder):
    def never():
        raise AssertionError("an image was asked for")
        yield

    models = opened(folder, "plain")
    nothing_found = Models(models.intact, models.untreated, models.run, None, models.later)
    assert verify(nothing_found, never()).metrics["why"] == "the search found no outliers in the planted backbone"
    as_it_came = Models(models.intact, models.intact, models.intact, None, models.later)
    assert verify(as_it_came, never()).metrics["planted"] is False


@pytest.fixture
def drawn(folder):
    """The folder with two images in its data set."""
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    write_dataset(folder, "made", [Row(name, f"{name}.png", "", "test") for name in "ab"], [], {})
    return folder


def test_each_part_of_the_picture_is_a_strip_with_a_tile_an_image(drawn):
    draw_verification(drawn / "cured.png", "cured", opened(drawn, "cured"), read_dataset(drawn), 2)
    found = {path.name: Image.open(path).size for path in (drawn / "cured").iterdir()}
    models = ("intact", "original", "cured")
    names = {f"{what}-{model}.png" for what in ("norms", "attention", "features") for model in models}
    assert found.keys() == names | {"images.jpg"}
    assert found["images.jpg"] == (2 * 128, 128)  # twice 64 pixels
    assert {found[name] for name in names} == {(2 * 224, 224)}  # 8 patches of 28 pixels


def test_colours_are_those_of_the_backbone_before_planting_in_every_run(drawn):
    for run in ("plain", "cured"):
        draw_verification(drawn / f"{run}.png", run, opened(drawn, run), read_dataset(drawn), 2)
    plain, cured = ((drawn / run / "features-intact.png").read_bytes() for run in ("plain", "cured"))
    assert plain == cured
    original, untreated = drawn / "cured/features-original.png", drawn / "plain/features-plain.png"
    assert original.read_bytes() == untreated.read_bytes()  # one model, under two names


def test_a_model_of_an_earlier_run_does_not_stay(drawn):
    (drawn / "plain").mkdir()
    (drawn / "plain" / "features-gone.png").write_text("")
    draw_verification(drawn / "plain.png", "plain", opened(drawn, "plain"), read_dataset(drawn), 2)
    assert not (drawn / "plain" / "features-gone.png").exists()


def test_the_picture_shows_the_images_with_most_outliers_and_the_parts_the_first_ones(drawn, monkeypatch):
    models, transform, data = opened(drawn, "cured"), Transform(64, (0.5,) * 3, (0.5,) * 3), read_dataset(drawn)
    counts = {0: 3, 1: 7}  # of images a and b
    files = [transform.normalise(transform.load(drawn / f"{name}.png")[None]) for name in "ab"]

    def norms(model, batches, layers):
        assert model is models.untreated.model and layers == [3]
        rows = [
            [2.0] * counts[next(i for i, x in enumerate(files) if torch.equal(x[0], y))] for b in batches for y in b
        ]
        return np.array([[row + [0.0] * (16 - len(row)) for row in rows]])

    monkeypatch.setattr(verification, "patch_norms", norms)
    assert most_outliers(models, data, transform, 4) == [1, 0]
    counts[0] = 7
    assert most_outliers(models, data, transform, 1) == [0]  # equals in their order
    assert most_outliers(replace(models, detection=None), data, transform, 4) == [0, 1]
    chosen = []
    monkeypatch.setattr(verification, "most_outliers", lambda *_: [1])
    monkeypatch.setattr(verification, "draw_maps", lambda path, images, maps, threshold: chosen.append(images))
    draw_verification(drawn / "cured.png", "cured", models, data, 2)
    assert np.array_equal(chosen[0], as_picture(replace(transform, size=128).load(drawn / "b.png")[None]))
    assert Image.open(drawn / "cured" / "images.jpg").size == (2 * 128, 128)


def test_the_table_has_a_row_an_image_with_empty_cells_where_nothing_is_defined(folder):
    def table(path):
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    models, batches = opened(folder, "cured"), list(torch.randn(4, 3, 64, 64).split(2))
    found = verify(models, batches)
    found.images.cls_cosine[2] = np.nan
    write_images(folder / "new" / "images.csv", list("abcd"), found.images)
    rows = table(folder / "new" / "images.csv")
    assert [row["image_id"] for row in rows] == list("abcd")
    assert list(rows[0]) == ["image_id", *vars(found.images)]
    shares = [float(row["cls_attention_on_outliers"]) for row in rows]
    assert np.mean(shares) == pytest.approx(found.metrics["cls_attention_on_outliers"], rel=1e-4)
    assert [row["cls_cosine"] == "" for row in rows] == [False, False, True, False]
    with pytest.raises(ValueError, match="3 images and 4 values; give the images that were compared"):
        write_images(folder / "images.csv", list("abc"), found.images)
    write_images(folder / "images.csv", list("abcd"), None)
    assert (folder / "images.csv").read_text() == (folder / "new" / "images.csv").read_text().splitlines()[0] + "\n"


def test_the_picture_has_a_pair_of_columns_a_model(drawn):
    folder, widths = drawn, {}
    for run in ("plain", "cured"):
        draw_verification(folder / f"{run}.png", run, opened(folder, run), read_dataset(folder), 2)
        widths[run] = Image.open(folder / f"{run}.png").size[0]
    assert widths["cured"] / widths["plain"] == pytest.approx(7 / 5, abs=0.02)  # image, and 3 or 2 models twice
