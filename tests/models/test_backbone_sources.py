"""Backbones are seen as their weights were evaluated: transforms and activations, held to what was published."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from regvit.models.sources import build, create_empty, transform_of

ENTRIES = yaml.safe_load((Path(__file__).parents[2] / "choices" / "backbones.yaml").read_text())["backbones"]
IMAGENET, HALF, CLIP = (0.485, 0.456, 0.406), (0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)
DINOV2, DINOV3 = (IMAGENET, 0.875, "center"), (IMAGENET, 1.0, "center")  # facebookresearch/dinov2: resize 256, crop 224
PUBLISHED = {  # mean, crop_pct, crop_mode, activation where it is not GELU
    **dict.fromkeys(("dinov2_small", "dinov2_base", "dinov2_large"), DINOV2),
    **dict.fromkeys(("dinov2_small_reg4", "dinov2_base_reg4", "dinov2_large_reg4"), DINOV2),
    **dict.fromkeys(("dinov2_giant", "dinov2_giant_reg4"), (*DINOV2, "SiLU")),
    **dict.fromkeys(("dinov3_small", "dinov3_base", "dinov3_large"), DINOV3),
    # openai/CLIP: resize 224, centre crop 224
    **dict.fromkeys(("clip_base_openai", "clip_large_openai"), (CLIP, 1.0, "center", "QuickGELU")),
    **dict.fromkeys(("clip_base_laion", "clip_large_datacomp"), (CLIP, 1.0, "center")),
    "clip_large_laion": (HALF, 1.0, "center"),  # trained with Inception's mean
    **dict.fromkeys(("siglip_base", "siglip2_base"), (HALF, 1.0, "squash")),  # open_clip: resize_mode squash
    "deit3_base": (IMAGENET, 0.9, "center"),
    "deit3_large": (IMAGENET, 1.0, "center"),
    **dict.fromkeys(("vit_base_supervised", "vit_large_supervised"), (HALF, 0.9, "center")),
    **dict.fromkeys(("mae_base", "mae_large"), DINOV2),  # facebookresearch/mae: resize 256, crop 224
}


def test_every_ready_entry_stands_in_the_table():
    assert set(ENTRIES) == {*PUBLISHED, "mine"}


@pytest.mark.parametrize("entry", PUBLISHED)
def test_a_ready_entry_is_what_its_weights_were_trained_and_evaluated_with(entry):
    mean, crop_pct, crop_mode, *activation = PUBLISHED[entry]
    model = create_empty(ENTRIES[entry]["source"].removeprefix("timm:"))
    seen = transform_of(model)
    assert type(model.blocks[0].mlp.act).__name__ == (activation or ["GELU"])[0]
    assert (seen.mean, seen.crop_pct, seen.crop_mode, seen.interpolation) == (mean, crop_pct, crop_mode, "bicubic")


@pytest.mark.parametrize(
    "name",
    ["eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",
     "vit_huge_patch14_clip_quickgelu_378.dfn5b", "vit_base_patch16_clip_224.laion2b"],
)  # fmt: skip
def test_wide_images_are_squashed_or_cropped_as_timm_does(name, tmp_path):
    wide = np.random.default_rng(0).integers(0, 256, (300, 620, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    model = create_empty(name)
    config = resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)
    expected = create_transform(**config, is_training=False)(Image.open(tmp_path / "wide.png"))
    torch.testing.assert_close(transform_of(model)(tmp_path / "wide.png"), expected)


def test_images_that_are_to_be_padded_are_refused():
    model = create_empty("test_vit")
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "border"}
    with pytest.raises(ValueError, match="expects crop_mode 'border', of which only center and squash are done here"):
        transform_of(model)


def test_an_entry_may_name_another_transform(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(state, tmp_path / "mine.safetensors")
    changes = {"crop_mode": "squash", "mean": (0.1, 0.2, 0.3)}
    built = build(f"file:{tmp_path / 'mine.safetensors'}", "test_vit", 96, transform=changes)
    assert (built.transform.crop_mode, built.transform.mean, built.transform.size) == ("squash", (0.1, 0.2, 0.3), 96)
    with pytest.raises(
        ValueError, match=r"transform \{'crop': 1\} does not fit; its keys are mean, std, interpolation"
    ):
        build(f"file:{tmp_path / 'mine.safetensors'}", "test_vit", transform={"crop": 1})
