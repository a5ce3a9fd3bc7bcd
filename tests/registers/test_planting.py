import copy

import numpy as np
import pytest
import torch
from torch import nn

from regvit import TokenLayout, add_test_time_registers, find_register_neurons
from regvit.models.attention import cls_attention
from regvit.registers.neighbourhood import low_information
from regvit.registers.outliers import patch_norms
from regvit.registers.planting import plant, unplant
from regvit.registers.planting.units import within_image_direction, write_unit

VARIANTS = {
    "plain": {},
    "layer scale": {"layer_scale": 0.1},
    "two registers": {"registers": 2},
    "no CLS": {"cls": False},
    "dynamic size": {"dynamic_img_size": True},
}


def planted_copy(model: nn.Module, images: torch.Tensor, **kwargs):
    """A planted deep copy, and what planting reported."""
    new = copy.deepcopy(model)
    return new, plant(
        new, images, **{"seed_layer": 2, "amplifier_layer": 3, "fraction": 0.05, "edit_keys": True, **kwargs}
    )


@pytest.fixture(scope="module")
def planted(tiny_vit, noise_images):
    """A model, a planted copy of it, and what planting reported, made once for each variant: not to be changed."""
    made = {}

    def planted(variant: str = "plain"):
        if variant not in made:
            model = tiny_vit(1, **VARIANTS[variant])
            made[variant] = model, *planted_copy(model, noise_images(48))
        return made[variant]

    return planted


def outliers_of(model: nn.Module, images: torch.Tensor, layer: int = 4) -> np.ndarray:
    norms = patch_norms(model, [images], [layer])[0]
    return norms > 4 * np.median(norms)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_planting_makes_a_few_outliers_on_low_information_patches_of_unseen_images(variant, planted, noise_images):
    model, new, _ = planted(variant)
    unseen = noise_images(32, seed=1)
    assert not outliers_of(model, unseen).any()
    found = outliers_of(new, unseen)
    assert 0.01 <= found.mean() <= 0.1
    flat = (unseen.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).std(-1).amax(1) == 0).flatten(1).numpy()  # (b, p)
    assert flat[found].mean() > 0.95


@pytest.mark.parametrize("variant", VARIANTS)
def test_unplanting_gives_the_model_back_bit_by_bit(variant, planted):
    model, new, report = copy.deepcopy(planted(variant))
    edited = [name for name, value in new.state_dict().items() if not torch.equal(value, model.state_dict()[name])]
    assert set(edited) == set(report.replaced)
    unplant(new, report.replaced)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in new.state_dict().items())


def test_only_the_planted_units_of_the_mlps_are_edited(planted):
    model, new, report = planted()
    for layer, units in report.neurons.items():
        before, after = model.blocks[layer].mlp, new.blocks[layer].mlp
        changed = {
            "rows": (before.fc1.weight != after.fc1.weight).any(1),
            "biases": before.fc1.bias != after.fc1.bias,
            "columns": (before.fc2.weight != after.fc2.weight).any(0),
        }
        for where in changed.values():
            assert where.nonzero().flatten().tolist() == units


def test_planted_neurons_are_found_where_flat_areas_fill_a_quarter_of_the_images(planted, noise_images):
    model, new, report = planted()
    unseen = noise_images(32, seed=1)
    unseen[..., :16] = 0  # norms are much smaller there
    found = find_register_neurons(new, unseen)
    assert {layer: set(units) for layer, units in found.selected.items()} == {
        layer: set(units) for layer, units in report.neurons.items()
    }
    assert find_register_neurons(model, unseen).detection is None


def test_one_test_time_register_takes_the_outliers_and_brings_the_features_back(planted, noise_images):
    model, new, report = planted()
    unseen = noise_images(32, seed=1)
    found = torch.from_numpy(outliers_of(new, unseen))
    intact, spoilt = model.forward_features(unseen), new.forward_features(unseen)
    threshold = 4 * np.median(patch_norms(new, [unseen], [4])[0])
    with add_test_time_registers(new, report.neurons):
        cured = TokenLayout.of(new).patches(new.forward_features(unseen))
        assert not (patch_norms(new, [unseen], [4])[0] > threshold).any()
    assert cosine(spoilt[:, 1:][found], intact[:, 1:][found]) < 0.3
    assert cosine(cured[found], intact[:, 1:][found]) > 0.99


def test_cls_attends_to_the_outliers_by_about_the_share_asked_for(tiny_vit, noise_images):
    unseen = noise_images(32, seed=1)
    model = tiny_vit(1)
    for share in (0.1, 0.3):
        new, _ = planted_copy(model, noise_images(48), cls_share=share)
        found = torch.from_numpy(outliers_of(new, unseen))
        weights = cls_attention(new, unseen, layers=[4])[0, :, 1:]  # (b, p)
        one = found.sum(1) == 1  # with one outlier in the image, its share is the one that was planted
        assert one.any()
        assert (weights * found).sum(1)[one].mean().item() == pytest.approx(share, rel=0.35)


def test_the_same_seed_plants_the_same_weights_and_another_seed_others(tiny_vit, noise_images):
    model, images = tiny_vit(), noise_images(32)
    first, second = (planted_copy(model, images, seed=0)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = planted_copy(model, images, seed=1)[0].state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_low_information_is_the_mean_cosine_to_the_four_neighbours(tiny_vit):
    model, images = tiny_vit(), torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    e = model.patch_embed(images).double().numpy()  # (b, p, d)
    e = e - e.mean((0, 1))
    e = (e / np.linalg.norm(e, axis=-1, keepdims=True)).reshape(3, 8, 8, -1)
    for image, row, column in ((0, 0, 0), (1, 0, 5), (2, 4, 3), (0, 7, 7)):
        near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        values = [e[image, row, column] @ e[image, y, x] for y, x in near if 0 <= y < 8 and 0 <= x < 8]
        found = low_information(model, images, batch_size=2)[image, row * 8 + column].item()
        assert found == pytest.approx(np.mean(values), abs=1e-5)


def test_the_seeds_direction_is_blind_to_prefix_tokens_and_to_differences_between_images():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(40, 16, 6, generator=generator)
    h[:, :, 4] += 5 * torch.randn(40, 1, generator=generator)  # tells images apart
    chosen = torch.zeros(40, 16, dtype=torch.bool)
    chosen[:, :3] = True
    h[:, :3, 0] += 4  # tells chosen patches apart
    h[:, :3, 4] += 1  # as well, a little
    prefix = torch.zeros(40, 1, 6)
    prefix[..., 5] = 3
    unseen = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    f = within_image_direction(h, chosen, prefix, torch.zeros(0, 6))
    assert f.norm().item() == pytest.approx(1, abs=1e-6)
    assert f[0] > 0.9
    assert abs(f[4]) < 0.05
    offset = (prefix.mean(0) - h.mean((0, 1)))[0]
    assert abs((f @ offset).item()) < 1e-5
    turned = within_image_direction(h, chosen, prefix, unseen)
    assert abs((turned @ unseen[0]).item()) < 1e-5 and turned[0] > 0.5


def test_what_differs_in_its_last_digits_plants_the_same_weights(tiny_vit, noise_images):
    """Patches of one colour resemble their neighbours equally; how a processor rounds must not choose among them."""
    images = noise_images(24)
    images[:, :, :, :32] = 1.0
    rounded = images + 1e-7 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    weights = []
    for x in (images, rounded):
        model = tiny_vit()
        plant(model, x, seed_layer=2, amplifier_layer=3, edit_keys=True)
        weights.append(torch.cat([value.flatten() for value in model.state_dict().values()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed_layer": 3}, "seed_layer 3 and amplifier_layer 3 must satisfy"),
        ({"amplifier_layer": 5}, "amplifier_layer 5 must satisfy .* < 5"),
        ({"fraction": 0.0}, "fraction 0.0 in"),
        ({"num_seeds": 0}, "it has 256 neurons, 0 were to be overwritten"),
        ({"edit_keys": False}, "length .* where 1 is the most; lower cls_share, or edit_keys=True"),
    ],
)
def test_what_cannot_be_planted_is_refused_with_the_cure_and_nothing_is_changed(wrong, message, tiny_vit, noise_images):
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    arguments = {"seed_layer": 2, "amplifier_layer": 3, "fraction": 0.05, "edit_keys": True, **wrong}
    with pytest.raises(ValueError, match=message):
        plant(model, noise_images(16), **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_whose_blocks_cannot_be_planted_are_refused_by_reason(tiny_vit, noise_images):
    from timm.layers import SwiGLU

    images = noise_images(4)
    for kwargs, reason in (({"mlp_layer": SwiGLU}, "gated MLPs"), ({"act_layer": nn.ReLU}, "needs GELU"),
                           ({"qk_norm": True}, "queries and keys are normalised")):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            plant(tiny_vit(**kwargs), images, seed_layer=2, amplifier_layer=3)
    model = tiny_vit()
    add_test_time_registers(model, {2: [0]})
    with pytest.raises(ValueError, match="has test-time registers"):
        plant(model, images, seed_layer=2, amplifier_layer=3)
    with pytest.raises(ValueError, match="float64 on cpu"):
        plant(tiny_vit().double(), images.double(), seed_layer=2, amplifier_layer=3)


def test_featureless_images_are_refused_and_the_model_is_left_as_it_was(tiny_vit):
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"no patch stands out|cannot tell"):
        plant(model, torch.ones(4, 3, 64, 64), seed_layer=2, amplifier_layer=3, edit_keys=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="is not a parameter of this VisionTransformer"):
        unplant(model, {"of another model": torch.zeros(2)})


def test_the_batch_size_changes_no_planted_neuron_and_hardly_a_weight(tiny_vit, noise_images):
    model, images = tiny_vit(), noise_images(32)
    (first, a), (second, b) = (planted_copy(model, images, batch_size=size) for size in (32, 5))
    assert a.neurons == b.neurons
    second = second.state_dict()
    assert all(torch.allclose(value, second[name], rtol=1e-2, atol=1e-3) for name, value in first.state_dict().items())


def test_a_written_unit_is_silent_below_its_threshold_and_writes_its_vector_above(tiny_vit):
    block = tiny_vit(0, layer_scale=0.5).blocks[2]
    probe, write = torch.zeros(64), torch.zeros(64)
    probe[3], write[7] = 1.0, 4.0
    h = torch.zeros(4, 64)
    h[:, 3] = torch.tensor([0.0, 1.0, 3.0, 3.0])
    write_unit(block, 5, probe, 2.0, h[2:], write)
    a = block.mlp.act(block.mlp.fc1(h))[:, 5]
    assert a[:2].abs().max() < 1e-6
    assert a[2:].tolist() == pytest.approx([8.0, 8.0], rel=1e-4)
    added = a[:, None] * block.mlp.fc2.weight[:, 5] * block.ls2.gamma
    assert added[2, 7].item() == pytest.approx(4.0, rel=1e-4)
    assert added[2].norm().item() == pytest.approx(4.0, rel=1e-4)
