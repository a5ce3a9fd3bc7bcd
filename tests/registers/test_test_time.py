import copy

import numpy as np
import pytest
import timm
import torch

from regvit import RegisterNeurons, TokenLayout, add_test_time_registers, remove_test_time_registers
from regvit.registers.test_time import PATCH_TREATMENTS, STATISTICS, shift, signed_max

NEURONS = {1: [3, 5, 7], 2: [0]}


def make(name: str = "test_vit", **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **kwargs).eval()
    for parameter in model.parameters():  # stock LayerScale of 1e-5 would hide every effect
        if parameter.ndim == 1 and parameter.abs().max() <= 1e-4 and parameter.abs().max() > 0:
            torch.nn.init.ones_(parameter)
    return model


def images(model: torch.nn.Module, count: int = 2) -> torch.Tensor:
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or model.default_cfg["input_size"][1:]
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.forward_features(x)


def by_hand(
    x: np.ndarray, index: list[int], start: int, k: int, statistic: str, patches: str, scale: float
) -> np.ndarray:
    """The shift with plain loops; `start` is where the test-time registers stand, the patches follow them."""
    out = x.copy()
    for b in range(len(x)):
        for u in index:
            pool = {
                "per_neuron": x[b, start:, u],
                "per_neuron_patches": x[b, start + k :, u],
                "reference": x[b][:, index].ravel(),
            }[statistic]
            old = x[b, start + k :, u]
            out[b, start : start + k, u] = scale * pool[np.abs(pool).argmax()]
            mean = old.mean()
            out[b, start + k :, u] = {
                "zero": np.zeros_like(old),
                "mean": np.full_like(old, mean),
                "only_outliers": np.where(old > mean + old.std(ddof=1), mean, old),
                "same": old,
            }[patches]
    return out


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("patches", PATCH_TREATMENTS)
def test_shift_is_what_plain_loops_give(statistic, patches):
    x = np.random.default_rng(0).normal(size=(3, 9, 6))
    layout = TokenLayout(cls=1, trained=1, test_time=2)
    got = shift(torch.from_numpy(x), torch.tensor([1, 4]), layout, statistic, patches, scale=1.5)
    assert np.allclose(got, by_hand(x, [1, 4], 2, 2, statistic, patches, 1.5))


def test_class_and_trained_registers_are_neither_read_nor_edited():
    x = torch.zeros(1, 5, 1)
    x[0, :2] = 100.0  # CLS and a trained register
    x[0, 3] = -2.0
    got = shift(x, torch.tensor([0]), TokenLayout(1, 1, 1)).flatten().tolist()
    assert got == [100.0, 100.0, -2.0, 0.0, 0.0]


def test_signed_max_keeps_the_sign():
    assert signed_max(torch.tensor([[1.0, -3.0], [2.0, -1.0]]), 1).tolist() == [-3.0, 2.0]


STOCK = [
    ("vit_tiny_patch16_224", {"depth": 3}),
    ("vit_small_patch14_dinov2", {"depth": 3, "img_size": 56}),
    ("vit_giant_patch14_dinov2", {"depth": 3, "img_size": 56, "embed_dim": 96, "num_heads": 4}),
    ("vit_small_patch14_reg4_dinov2", {"depth": 3, "img_size": 56}),
    ("vit_base_patch16_clip_224", {"depth": 3, "embed_dim": 96, "num_heads": 4}),
    ("deit3_small_patch16_224", {"depth": 3}),
    ("deit_tiny_distilled_patch16_224", {"depth": 3}),
    ("vit_base_patch16_siglip_224", {"depth": 3, "embed_dim": 96, "num_heads": 4}),
    ("eva02_tiny_patch14_224", {"depth": 3}),
    ("vit_small_patch16_dinov3", {"depth": 3}),
    ("vit_base_patch16_rope_reg1_gap_256", {"depth": 3, "embed_dim": 96, "num_heads": 4}),
    ("vit_pe_core_tiny_patch16_384", {"depth": 3}),
    ("naflexvit_base_patch16_gap", {"depth": 3, "embed_dim": 96, "num_heads": 4}),
    ("flexivit_small", {"depth": 3}),
    ("test_vit", {}),
    ("test_vit2", {}),
    ("test_vit3", {}),
]


@pytest.mark.parametrize(("name", "kwargs"), STOCK, ids=[name for name, _ in STOCK])
def test_stock_models_take_registers_and_give_them_back(name, kwargs):
    model = make(name, **kwargs)
    x, plain_layout = images(model), TokenLayout.of(model)
    plain = features(model, x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with add_test_time_registers(model, NEURONS, 2):
        layout = TokenLayout.of(model)
        treated = features(model, x)
        assert treated.shape[1] == plain.shape[1] + 2
        assert (layout.cls, layout.trained, layout.test_time) == (plain_layout.cls, plain_layout.trained, 2)
        assert not torch.allclose(layout.patches(treated), plain_layout.patches(plain), atol=1e-4)
        assert torch.equal(features(copy.deepcopy(model), x), treated)
        one_by_one = torch.cat([features(model, x[i : i + 1]) for i in range(len(x))])
        assert torch.allclose(one_by_one, treated, atol=1e-5)
    assert torch.equal(features(model, x), plain)
    assert TokenLayout.of(model) == plain_layout
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    assert not any(module._forward_pre_hooks for module in model.modules())


HIDDEN = [
    (name, kwargs)
    for name, kwargs in STOCK
    if name not in ("naflexvit_base_patch16_gap", "vit_pe_core_tiny_patch16_384")
]


@pytest.mark.parametrize(("name", "kwargs"), HIDDEN, ids=[name for name, _ in HIDDEN])
def test_registers_hidden_from_attention_leave_the_plain_model(name, kwargs):
    """Proves positions: every other token sees what it saw before, rotary and absolute embeddings included."""
    model = make(name, **kwargs)
    x, plain_layout = images(model), TokenLayout.of(model)
    plain = features(model, x)
    with add_test_time_registers(model, {}, 2):
        layout = TokenLayout.of(model)
        n = plain.shape[1] + 2
        mask = torch.ones(1, 1, n, n, dtype=torch.bool)
        mask[..., layout.cls + layout.trained : layout.prefix] = False
        with torch.no_grad():
            hidden = model.forward_features(x, attn_mask=mask)
        assert torch.allclose(layout.patches(hidden), plain_layout.patches(plain), atol=2e-5)
        assert not torch.allclose(layout.patches(features(model, x)), plain_layout.patches(plain), atol=1e-4)


def test_each_image_in_a_batch_gets_its_own_register_value():
    model = make()
    x = images(model, 5)
    add_test_time_registers(model, NEURONS, 2)
    one_by_one = torch.cat([features(model, x[i : i + 1]) for i in range(5)])
    assert torch.allclose(features(model, x), one_by_one, atol=1e-6)


def test_zero_registers_leaves_the_output_bit_identical():
    model = make()
    x = images(model)
    plain = features(model, x)
    handle = add_test_time_registers(model, NEURONS, 0)
    assert torch.equal(features(model, x), plain)
    handle.remove()
    assert torch.equal(features(model, x), plain)


def test_intermediates_and_pooling_leave_the_registers_out():
    model = make("test_vit2", num_classes=4)  # average pooling over patches
    x = images(model)
    add_test_time_registers(model, {}, 3)
    with torch.no_grad():
        spatial, prefix = model.forward_intermediates(
            x, indices=[0], return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
        )[0]
        tokens = model.forward_features(x)
        pooled = model.forward_head(tokens, pre_logits=True)
    assert (spatial.shape[1], prefix.shape[1]) == (100, 4)
    assert torch.allclose(pooled, model.fc_norm(tokens[:, 4:].mean(1)), atol=1e-6)


def test_attention_pooling_over_the_prefix_leaves_the_registers_out():
    model = make("vit_pe_core_tiny_patch16_384", depth=3)
    x = images(model)
    tokens = features(model, x)
    with torch.no_grad():
        plain = model.pool(tokens)
        with add_test_time_registers(model, {}, 2):
            padded = torch.cat([tokens[:, :1], torch.full((2, 2, tokens.shape[2]), 9.0), tokens[:, 1:]], dim=1)
            assert torch.equal(model.pool(padded), plain)


def test_state_dict_loads_into_timms_own_model_with_registers():
    model = make("vit_small_patch14_dinov2", depth=3, img_size=56)
    add_test_time_registers(model, {}, 2)
    stock = timm.create_model("vit_small_patch14_dinov2", pretrained=False, depth=3, img_size=56, reg_tokens=2).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    x = images(stock)
    assert torch.equal(features(stock, x), features(model, x))


def test_removing_from_a_deep_copy_leaves_the_original_treated():
    model = make()
    x = images(model)
    plain = features(model, x)
    add_test_time_registers(model, NEURONS, 1)
    treated = features(model, x)
    twin = copy.deepcopy(model)
    remove_test_time_registers(twin)
    assert torch.equal(features(twin, x), plain)
    assert torch.equal(features(model, x), treated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_dtype_works(dtype):
    model = make().to(dtype)
    add_test_time_registers(model, NEURONS, 1)
    assert features(model, images(model).to(dtype)).dtype == dtype
    handle_first = make()
    add_test_time_registers(handle_first, NEURONS, 1)
    assert features(handle_first.to(dtype), images(model).to(dtype)).dtype == dtype  # cast after the surgery


def test_exported_program_needs_no_hook_code():
    model = make()
    add_test_time_registers(model, NEURONS, 2)
    x = images(model)
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        assert torch.allclose(program.module()(images(model, 3)), model(images(model, 3)), atol=1e-5)


def test_compiles_without_a_graph_break():
    model = make()
    add_test_time_registers(model, NEURONS, 1)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-6)


REFUSED = [
    ("beit_base_patch16_224", {"depth": 2}, "relative position bias"),
    ("vit_relpos_small_patch16_224", {"depth": 2}, "relative position bias"),
    ("cait_xxs24_224", {"depth": 2}, "Cait sends 196 tokens into its first block"),
    ("xcit_nano_12_p16_224", {"depth": 2}, "Xcit sends 196 tokens"),
    ("hiera_tiny_224", {}, "Hiera has no num_prefix_tokens"),
    ("samvit_base_patch16", {"depth": 2}, "VisionTransformerSAM has no num_prefix_tokens"),
    ("resnet18", {}, "ResNet has no list of transformer blocks"),
]


@pytest.mark.parametrize(("name", "kwargs", "reason"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_models_that_cannot_take_registers_are_refused_by_name_and_left_as_they_were(name, kwargs, reason):
    model = timm.create_model(name, pretrained=False, **kwargs).eval()
    state = list(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        add_test_time_registers(model, {}, 1)
    assert list(model.state_dict()) == state
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({9: [0]}, 1), "layer 9 is out of range: the model has 6 blocks"),
        (({1: [999]}, 1), r"neuron 999 of layer 1 is out of range: its MLP has \d+"),
        ((NEURONS, -1), "num_registers is -1; expected 0 to 64"),
    ],
)
def test_what_is_out_of_range_is_said(arguments, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        add_test_time_registers(model, *arguments)


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(ValueError, match="patches is 'none'; expected one of zero, mean, only_outliers, same"):
        add_test_time_registers(make(), NEURONS, patches="none")


def test_registers_are_not_added_twice():
    model = make()
    add_test_time_registers(model, NEURONS)
    with pytest.raises(ValueError, match="already has test-time registers"):
        add_test_time_registers(model, NEURONS)


def test_a_search_without_outliers_adds_a_register_that_nothing_writes_to():
    model = make()
    add_test_time_registers(model, RegisterNeurons(None, np.zeros((6, 2, 4))), 1)
    assert TokenLayout.of(model).test_time == 1
