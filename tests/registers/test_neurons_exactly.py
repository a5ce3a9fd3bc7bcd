"""Neurons, to the last word and digit: what mutation testing found untested (`make mutation MODULE=neurons`)."""

import json
import math

import pytest
import timm
import torch

from regvit import find_register_neurons
from regvit.registers.neurons import Neuron, RegisterNeurons, read_selected
from regvit.registers.outliers import Detection

FOUND = RegisterNeurons(
    Detection(3, 12.5, math.nan), (), (Neuron(1, 5, 2.0, 0.75),), (Neuron(2, 7, 3.0, None),), {1: (5, 6), 2: (7,)}, 0.75
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False, img_size=64).eval()


def images(count=6):
    """Noise with a bright patch in each image."""
    x = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x[:, :, :16, :16] = 6.0
    return x


def test_the_text_of_a_search_is_this():
    assert FOUND.to_json(backbone="tiny", seed=0) == (
        '{\n "backbone": "tiny",\n "seed": 0,\n "threshold": 12.5,\n "detect_layer": 3,\n "explained": 0.75,\n'
        ' "selected": {\n  "1": [\n   5,\n   6\n  ],\n  "2": [\n   7\n  ]\n },\n'
        ' "neurons": [\n  {\n   "layer": 1,\n   "neuron": 5,\n   "activation": 2.0,\n   "attribution": 0.75\n  }\n ],\n'
        ' "active": [\n  {\n   "layer": 2,\n   "neuron": 7,\n   "activation": 3.0,\n   "attribution": null\n  }\n ]\n}\n'
    )
    detection, selected = read_selected(FOUND.to_json())
    assert (detection.layer, detection.threshold, selected) == (3, 12.5, {1: (5, 6), 2: (7,)})
    assert FOUND.num_selected == 3


def test_a_search_that_found_nothing_says_so_in_its_text():
    text = RegisterNeurons(None, ()).to_json()
    assert json.loads(text) == {"threshold": None, "detect_layer": None, "explained": 0.0, "selected": {},
                                "neurons": [], "active": []}  # fmt: skip
    assert read_selected(text) == (None, {})


def test_a_score_that_is_not_a_number_is_never_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        RegisterNeurons(None, (), (Neuron(0, 0, math.nan, None),)).to_json()


@pytest.mark.parametrize("key", ["threshold", "detect_layer", "selected"])
def test_a_text_that_lacks_a_key_is_refused_and_the_key_named(key):
    document = json.loads(FOUND.to_json())
    del document[key]
    with pytest.raises(ValueError, match=f"the neurons file lacks {key}; run the identify stage again"):
        read_selected(json.dumps(document))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"explained": 0.0}, r"explained is 0\.0; expected a share over 0 and up to 1"),
        ({"explained": 1.01}, r"explained is 1\.01; expected a share"),
        ({"top_k": 0}, "top_k is 0; expected 1 or more, or None"),
        ({"max_layer": 6}, r"max_layer 6 is out of range: the model has 6 blocks \(0 to 5\)"),
        ({"max_layer": -1}, r"max_layer -1 is out of range"),
        ({"score": "norm"}, "score is 'norm'; expected 'attribution' or 'activation'"),
        ({"score": "activation"}, "score='activation' needs top_k"),
    ],
)
def test_an_option_out_of_its_range_is_refused_with_its_value(model, options, said):
    with pytest.raises(ValueError, match=said):
        find_register_neurons(model, images(2), **options)


def test_the_ends_of_the_ranges_are_taken(model):
    found = find_register_neurons(model, images(), layer=4, top_k=1, max_layer=0, explained=1.0)
    assert found.num_selected == 1 and list(found.selected) == [0]
    assert found.detection.layer == 4


@pytest.mark.parametrize("last", [0, 2])
def test_no_neuron_after_the_last_layer_is_listed_and_each_listed_list_is_sorted(model, last):
    found = find_register_neurons(model, images(), layer=4, top_k=3, max_layer=last, keep=1000)
    width = model.blocks[0].mlp.fc2.in_features
    assert len(found.active) == len(found.neurons) == min(1000, (last + 1) * width)
    assert (
        {neuron.layer for neuron in found.neurons} == {neuron.layer for neuron in found.active} == set(range(last + 1))
    )
    shares = [neuron.attribution for neuron in found.neurons]
    assert shares == sorted(shares, reverse=True)
    active = [neuron.activation for neuron in found.active]
    assert active == sorted(active, reverse=True)
    first = [(neuron.layer, neuron.neuron) for neuron in found.neurons[:3]]
    assert sorted(first) == sorted((layer, unit) for layer, units in found.selected.items() for unit in units)
    assert found.explained == pytest.approx(sum(shares[:3]))


def test_all_shares_of_all_neurons_and_layers_are_what_two_plain_loops_give(model):
    """Independent: tokens captured with plain hooks, means in float64, the formula at the top of the module."""
    x, layer = images(), 2
    found = find_register_neurons(model, x, layer=layer, top_k=5, keep=10_000)
    acts, residual, hooks = {}, {}, []
    for i, block in enumerate(model.blocks[: layer + 1]):
        hooks.append(block.mlp.fc2.register_forward_pre_hook(lambda _, args, i=i: acts.update({i: args[0]})))
    hooks.append(model.blocks[layer].register_forward_hook(lambda _, __, out: residual.update({0: out})))
    with torch.no_grad():
        model.forward_features(x)
    for hook in hooks:
        hook.remove()
    skip = model.num_prefix_tokens
    tokens = residual[0][:, skip:].double()
    hot = tokens.norm(dim=-1) > found.detection.threshold
    assert 0 < hot.sum() < hot.numel()
    excess = tokens[hot].mean(0) - tokens[~hot].mean(0)
    for neuron in found.neurons[:40]:
        a = acts[neuron.layer][:, skip:, neuron.neuron].double()
        block = model.blocks[neuron.layer]
        written = block.mlp.fc2.weight[:, neuron.neuron].double() * getattr(block.ls2, "gamma", torch.ones(1)).double()
        share = (a[hot].mean() - a[~hot].mean()) * (written @ excess) / (excess @ excess)
        assert neuron.attribution == pytest.approx(float(share), rel=1e-3, abs=1e-7)
        by_image = [float(a[i][hot[i]].abs().mean()) for i in range(len(x)) if hot[i].any()]
        assert neuron.activation == pytest.approx(sum(by_image) / len(by_image), rel=1e-3)
