"""Puts a cure into a model, and takes it out again.

    found = find_register_neurons(model, images)
    with add_cure(model, "mask_attention", found):
        features = model.forward_features(images)
    add_cure(model, "prefix_kv", found, images=images, tokens=2)      # measured on images first
    remove_cure(model)

No weight is touched, and what is removed is gone to the bit. Which cures there are, and their options: `options.CURES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

from torch import Tensor, nn

from regvit.models.hooks import blocks
from regvit.registers.cures import (
    ablate,
    average_views,
    clip_norm,
    constant_registers,
    interpolate,
    interpolate_lof,
    mask_attention,
    prefix_kv,
    recursive,
    remove_direction,
)
from regvit.registers.cures.given import Given
from regvit.registers.cures.mixins import take_out
from regvit.registers.cures.options import CURES, parse_cure
from regvit.registers.images import Loading, batches_of
from regvit.registers.outliers import Detection, check_layer
from regvit.registers.treatable import uncompiled

FILES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        *(recursive, ablate, mask_attention, interpolate, interpolate_lof),
        *(clip_norm, remove_direction, average_views, prefix_kv, constant_registers),
    )
}


class Found(Protocol):
    """What a search leaves: `RegisterNeurons`, or anything with its detection and selected neurons."""

    detection: Detection | None
    selected: Mapping[int, tuple[int, ...]]


@dataclass
class AddedCure:
    """A cure in a model; a `with` block takes it out at its end.

    Args:
        name, options: which one.
        measured: what was measured on images for it; may be given to another `add_cure` in the place of images.
    """

    model: nn.Module = field(repr=False)
    name: str
    options: dict[str, object]
    measured: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def remove(self) -> None:
        """Takes the cure out of the model."""
        remove_cure(self.model)

    def __enter__(self) -> AddedCure:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def add_cure(
    model: nn.Module,
    cure: str | Mapping,
    found: Found | Given | None = None,
    *,
    images: object = None,
    measured: Mapping[str, Tensor] | None = None,
    transform: Loading | None = None,
    **options: object,
) -> AddedCure:
    """Adds a cure to a timm vision transformer, in place.

    Args:
        model: in evaluation mode, of any dtype, on any device; with its registers in place where it has any.
        cure: a name of `options.CURES`, or `{name: …, option: value}`.
        found: what `find_register_neurons` returned. Where it has no outliers, a cure that needs them changes nothing,
            and a warning says so.
        images: for cures that are measured first, as for `find_register_neurons`.
        measured: instead of images.
        transform: of PIL images and files among the images.
        options: of the cure.
    Returns: a handle with `.remove()`; also usable in a `with` block.
    Raises:
        ValueError: the cure or an option is unknown, something that it needs is missing, the model has a cure already, or
            cannot be treated by this one (the reason is given).
    """
    model = uncompiled(model)
    name, options = parse_cure({"name": cure, **options} if isinstance(cure, str) else {**cure, **options})
    if (present := getattr(model, "cure", None)) is not None:
        raise ValueError(f"the model has the cure {present} already; call remove_cure(model) first")
    given = found if isinstance(found, Given) else Given(found and found.detection, found.selected if found else {})
    if _nothing_to_do(name, found, given):
        warnings.warn(f"the model has no outliers, so {name} changes nothing", stacklevel=2)
        return AddedCure(model, name, options)
    if given.detection is not None:
        check_layer(len(blocks(model)), None, given.detection.layer)
    if "images" in CURES[name].needs:
        measured = measured or given.measured or measure(model, name, given, images, transform, **options)
        given = Given(given.detection, given.neurons, measured, given.seed, given.options)
    try:
        FILES[name].apply(model, given, **options)
    except ValueError:
        take_out(model)
        raise
    model.cure = name
    return AddedCure(model, name, options, given.measured)


def measure(
    model: nn.Module, name: str, given: Given, images: object, transform: Loading | None = None, **options: object
) -> dict[str, Tensor]:
    """What a cure measures on images before it is added.

    Raises:
        ValueError: there are no images, or they do not show what is needed.
    """
    if images is None:
        raise ValueError(f"cure {name} is measured on images first; give images=…, a hundred varied ones do")
    batches = batches_of(images, transform or (lambda image: image))
    found = FILES[name].calibrate(model, batches, given, **options)
    return {
        key: values.clone() for key, values in found.items()
    }  # made in inference mode, they could not be trained with


def remove_cure(model: nn.Module) -> None:
    """Undoes `add_cure`; a model without a cure is left alone."""
    model = uncompiled(model)
    if (name := getattr(model, "cure", None)) is None:
        return
    del model.cure
    take_out(model)
    getattr(FILES[name], "remove", lambda _: None)(model)


def _nothing_to_do(name: str, found: object, given: Given) -> bool:
    """Whether a cure of outliers is given to a model that a search found none in.

    Raises:
        ValueError: it is not known whether there are any.
    """
    needs = CURES[name].needs
    missing = ("detection" in needs and given.detection is None) or ("neurons" in needs and not given.neurons)
    if missing and found is None:
        raise ValueError(f"cure {name} needs what a search found; give find_register_neurons(model, images)")
    return missing
