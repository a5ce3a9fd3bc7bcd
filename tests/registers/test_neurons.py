import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from stock_models import make

from regvit import add_test_time_registers, find_register_neurons
from regvit.registers.neurons import Neuron, RegisterNeurons, SearchOptions, read_selected
from regvit.registers.outliers import Detection, patch_norms
from regvit.registers.planting import plant

SPARSE_BELOW = 0.02  # half of this model's activations are about as large


@pytest.fixture(scope="module")
def planted(tiny_vit, noise_images):
    """A model with known register neurons, and the images on which they fire."""
    model, x = tiny_vit(3), noise_images(24)
    plant(model, x, seed_layer=1, amplifier_layer=2, edit_keys=True)
    return model, x


@pytest.fixture(scope="module")
def units(tiny_vit, noise_images):
    """The neurons of `planted`, by layer."""
    found = plant(tiny_vit(3), noise_images(24), seed_layer=1, amplifier_layer=2, edit_keys=True).neurons
    return {layer: tuple(sorted(each)) for layer, each in found.items()}


def test_the_planted_neurons_are_found_and_nothing_else(planted, units):
    model, x = planted
    found = find_register_neurons(model, x)
    assert found.selected == units
    assert found.detection.layer >= 2
    assert found.explained > 0.9
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("what", ["the model", "its blocks", "blocks", "forward_features"])
def test_a_compiled_model_is_searched_as_the_eager_one(what):
    eager, x = make(depth=2), torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    options = {"layer": 0, "threshold": float(np.quantile(patch_norms(eager, [x], [0]), 0.9)), "top_k": 3}
    expected = find_register_neurons(eager, x, **options)
    model = searched = copy.deepcopy(eager)
    if what == "the model":
        searched = torch.compile(model, backend="eager")
    elif what == "its blocks":
        for block in model.blocks:
            block.compile(backend="eager")
    else:
        setattr(model, what, torch.compile(getattr(model, what), backend="eager"))
    with torch.no_grad():
        searched(x)
        found = find_register_neurons(searched, x, **options)
        assert (found.neurons, found.selected) == (expected.neurons, expected.selected)
        assert torch.allclose(searched(x), eager(x), atol=1e-5)


def published_scores(model, x, layer, threshold, cls_counts=False, sparsity_filter=False):
    """The published search, image by image as its code does it: mean |activation| at the outliers, over images."""
    totals, images, start = 0.0, 0, 0 if cls_counts else model.num_prefix_tokens
    for image in x:
        acts, out = {}, {}
        handles = [
            block.mlp.fc2.register_forward_pre_hook(lambda _, a, i=i, acts=acts: acts.__setitem__(i, a[0][0]))
            for i, block in enumerate(model.blocks)
        ]
        handles.append(model.blocks[layer].register_forward_hook(lambda _, __, o, out=out: out.update({0: o[0]})))
        with torch.no_grad():
            model.forward_features(image[None])
        for handle in handles:
            handle.remove()
        where = out[0][start:].norm(dim=-1) > threshold
        if where.any():
            stack = torch.stack([acts[i] for i in range(layer + 1)])  # (l, n, k)
            scores = stack[:, start:][:, where].abs().mean(1).double()
            if sparsity_filter:
                scores = scores * ((stack < SPARSE_BELOW).sum(1) >= 0.5 * stack.shape[1])
            totals, images = totals + scores, images + 1
    return totals / images


@pytest.mark.parametrize("options", [{}, {"cls_counts": True}, {"cls_counts": True, "sparsity_filter": True}])
def test_published_settings_rank_as_the_published_search_does(planted, options, monkeypatch):
    model, x = copy.deepcopy(planted[0]), planted[1]
    model.cls_token.data.fill_(3.0)  # its norm is above the threshold
    monkeypatch.setattr("regvit.registers.search.SPARSE_BELOW", SPARSE_BELOW)
    norms = patch_norms(model, [x])[-2]
    threshold = float(np.quantile(norms, 0.97))
    assert (norms > threshold).sum(1).min() == 0 and (norms > threshold).sum(1).max() > 2  # by image
    expected = published_scores(model, x, 4, threshold, **options)
    if options:
        assert not torch.allclose(expected, published_scores(model, x, 4, threshold))
    published = SearchOptions(threshold=threshold, layer=-2, top_k=20, score="activation", **options)
    found = find_register_neurons(model, x.split(7), published, keep=100)
    scores = [n.activation for n in found.neurons]
    assert np.allclose(scores, expected.flatten().sort(descending=True).values[:100], atol=2e-6)
    assert np.allclose(scores, [expected[n.layer, n.neuron] for n in found.neurons], atol=2e-6)
    assert found.num_selected == 20
    assert json.loads(found.to_json())["search"] == {
        "threshold": threshold, "layer": -2, "top_k": 20, "score": "activation", **options
    }  # fmt: skip


def test_a_threshold_may_be_given_in_standard_deviations(planted, units):
    model, x = planted
    norms = patch_norms(model, [x], [3])[0]
    found = find_register_neurons(model, x.split(5), sigma=4.0, layer=3)
    assert found.detection.threshold == pytest.approx(norms.mean() + 4 * norms.std(), rel=1e-5)
    assert found.selected == units


def test_cls_and_trained_registers_never_count():
    torch.manual_seed(0)
    model = timm.create_model("test_vit2", pretrained=False).eval()  # one trained register
    with torch.no_grad():
        model.reg_token.fill_(50.0)  # its norm is far above any patch's
    x = torch.randn(8, 3, 160, 160)
    assert patch_norms(model, [x]).shape == (len(model.blocks), 8, 100)
    assert find_register_neurons(model, x).detection is None


def test_a_model_without_outliers_selects_none_and_says_so():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False).eval()
    found = find_register_neurons(model, torch.randn(8, 3, 160, 160))
    assert found.detection is None and found.num_selected == 0
    assert json.loads(found.to_json()) == {"threshold": None, "detect_layer": None, "explained": 0.0, "selected": {},
                                           "neurons": [], "active": []}  # fmt: skip
    assert read_selected(found.to_json()) == (None, {})


def test_a_model_with_test_time_registers_is_refused(planted, units):
    model, x = planted
    with add_test_time_registers(model, units), pytest.raises(ValueError, match="remove them before the search"):
        find_register_neurons(model, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "activation"}, "score='activation' needs top_k .* or percentile"),
        ({"percentile": 99.0, "top_k": 3}, r"top_k 3 and percentile 99\.0 exclude each other"),
        ({"sigma": 3.0, "threshold": 2.0, "layer": 1}, "threshold 2.0 and sigma 3.0 exclude each other"),
        ({"explained": 1.01}, r"explained is 1\.01; expected a share over 0 and up to 1"),
        ({"max_layer": 6}, r"max_layer 6 is out of range: the model has 6 blocks \(0 to 5\)"),
        ({"sparsity_filter": True}, "are of the published search: set score='activation' too"),
        ({"cls_counts": True, "score": "activation", "top_k": 1}, "cls_counts needs a threshold"),
    ],
)
def test_options_that_do_not_fit_are_refused(planted, options, message):
    with pytest.raises(ValueError, match=message):
        find_register_neurons(*planted, **options)


def test_the_busiest_neurons_are_kept_beside_the_best_writers(planted):
    model, x = planted
    by_writing = find_register_neurons(model, x)
    by_activity = find_register_neurons(model, x, score="activation", top_k=1)
    assert by_writing.active == tuple(replace(n, attribution=share_of(by_writing, n)) for n in by_activity.neurons)
    activations = [neuron.activation for neuron in by_writing.active]
    assert activations == sorted(activations, reverse=True) and len(activations) == 200
    assert json.loads(by_writing.to_json())["active"][0]["activation"] == activations[0]


def test_the_share_that_a_published_search_explains_is_that_of_the_neurons_which_it_selects(planted):
    model, x = planted
    by_writing = find_register_neurons(model, x, layer=3, keep=10**6)
    by_activity = find_register_neurons(model, x, layer=3, score="activation", top_k=3)
    written = {(n.layer, n.neuron): n.attribution for n in by_writing.neurons}
    best = [(n.layer, n.neuron) for n in by_activity.neurons[:3]]
    assert by_activity.explained == pytest.approx(sum(written[place] for place in best), abs=1e-6)


@pytest.mark.parametrize("score", ["attribution", "activation"])
def test_a_percentile_selects_the_neurons_that_score_above_it_among_those_that_may_be_selected(planted, score):
    percentile, count = 99.0, 13
    found = find_register_neurons(*planted, layer=4, max_layer=4, percentile=percentile, score=score, keep=1280)
    scores = np.array([getattr(neuron, score) for neuron in found.neurons])  # 5 blocks of 256 neurons
    assert len(scores) == 1280 and found.num_selected == count
    best = {(neuron.layer, neuron.neuron) for neuron in found.neurons[:count]}
    assert best == {(layer, unit) for layer, units in found.selected.items() for unit in units}
    if len(set(scores[: count + 1])) == count + 1:  # no ties
        assert (scores > np.percentile(scores, percentile)).sum() == count


def share_of(found, neuron):
    """The attribution that the search gave to a neuron."""
    return next(n.attribution for n in found.active if (n.layer, n.neuron) == (neuron.layer, neuron.neuron))


@pytest.mark.parametrize("precision", ["float32_medium", "bfloat16"])
def test_a_faster_precision_selects_the_same_neurons_and_is_named_in_the_file(planted, units, precision):
    model, x = planted
    before = torch.get_float32_matmul_precision()
    found = find_register_neurons(model, x, precision=precision)
    assert found.selected == units
    assert json.loads(found.to_json(backbone="tiny"))["precision"] == precision
    assert "precision" not in json.loads(find_register_neurons(model, x).to_json())
    assert torch.get_float32_matmul_precision() == before and not torch.is_autocast_enabled("cpu")


FOUND = RegisterNeurons(
    Detection(3, 12.5, math.nan), (), (Neuron(1, 5, 2.0, 0.75),), (Neuron(2, 7, 3.0, None),), {1: (5, 6), 2: (7,)}, 0.75
)


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


def test_a_score_that_is_not_a_number_is_never_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        RegisterNeurons(None, (), (Neuron(0, 0, math.nan, None),)).to_json()


def test_a_text_that_lacks_a_key_is_refused_and_the_key_named():
    document = json.loads(FOUND.to_json())
    del document["detect_layer"]
    with pytest.raises(ValueError, match="the neurons file lacks detect_layer; run the identify stage again"):
        read_selected(json.dumps(document))


def test_no_neuron_after_the_last_layer_is_listed_and_each_listed_list_is_sorted(planted):
    last = 2
    found = find_register_neurons(*planted, layer=4, top_k=3, max_layer=last, keep=1000)
    width = planted[0].blocks[0].mlp.fc2.in_features
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
