"""`recursive`: search again on the cured model, until no outliers are left.

A model may have outliers of two kinds, made by other neurons in other blocks. One search settles on one block and its
outliers; with the neurons found moved into a test-time register, the next search sees what is left. Each search adds its
neurons to those before, and the cured model is the one with all of them moved.

Source: recursive search is proposed in arXiv:2605.05206, which could not be read: the loop, and where it ends, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from regvit.registers.cures.given import Given
from regvit.registers.images import Loading, batches_of
from regvit.registers.neurons import RegisterNeurons, find_register_neurons, search_model
from regvit.registers.search import SearchOptions
from regvit.registers.test_time import add_test_time_registers, remove_test_time_registers

Selected = Mapping[int, tuple[int, ...]]


def find_recursively(
    model: nn.Module,
    images: object,
    options: SearchOptions | None = None,
    *,
    rounds: int = 4,
    transform: Loading | None = None,
    **more: object,
) -> RegisterNeurons:
    """As `find_register_neurons`, and again on the cured model until a search finds nothing new.

    Args:
        rounds: searches at most; 1 is `find_register_neurons`.
        more: its other arguments.
    Returns: the first search, with the neurons of all of them selected; `neurons` has those that were found later at its end.
    Raises:
        ValueError: as `find_register_neurons`.
    """
    batches = images if rounds == 1 else batches_of(images, transform or _needs_transform)
    found = find_register_neurons(model, batches, options, transform=transform, **more)
    options, keep = found.options, more.get("keep", 200)
    later = search_again(model, batches, options, found.selected, rounds - 1, found.precision, keep)
    selected = merged(found.selected, *(each.selected for each in later))
    chosen = tuple(n for each in later for n in each.neurons if n.neuron in each.selected.get(n.layer, ()))
    fresh = {(n.layer, n.neuron) for n in chosen}
    kept = tuple(n for n in found.neurons if (n.layer, n.neuron) not in fresh)
    return replace(found, selected=selected, neurons=kept + chosen)


@torch.inference_mode()
def search_again(
    model: nn.Module,
    batches: object,
    options: SearchOptions,
    selected: Selected,
    rounds: int,
    precision: str = "float32",
    keep: int = 200,
) -> list[RegisterNeurons]:
    """The searches on the cured model that found something, at most `rounds`; the model is left as it was.

    Args:
        batches: that can be gone through again.
        selected: neurons found before; where there are none, nothing is searched.
    """
    found: list[RegisterNeurons] = []
    for _ in range(rounds if selected else 0):
        moved = merged(selected, *(each.selected for each in found))
        with add_test_time_registers(model, moved):
            again = search_model(model, batches, options, keep, precision, moved)
        if not again.selected:
            break
        found.append(again)
    return found


def merged(*parts: Selected) -> dict[int, tuple[int, ...]]:
    """The neurons of all parts, each once, sorted."""
    layers = sorted({layer for part in parts for layer in part})
    return {layer: tuple(sorted({unit for part in parts for unit in part.get(layer, ())})) for layer in layers}


def calibrate(model: nn.Module, batches: object, given: Given, rounds: int) -> dict[str, Tensor]:
    """`neurons` (k, 2): layer and index of all neurons to move."""
    options = given.options or SearchOptions()
    later = search_again(model, batches, options, given.neurons, rounds - 1)
    every = merged(given.neurons, *(each.selected for each in later))
    return {"neurons": torch.tensor([(layer, unit) for layer, units in every.items() for unit in units]).reshape(-1, 2)}


def apply(model: nn.Module, given: Given, rounds: int) -> None:
    """Moves all neurons that were found into one test-time register."""
    selected: dict[int, list[int]] = {}
    for layer, unit in given.measured["neurons"].long().tolist():
        selected.setdefault(layer, []).append(unit)
    add_test_time_registers(model, selected, 1)


remove = remove_test_time_registers


def _needs_transform(image: object) -> Tensor:
    raise ValueError(f"rounds of search on {type(image).__name__} need a transform; give transform=backbone.transform")
