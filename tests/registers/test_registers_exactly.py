"""Test-time registers inside of a model: what mutation testing found untested (`make mutation MODULE=registers`)."""

import pytest
import timm
import torch

from regvit import add_test_time_registers

NEURONS = {1: (5, 3), 2: (0,)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, img_size=64, num_classes=0).eval()
    for block in model.blocks:
        for scale in (block.ls1, block.ls2):
            if hasattr(scale, "gamma"):
                torch.nn.init.ones_(scale.gamma)
    return model


def x(count=3):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def seen_before_and_after(model, **options):
    """What enters `mlp.fc2` of every treated layer, before and after the shift, for each image; and the prefix's length."""
    before, after, hooks = {}, {}, []
    for layer in NEURONS:
        fc2 = model.blocks[layer].mlp.fc2
        hooks.append(fc2.register_forward_pre_hook(lambda _, args, i=layer: before.update({i: args[0].clone()})))
    add_test_time_registers(model, NEURONS, **options)
    for layer in NEURONS:
        fc2 = model.blocks[layer].mlp.fc2
        hooks.append(fc2.register_forward_pre_hook(lambda _, args, i=layer: after.update({i: args[0].clone()})))
    with torch.no_grad():
        model.forward_features(x())
    for hook in hooks:
        hook.remove()
    return before, after


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_in_the_model_registers_get_what_the_patches_lose_and_nothing_else_changes(model, count, scale):
    before, after = seen_before_and_after(model, num_registers=count, scale=scale)
    start = 1  # after CLS
    for layer, units in NEURONS.items():
        old, new = before[layer], after[layer]
        assert old.shape[1] == 1 + count + 16
        for image in range(len(old)):
            for unit in units:
                pool = old[image, start:, unit]
                expected = scale * pool[pool.abs().argmax()]
                assert new[image, start : start + count, unit].tolist() == pytest.approx([float(expected)] * count)
                assert (new[image, start + count :, unit] == 0).all()
        others = [unit for unit in range(old.shape[2]) if unit not in units]
        assert torch.equal(new[:, :, others], old[:, :, others])
        assert torch.equal(new[:, :start], old[:, :start])


def test_the_output_is_that_of_a_model_whose_projections_were_rewritten_by_hand(model):
    plain = timm.create_model(
        "test_vit", pretrained=False, img_size=64, num_classes=0, reg_tokens=1, no_embed_class=False
    )
    handle = add_test_time_registers(model, NEURONS, 1)
    state = model.state_dict()
    assert not [name for name in state if "register_neurons" in name]  # what timm's own model has, and no more
    plain.load_state_dict(state)
    plain.eval()
    for layer, units in NEURONS.items():

        def rewritten(_, args, units=units):
            a = args[0].clone()
            for unit in units:
                pool = a[:, 1:, unit]
                a[:, 1, unit] = pool.gather(1, pool.abs().argmax(1, keepdim=True))[:, 0]
                a[:, 2:, unit] = 0
            return (a,)

        plain.blocks[layer].mlp.fc2.register_forward_pre_hook(rewritten)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x()), plain.forward_features(x()), rtol=0, atol=1e-6)
    assert handle.num_registers == 1
    assert {layer: sorted(units) for layer, units in handle.neurons.items()} == {1: [3, 5], 2: [0]}


def test_in_a_with_block_the_handle_is_given_and_the_model_comes_back_at_its_end(model):
    with torch.no_grad():
        before = model.forward_features(x())
        with add_test_time_registers(model, NEURONS, 2) as handle:
            assert handle is not None and handle.num_registers == 2 and handle.model is model
            assert model.forward_features(x()).shape[1] == before.shape[1] + 2
        assert torch.equal(model.forward_features(x()), before)


@pytest.mark.parametrize(("layer", "units"), [(0, (0,)), (5, (191,))])
def test_the_first_and_the_last_layer_and_unit_are_in_range(model, layer, units):
    with add_test_time_registers(model, {layer: units}, 1) as handle:
        assert handle.neurons == {layer: units}


@pytest.mark.parametrize(
    ("neurons", "said"),
    [
        ({6: (0,)}, r"layer 6 is out of range: the model has 6 blocks \(0 to 5\)"),
        ({-1: (0,)}, r"layer -1 is out of range"),
        ({0: (-1,)}, "-1"),
        ({0: (192,)}, "192"),
    ],
)
def test_the_next_ones_are_not(model, neurons, said):
    with pytest.raises(ValueError, match=said):
        add_test_time_registers(model, neurons, 1)
    assert getattr(model, "test_time_registers", None) is None


def test_trained_registers_stay_and_are_counted_with_the_new_ones():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, img_size=64, num_classes=0, reg_tokens=2).eval()
    trained = model.reg_token.detach().clone()
    with add_test_time_registers(model, {1: (0,)}, 3):
        assert (model.num_reg_tokens, model.num_prefix_tokens, model.reg_token.shape[1]) == (5, 6, 5)
        assert torch.equal(model.reg_token[:, :2], trained) and not model.reg_token[:, 2:].any()
    assert (model.num_reg_tokens, model.num_prefix_tokens) == (2, 3) and torch.equal(model.reg_token, trained)


def test_a_model_that_averages_its_prefix_tokens_is_refused():
    model = timm.create_model("test_vit", pretrained=False, img_size=64, num_classes=0, global_pool="avg",
                              pool_include_prefix=True)  # fmt: skip
    with pytest.raises(
        ValueError, match=r"averages its prefix tokens \(pool_include_prefix\), so registers would enter"
    ):
        add_test_time_registers(model, {1: (0,)}, 1)
