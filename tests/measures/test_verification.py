from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from run_example import write_run

from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.transform import Transform
from regvit.measures import verification
from regvit.measures.gallery import draw_maps
from regvit.measures.verification import (
    Models,
    draw_verification,
    figures,
    most_outliers,
    norm_table,
    open_models,
    run_forward,
    token_maps,
    verify,
)
from regvit.models.attention import cls_attention
from regvit.models.backbones import create, save_backbone
from regvit.registers.outliers import patch_norms
from regvit.registers.run_files import Variant

ARGS = {"num_classes": 0, "dynamic_img_size": True}
VARIANTS = {"plain": Variant("none", 0), "cured": Variant("test_time", 1), "empty": Variant("test_time", 1, "empty")}


@pytest.fixture
def folder(tmp_path):
    """A backbone `tiny` that says of itself that neuron 3 of block 1 was planted, its search result and three runs."""
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
    (tmp_path / "tiny.json").write_text('{"threshold": 1.0, "detect_layer": 3, "selected": {"1": [3]}}')
    for run, variant in VARIANTS.items():
        write_run(tmp_path / f"{run}.json", tmp_path / "tiny", variant, {1: (3,)}, {"layer": 3, "threshold": 1.0})
    rng = np.random.default_rng(0)
    for image in "ab":
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{image}.png")
    write_dataset(tmp_path, "made", [Row(image, f"{image}.png", "", "test") for image in "ab"], [], {})
    return tmp_path


def opened(folder, run: str) -> Models:
    return open_models(folder / f"{run}.json", folder, folder)


def batches() -> list[torch.Tensor]:
    return list(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).split(2))


def test_a_run_opens_beside_the_models_before_planting_and_before_registers(folder):
    models = opened(folder, "cured")
    assert models.intact.planted is None and models.untreated.planted == {1: [3]}
    assert models.run.model.num_prefix_tokens == 2 and models.untreated.model.num_prefix_tokens == 1
    assert models.later == [2, 3, 4, 5] and models.detection.layer == models.layer == 3
    plain = opened(folder, "plain")
    assert plain.run is plain.untreated


def test_a_model_equals_itself_where_an_image_has_outliers(folder):
    models = opened(folder, "plain")
    norms = patch_norms(models.run.model, batches(), [3])[0].max(1)
    detection = replace(models.detection, threshold=float(np.sort(norms)[1]))  # two of the four images have some
    same = replace(models, intact=models.run, detection=detection)
    found = verify(same, batches()).images
    has = norms > detection.threshold
    for name in ("cls_cosine", "patch_cosine", "outlier_patch_cosine", "patch_mean_cosine"):
        assert np.isnan(found[name]).tolist() == (~has).tolist()
        assert found[name][has] == pytest.approx(1.0, abs=1e-5)
    assert np.allclose(found["cls_attention_on_outliers"], found["intact_attention_on_outliers"], equal_nan=True)
    assert np.array_equal(found["outlier_fraction"], found["untreated_outlier_fraction"])
    assert (found["outlier_fraction"] > 0).tolist() == has.tolist()


def test_attention_is_summed_over_the_marked_patches_and_the_registers(folder):
    models = opened(folder, "cured")
    found = verify(models, batches()).images  # all norms exceed 1
    assert (found["untreated_outlier_fraction"] == 1).all()
    rest = 1 - found["cls_attention_on_outliers"] - found["cls_attention_on_registers"]  # what CLS gives itself
    own = torch.cat([cls_attention(models.run.model, each, models.later).mean(0)[:, 0] for each in batches()])
    assert np.allclose(rest, own, atol=1e-5)


def test_every_backbone_is_looked_at_whether_or_not_it_was_planted_or_has_outliers(folder):
    models = opened(folder, "plain")
    bare = replace(models, intact=None, detection=None)
    found = {one.metric: one for one in figures(verify(bare, batches()))}
    assert found["outlier_fraction"].value == found["images_with_outliers"].value == 0
    assert found["cls_attention_on_outliers"].value is None and "cls_cosine" not in found
    assert "cls_attention_on_registers" not in found
    with pytest.raises(ValueError, match="no images to verify a run on"):
        verify(bare, [])


def test_outliers_left_are_those_of_the_run_itself_by_two_rulers(folder, monkeypatch):
    models = opened(folder, "empty")
    norms = patch_norms(models.run.model, batches(), [3])[0]
    detection = replace(models.detection, threshold=float(np.median(norms)))
    monkeypatch.setattr(verification, "detect", lambda norms: replace(detection, layer=4, threshold=0.0))
    result = verify(replace(models, detection=detection), batches())
    assert np.allclose(result.images["outlier_fraction"], (norms > detection.threshold).mean(1))
    assert (result.images["own_outlier_fraction"] == 1).all() and result.own.layer == 4
    table = norm_table(result)
    assert table["layer"].tolist() == list(range(6)) and table["median"][3] == pytest.approx(np.median(norms))
    found = {one.metric: one for one in figures(result)}
    assert found["outlier_fraction"].lo <= found["outlier_fraction"].value <= found["outlier_fraction"].hi
    assert found["outlier_fraction"].n == 4


def test_one_look_gives_tokens_attention_and_norms_in_reading_order(tiny_vit, noise_images):
    model, images = tiny_vit(registers=2), noise_images(2)
    maps = token_maps(model, images, 3, [4, 5])
    assert np.allclose(maps.norms, patch_norms(model, [images], [3])[0].reshape(2, 8, 8))
    assert np.allclose(maps.attention, cls_attention(model, images, [4, 5]).mean(0)[:, 3:].reshape(2, 8, 8), atol=1e-6)
    assert np.allclose(maps.features, model.forward_features(images)[:, 3:].reshape(2, 8, 8, -1), atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_cls_has_norms_and_features_and_its_picture_no_attention(tiny_vit, noise_images, tmp_path):
    assert run_forward(tiny_vit(cls=False, registers=1), noise_images(1), [4]).attention is None
    maps = token_maps(tiny_vit(cls=False), noise_images(1), 3, [4])
    assert maps.attention is None and maps.norms.shape == (1, 8, 8)
    draw_maps(tmp_path / "a.png", np.zeros((1, 8, 8, 3)), {"original": maps}, 10.0)
    width, height = Image.open(tmp_path / "a.png").size
    assert 1.1 < width / height < 1.4  # two columns and a title: no attention


def test_colours_are_those_of_the_backbone_before_planting_in_every_run(folder):
    for run in ("plain", "cured"):
        draw_verification(folder / run, run, opened(folder, run), read_dataset(folder), 2)
    plain, cured = ((folder / run / "features-intact.png").read_bytes() for run in ("plain", "cured"))
    assert plain == cured
    assert Image.open(folder / "cured/features-cured.png").size == (2 * 224, 224)  # two images of 8 patches of 28 px
    original, untreated = folder / "cured/features-original.png", folder / "plain/features-plain.png"
    assert original.read_bytes() == untreated.read_bytes()  # one model, under two names
    widths = {run: Image.open(folder / run / "maps.png").size[0] for run in ("plain", "cured")}
    assert widths["cured"] / widths["plain"] == pytest.approx(7 / 5, abs=0.02)  # image, and 3 or 2 models twice


def test_the_picture_shows_the_images_with_most_outliers(folder):
    models, data = opened(folder, "cured"), read_dataset(folder)
    transform = models.run.transform
    images = torch.stack([transform(folder / f"{name}.png") for name in "ab"])
    norms = patch_norms(models.untreated.model, [images], [3])[0]
    threshold = float(norms.max(1).mean())  # one image alone has outliers
    more = int(norms.max(1).argmax())

    def shown(detection, count):
        return most_outliers(replace(models, detection=detection), data, transform, count)

    assert shown(replace(models.detection, threshold=threshold), 4) == [more, 1 - more]
    assert shown(replace(models.detection, threshold=threshold), 1) == [more]
    assert shown(replace(models.detection, threshold=0.0), 4) == shown(None, 4) == [0, 1]  # equals in their order
