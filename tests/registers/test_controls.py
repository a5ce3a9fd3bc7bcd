import copy

import pytest
import torch

from regvit.models.hooks import output_projection, watch_inputs
from regvit.models.tokens import TokenLayout
from regvit.registers.control_neurons import control_neurons
from regvit.registers.controls import ablate, ablated, mlp_widths, remove_ablation, silence
from regvit.registers.neurons import find_register_neurons
from regvit.registers.neurons_file import Neuron
from regvit.registers.outliers import patch_norms
from regvit.registers.planting import plant
from regvit.registers.test_time import add_test_time_registers

SELECTED, WIDTHS = {1: (3, 5), 4: (0,)}, {1: 12, 4: 12}


def test_random_neurons_are_as_many_a_layer_and_none_of_the_selected():
    for seed in range(20):
        chosen = control_neurons("random", SELECTED, WIDTHS, seed=seed)
        assert {layer: len(units) for layer, units in chosen.items()} == {1: 2, 4: 1}
        assert all(not set(chosen[layer]) & set(SELECTED[layer]) for layer in SELECTED)
        assert all(0 <= unit < 12 for units in chosen.values() for unit in units)
        assert all(list(units) == sorted(set(units)) for units in chosen.values())


def test_the_seed_decides_the_draw_and_a_layer_does_not_depend_on_the_others():
    assert control_neurons("random", SELECTED, WIDTHS, seed=7) == control_neurons("random", SELECTED, WIDTHS, seed=7)
    assert len({str(control_neurons("random", SELECTED, WIDTHS, seed=seed)) for seed in range(10)}) > 5
    alone = control_neurons("random", {4: (0,)}, WIDTHS, seed=7)
    assert alone[4] == control_neurons("random", SELECTED, WIDTHS, seed=7)[4]


def test_equally_active_neurons_are_the_nearest_in_activation_that_write_next_to_nothing():
    candidates = [
        Neuron(1, 3, 8.0, 0.5),
        Neuron(1, 5, 4.0, 0.4),
        Neuron(1, 7, 7.9, 0.01),  # writes a hundredth of the excess: too much
        Neuron(1, 8, 4.1, 0.0002),
        Neuron(1, 9, 5.0, -0.0003),
        Neuron(1, 10, 1.0, 0.0),
        Neuron(4, 0, 2.0, 0.1),
        Neuron(4, 1, 9.0, -0.5),  # writes against the excess
        Neuron(4, 2, 0.1, 0.0001),
    ]
    # 8.0 comes first and takes 5.0; 4.0 then takes 4.1.
    assert control_neurons("same_activation", SELECTED, WIDTHS, candidates) == {1: (8, 9), 4: (2,)}


def test_the_empty_control_moves_nothing_and_ablation_takes_the_selected_neurons_themselves():
    assert control_neurons("empty", SELECTED, WIDTHS) == {}
    assert control_neurons("ablated", {4: [2, 1], 1: (3,)}, {}) == {1: (3,), 4: (1, 2)}


@pytest.mark.parametrize(
    ("control", "activations", "message"),
    [
        ("random", (), "layer 4 has 1 neurons, of which 1 are selected: too few are left for 1"),
        ("same_activation", (), "neuron 3 of layer 1 is selected, but has no scores; run identify again"),
        ("same_activation", (0.5, 0.5, 0.0, 0.5), "layer 1 has 1 scored neurons that write less than 0.001 of the excess, but 2"),
        ("same_activation", (None, None, None), "scored by activation only"),
    ],
)  # fmt: skip
def test_a_control_that_cannot_be_had_is_refused(control, activations, message):
    candidates = [Neuron(1, unit, 8.0, share) for unit, share in zip((3, 5, 6, 7), activations, strict=False)]
    with pytest.raises(ValueError, match=message):
        control_neurons(control, SELECTED, {1: 12, 4: 1}, candidates)


@pytest.fixture(scope="module")
def planted(tiny_vit, noise_images):
    """A model with known register neurons, and images that make outliers in it."""
    model, images = tiny_vit(3), noise_images(24)
    planting = plant(model, images, seed_layer=1, amplifier_layer=2, edit_keys=True)
    return model, images, planting.neurons


@torch.no_grad()
def test_ablation_is_the_neurons_zeroed_by_hand_at_patches_and_can_be_undone(tiny_vit, noise_images):
    model, images, neurons = tiny_vit(registers=2), noise_images(2), {1: (3, 9), 4: (0,)}
    plain = model.forward_features(images)

    def zero(layer, a):
        a = a.clone()
        a[:, 3:, list(neurons[layer])] = 0  # after CLS and two registers
        return a

    with watch_inputs({layer: output_projection(model.blocks[layer]) for layer in neurons}, zero):
        expected = model.forward_features(images)
    assert not torch.equal(expected, plain)
    with ablated(model, neurons):
        assert torch.equal(model.forward_features(images), expected)
        assert not any(module._forward_pre_hooks for module in model.modules())
    remove_ablation(model)
    assert torch.equal(model.forward_features(images), plain)
    assert not any("ablated" in name for name, _ in model.named_buffers())


@pytest.fixture
def two_blocks(tiny_vit, noise_images):
    """A small model, images and neurons that tell in it."""
    model = tiny_vit(0, depth=2)
    model.blocks[0].mlp.fc2.weight[:, 3:9] *= 50
    return model, noise_images(2), {0: range(3, 9)}


@torch.no_grad()
def test_a_model_that_was_compiled_before_is_ablated_as_the_eager_one_and_given_back(two_blocks):
    model, images, neurons = two_blocks
    compiled = torch.compile(model, backend="eager")
    plain = compiled(images)
    with ablated(compiled, neurons):
        seen, expected = compiled(images), model(images)
    assert torch.allclose(seen, expected, atol=1e-6) and not torch.allclose(seen, plain, atol=1e-3)
    assert torch.allclose(compiled(images), plain, atol=1e-6)


@torch.no_grad()
def test_copies_and_exports_of_an_ablated_model_are_ablated_and_its_state_dict_is_not_changed(two_blocks):
    model, images, neurons = two_blocks
    names, plain = set(model.state_dict()), model(images)
    ablate(model, neurons)
    expected = model(images)
    assert not torch.allclose(expected, plain, atol=1e-3) and set(model.state_dict()) == names
    assert torch.equal(copy.deepcopy(model)(images), expected)
    assert torch.allclose(torch.export.export(model, (images,)).module()(images), expected, atol=1e-5)
    assert copy.deepcopy(model).to(torch.bfloat16)(images.bfloat16()).dtype == torch.bfloat16


def test_outliers_stay_with_an_empty_register_or_random_neurons_and_go_with_the_right_ones(planted):
    model, images, _ = planted
    found = find_register_neurons(model, images)
    layer, threshold = found.detection.layer, found.detection.threshold

    def outliers() -> float:
        return float((patch_norms(model, images.split(8), [layer])[0] > threshold).mean())

    before = outliers()
    assert before > 0.01
    widths = mlp_widths(model, found.selected)
    for control in ("empty", "random", "same_activation"):
        others = control_neurons(control, found.selected, widths, found.neurons, seed=0)
        with add_test_time_registers(model, others, 1):
            assert outliers() == pytest.approx(before, rel=0.1)
    with add_test_time_registers(model, found.selected, 1):
        assert outliers() == 0
    with ablated(model, found.selected):
        assert outliers() == 0


def test_ablation_refuses_what_it_cannot_do(tiny_vit):
    model = tiny_vit()
    with pytest.raises(ValueError, match=r"layer 6 is out of range: the model has 6 blocks \(0 to 5\)"):
        ablate(model, {6: [0]})
    with pytest.raises(ValueError, match=r"neuron 256 of layer 1 is out of range: its MLP has 256 \(0 to 255\)"):
        ablate(model, {1: [256]})
    with add_test_time_registers(model, {1: [0]}, 1), pytest.raises(ValueError, match="has test-time registers"):
        ablate(model, {1: [0]})
    with ablated(model, {1: [0]}):
        with pytest.raises(ValueError, match="ablated already; call remove_ablation"):
            ablate(model, {1: [0]})
        with pytest.raises(ValueError, match="its layers 1 are ablated; call remove_ablation"):
            add_test_time_registers(model, {1: [0]})


def test_silencing_zeroes_the_neurons_at_patches_and_leaves_all_prefix_tokens():
    x = torch.arange(1.0, 1 + 2 * 5 * 3).reshape(2, 5, 3)
    layout = TokenLayout(cls=1, trained=1, test_time=1)
    out = silence(x, torch.tensor([0, 2]), layout)
    expected = x.clone()
    expected[:, 3:, 0] = 0
    expected[:, 3:, 2] = 0
    assert torch.equal(out, expected)
