"""Position tables at other sizes: once from the trained one, by the rule asked for."""

import math

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from regvit import add_test_time_registers
from regvit.data.transform import Transform
from regvit.models.backbones import Backbone, create, load_backbone, resized, save_backbone
from regvit.models.positions import TrainedPositions, prefix_rows, resample, set_image_size

TRANSFORM = Transform(518, (0.5,) * 3, (0.5,) * 3)
ARGS = {"num_classes": 0, "dynamic_img_size": True, "depth": 2, "embed_dim": 48, "num_heads": 3}


def cubic(x: float, a: float = -0.75) -> float:
    """The cubic convolution kernel (Keys 1981)."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resize_matrix(side: int, new: int) -> np.ndarray:
    """(new, side) weights of bicubic resampling with half-pixel centres, clamped edges and no antialiasing."""
    out = np.zeros((new, side))
    for i in range(new):
        centre = (i + 0.5) * side / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            out[i, min(max(tap, 0), side - 1)] += cubic(centre - tap)
    return out


@pytest.mark.parametrize("new", [8, 37, 50])
def test_positions_are_resampled_bicubically_without_antialiasing(new):
    table = torch.randn(1, 37 * 37, 3, generator=torch.Generator().manual_seed(0))
    weights = resize_matrix(37, new)
    expected = np.einsum("yi,xj,ijd->yxd", weights, weights, table.double().numpy().reshape(37, 37, 3))
    np.testing.assert_allclose(resample(table, new, 0, "plain")[0].numpy(), expected.reshape(-1, 3), atol=1e-5)


def test_dinov2s_own_rule_is_that_of_its_published_code():
    table = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    grid = table[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, mode="bicubic", antialias=False, scale_factor=((16 + 0.1) / 37,) * 2)
    assert expected.shape[-2:] == (16, 16)
    found = resample(table, 16, 1, "dinov2")
    assert torch.equal(found[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2)) and torch.equal(
        found[:, :1], table[:, :1]
    )
    with pytest.raises(ValueError, match="positions is 'own'; expected one of timm, plain, dinov2"):
        resample(table, 16, 1, "own")


@pytest.mark.parametrize(("rows", "prefix"), [(1370, 1), (1369, 0), (198, 2), (261, 5)])
def test_rows_that_are_no_patches_are_told_by_the_square_that_is_left(rows, prefix):
    assert prefix_rows(rows) == prefix


def made(architecture="vit_small_patch14_dinov2", **args):
    torch.manual_seed(0)
    return create(architecture, {**ARGS, **args})


def trained(model):
    return dict(model.named_parameters())["pos_embed"].detach().clone()


@pytest.mark.parametrize("rule", ["timm", "plain", "dinov2"])
def test_a_backbone_at_one_size_that_is_measured_at_another_sees_the_trained_table_resampled_once(rule, tmp_path):
    model, table = made(), trained(made())
    set_image_size(model, 112, rule)
    assert torch.equal(model.pos_embed, TrainedPositions(table, 1, rule).at(8))
    about = {"name": "x", "architecture": "vit_small_patch14_dinov2", "source": "here", "licence": "MIT"}
    save_backbone(tmp_path, model, transform=Transform(112, (0.5,) * 3, (0.5,) * 3),
                  model_args={**ARGS, "img_size": 112}, **about)  # fmt: skip
    opened = load_backbone(tmp_path)
    wide = resized(opened, 224)
    assert torch.equal(wide.model.pos_embed, TrainedPositions(table, 1, rule).at(16))
    assert wide.info["model_args"]["img_size"] == 224 and wide.transform.size == 224
    assert torch.equal(resized(wide, 112).model.pos_embed, opened.model.pos_embed)
    assert opened.transform.size == 112 and opened.model.pos_embed.shape[1] == 65  # left as it was
    x = torch.randn(1, 3, 224, 224)
    at_once = made()
    set_image_size(at_once, 224, rule)
    assert torch.equal(wide.model(x), at_once(x))
    (tmp_path / "positions.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"positions\.safetensors"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("architecture", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_a_model_with_test_time_registers_is_resized_as_one_without(architecture):
    plain = Backbone("x", made(architecture), TRANSFORM, "", None, {})
    treated = Backbone("x", made(architecture), TRANSFORM, "", None, {})
    handle = add_test_time_registers(treated.model, {0: [3]}, 2)
    wide = resized(treated, 224).model
    x = torch.randn(1, 3, 224, 224)
    again = resized(plain, 224).model
    add_test_time_registers(again, {0: [3]}, 2)
    assert torch.equal(wide(x), again(x))
    handle.remove()
    assert torch.equal(resized(treated, 224).model(x), resized(plain, 224).model(x))


def test_models_with_rotary_positions_alone_are_resized_too():
    model = timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=2, dynamic_img_size=True).eval()
    backbone = Backbone("x", model, Transform(256, (0.5,) * 3, (0.5,) * 3), "", None, {})
    x = torch.randn(1, 3, 128, 128)
    assert torch.allclose(resized(backbone, 128).model(x), model(x), atol=1e-5)
