"""Reads the file that `regvit neurons` or the identify stage wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from regvit.cli.errors import WrongInput

if TYPE_CHECKING:
    from regvit.models.backbones import Backbone
    from regvit.registers.outliers import Detection


def read_neurons(path: Path, backbone: Backbone) -> tuple[Detection | None, dict[int, tuple[int, ...]]]:
    """Detection and register neurons from a file, which must be of this backbone where both say so."""
    from regvit.registers.neurons import read_selected  # why here and not above: see cli.py

    try:
        text = path.read_text(encoding="utf-8")
        about = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WrongInput(f"{path} is no JSON ({error}); give a file from `regvit neurons`") from error
    if not isinstance(about, dict):
        raise WrongInput(f"{path} holds a {type(about).__name__}; give a file from `regvit neurons`")
    if fault := _fault_of(about):
        raise WrongInput(f"{path}: {fault}; give a file from `regvit neurons`")
    try:
        detection, neurons = read_selected(text)
    except ValueError as error:
        raise WrongInput(f"{path}: {error}") from error
    digest = about.get("weights_sha256")
    if digest and backbone.weights_sha256 and digest != backbone.weights_sha256:
        raise WrongInput(
            f"{path} was made with weights {digest[:12]}…, but {backbone.name} has {backbone.weights_sha256[:12]}…; "
            "give the file of this backbone"
        )
    return detection, neurons


def _fault_of(about: dict) -> str | None:
    """What in the file of a search is not of the form that it should have; keys that are missing are told elsewhere."""
    threshold, layer, selected = (about.get(key) for key in ("threshold", "detect_layer", "selected"))
    if threshold is not None and not (isinstance(threshold, int | float) and 0 < threshold < math.inf):
        return f"threshold is {threshold!r}, expected a norm above 0"
    if layer is not None and not isinstance(layer, int):
        return f"detect_layer is {layer!r}, expected the index of a block"
    if (threshold is None) != (layer is None):
        return f"threshold is {threshold!r} and detect_layer {layer!r}, expected both or neither"
    if "selected" in about and not (
        isinstance(selected, dict)
        and all(key.isdecimal() and isinstance(units, list) for key, units in selected.items())
        and all(isinstance(unit, int) for units in selected.values() for unit in units)
    ):
        return f"selected is {selected!r}, expected lists of neurons by layer, as {{'4': [10, 20]}}"
    return None
