import copy
import json

import numpy as np
import pytest
import timm
import torch
from stock_models import NEURONS, features, images, make

from regvit import (
    RegisterNeurons,
    TokenLayout,
    add_cure,
    add_test_time_registers,
    find_register_neurons,
    remove_test_time_registers,
)
from regvit.registers.outliers import Detection
from regvit.registers.test_time import PATCH_TREATMENTS, STATISTICS, shift


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


SMALL = {"depth": 3, "img_size": 64}
OF_14 = {"depth": 3, "img_size": 56}
NARROW = {"embed_dim": 96, "num_heads": 4}
STOCK = [
    ("vit_tiny_patch16_224", SMALL),
    ("vit_small_patch14_dinov2", OF_14 | NARROW),
    ("vit_giant_patch14_dinov2", OF_14 | NARROW),
    ("vit_small_patch14_reg4_dinov2", OF_14 | NARROW),
    ("vit_base_patch16_clip_224", SMALL | NARROW),
    ("deit3_small_patch16_224", SMALL | NARROW),
    ("deit_tiny_distilled_patch16_224", SMALL),
    ("vit_base_patch16_siglip_224", SMALL | NARROW),
    ("eva02_tiny_patch14_224", OF_14),
    ("vit_small_patch16_dinov3", SMALL | NARROW),
    ("vit_base_patch16_rope_reg1_gap_256", SMALL | NARROW),
    ("vit_pe_core_tiny_patch16_384", SMALL),
    ("naflexvit_base_patch16_gap", {"depth": 3} | NARROW),
    ("flexivit_small", SMALL | NARROW),
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
        twin = copy.deepcopy(model)
        assert torch.equal(features(twin, x), treated)
        remove_test_time_registers(twin)
        assert torch.equal(features(twin, x), plain) and torch.equal(features(model, x), treated)
        assert model.state_dict().keys() == state.keys()
        one_by_one = torch.cat([features(model, x[i : i + 1]) for i in range(len(x))])
        assert torch.allclose(one_by_one, treated, atol=1e-5)
        with pytest.raises(ValueError, match="already has test-time registers"):
            add_test_time_registers(model, NEURONS)
    assert torch.equal(features(model, x), plain)
    assert TokenLayout.of(model) == plain_layout
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    assert not any(module._forward_pre_hooks for module in model.modules())


HIDDEN = [each for each in STOCK if each[0] not in ("naflexvit_base_patch16_gap", "vit_pe_core_tiny_patch16_384")]


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
    model = make("vit_pe_core_tiny_patch16_384", **SMALL)
    x = images(model)
    tokens = features(model, x)
    with torch.no_grad():
        plain = model.pool(tokens)
        with add_test_time_registers(model, {}, 2):
            padded = torch.cat([tokens[:, :1], torch.full((2, 2, tokens.shape[2]), 9.0), tokens[:, 1:]], dim=1)
            assert torch.equal(model.pool(padded), plain)


def test_with_empty_registers_it_is_timms_own_model_whose_register_tokens_are_zero():
    model = make("vit_small_patch14_dinov2", depth=3, img_size=56)
    add_test_time_registers(model, {}, 2)
    stock = timm.create_model("vit_small_patch14_dinov2", pretrained=False, depth=3, img_size=56, reg_tokens=2).eval()
    shown = {"reg_token": model.reg_token, "pos_embed": model.pos_embed}
    stock.load_state_dict({**model.state_dict(), **shown}, strict=True)
    x = images(stock)
    assert torch.equal(features(stock, x), features(model, x))


def test_exported_program_needs_no_hook_code():
    model = make(depth=2)
    add_test_time_registers(model, {0: [3, 5, 7], 1: [0]}, 2)
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(model, (images(model),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        assert torch.allclose(program.module()(images(model, 3)), model(images(model, 3)), atol=1e-5)


def test_compiles_without_a_graph_break():
    model = make(depth=2)
    add_test_time_registers(model, {0: [3, 5, 7], 1: [0]}, 1)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_the_output_is_that_of_a_model_whose_projections_were_rewritten_by_hand():
    model = make()
    add_test_time_registers(model, NEURONS, 1)
    plain = timm.create_model("test_vit", pretrained=False, reg_tokens=1, no_embed_class=False).eval()
    plain.load_state_dict({**model.state_dict(), "reg_token": model.reg_token, "pos_embed": model.pos_embed})
    for layer, units in NEURONS.items():

        def rewritten(_, args, units=units):
            a = args[0].clone()
            for unit in units:
                pool = a[:, 1:, unit]
                a[:, 1, unit] = pool.gather(1, pool.abs().argmax(1, keepdim=True))[:, 0]
                a[:, 2:, unit] = 0
            return (a,)

        plain.blocks[layer].mlp.fc2.register_forward_pre_hook(rewritten)
    torch.testing.assert_close(features(model, images(model)), features(plain, images(model)), rtol=0, atol=1e-6)


def test_trained_registers_stay_and_are_counted_with_the_new_ones():
    model = make(reg_tokens=2)
    trained = model.reg_token.detach().clone()
    with add_test_time_registers(model, {1: (0,)}, 3) as handle:
        assert handle.num_registers == 3 and handle.neurons == {1: (0,)}
        assert (model.num_reg_tokens, model.num_prefix_tokens, model.reg_token.shape[1]) == (5, 6, 5)
        assert torch.equal(model.reg_token[:, :2], trained) and not model.reg_token[:, 2:].any()
    assert (model.num_reg_tokens, model.num_prefix_tokens) == (2, 3) and torch.equal(model.reg_token, trained)


def test_a_model_that_averages_its_prefix_tokens_is_refused():
    model = make(global_pool="avg", pool_include_prefix=True)
    with pytest.raises(
        ValueError, match=r"averages its prefix tokens \(pool_include_prefix\), so registers would enter"
    ):
        add_test_time_registers(model, {1: (0,)}, 1)


REFUSED = [
    ("beit_base_patch16_224", {"depth": 2}, "relative position bias"),
    ("vit_relpos_small_patch16_224", {"depth": 2}, "relative position bias"),
    ("cait_xxs24_224", {"depth": 2}, "Cait sends 196 tokens into its first block"),
    ("xcit_nano_12_p16_224", {"depth": 2}, "Xcit sends 196 tokens"),
    ("hiera_tiny_224", {}, "Hiera has no num_prefix_tokens"),
    ("samvit_base_patch16", {"depth": 2}, "VisionTransformerSAM has no num_prefix_tokens"),
    ("convit_tiny", {}, "ConVit "),
    ("resnet18", {}, "ResNet has no list of transformer blocks"),
]


@pytest.mark.parametrize(("name", "kwargs", "reason"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_models_that_cannot_take_registers_are_refused_by_name_and_left_as_they_were(name, kwargs, reason):
    model = timm.create_model(name, pretrained=False, **kwargs).eval()
    state = list(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        add_test_time_registers(model, {}, 1)
    with pytest.raises(ValueError, match=reason):
        find_register_neurons(model, torch.randn(2, 3, 224, 224))
    assert list(model.state_dict()) == state
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("add", [add_test_time_registers, find_register_neurons, add_cure])
def test_a_function_that_was_compiled_is_refused_with_the_order_that_works(add):
    model = make()
    for compiled in (torch.compile(model.forward_features), torch.compile(torch.compile(model))):
        with pytest.raises(
            ValueError, match=r"a function that torch\.compile made.* give the model itself and compile after"
        ):
            add(compiled, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NEURONS, "1"), "num_registers is '1'; expected a whole number, not str"),
        (([(1, 3)], 1), r"the neurons are a list; expected what find_register_neurons returned, json.load"),
        (({1: 3}, 1), r"the neurons of layer 1 are 3; expected a list, as in \{1: \[3\]\}"),
        (({"blocks.1": [3]}, 1), r"a layer is 'blocks.1'; expected a whole number, as in \{4: \[12, 345\]\}"),
        (({1: [3.5]}, 1), r"a neuron is 3.5; expected a whole number"),
    ],
)
def test_neurons_of_another_form_are_refused_with_the_form(arguments, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        add_test_time_registers(model, *arguments)


def test_training_that_drops_patches_is_refused():
    model = make("vit_tiny_patch16_224", depth=2, img_size=64, patch_drop_rate=0.5).train()
    for refuse in (
        lambda: add_test_time_registers(model, {1: [3]}),
        lambda: find_register_neurons(model, images(model)),
    ):
        with pytest.raises(
            ValueError, match=r"drops patches at random \(patch_drop_rate 0.5\).*call model.eval\(\) first"
        ):
            refuse()
    add_test_time_registers(model.eval(), {1: [3]})


@pytest.mark.parametrize("nothing", [RegisterNeurons(None, ()), {"selected": {}, "threshold": None}])
def test_where_the_search_found_nothing_a_warning_says_so_and_the_model_stays(nothing):
    model = make()
    x = images(model)
    plain = features(model, x)
    with pytest.warns(UserWarning, match="the search found no register neurons, so no test-time register is added"):
        handle = add_test_time_registers(model, nothing, 2)
    assert handle.num_registers == 0 and handle.layout == TokenLayout(1, 0)
    assert torch.equal(features(model, x), plain)
    handle.remove()


def test_the_document_of_a_search_is_taken_as_json_gives_it():
    found = RegisterNeurons(Detection(3, 1.0, 0.5), (), selected=NEURONS)
    document = json.loads(found.to_json())
    for neurons in (document, document["selected"], {np.int64(k): np.array(v) for k, v in NEURONS.items()}):
        with add_test_time_registers(make(), neurons) as handle:
            assert handle.neurons == {layer: tuple(sorted(units)) for layer, units in NEURONS.items()}
