"""What a cure is given besides the model, and how what it was calibrated with is written."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from regvit.registers.outliers import Detection
from regvit.registers.search import SearchOptions


@dataclass(frozen=True)
class Given:
    """What a search found, and what a cure measured on images beforehand.

    Args:
        detection: where outliers are told; None where the model has none.
        neurons: `{layer: (neuron, …)}`, the register neurons.
        measured: what the cure's `calibrate` gave, float32.
        seed: of what is drawn.
        options: of the search; for `recursive`.
    """

    detection: Detection | None
    neurons: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    options: SearchOptions | None = None


def to_json(measured: Mapping[str, Tensor]) -> dict[str, dict]:
    """Tensors as `{name: {shape, float32}}`, the values little-endian in base64: exact, and short enough for a JSON file."""
    arrays = {name: values.detach().cpu().float().numpy() for name, values in measured.items()}
    return {
        name: {"shape": list(a.shape), "float32": base64.b64encode(a.astype("<f4").tobytes()).decode("ascii")}
        for name, a in arrays.items()
    }


def from_json(document: Mapping[str, Mapping]) -> dict[str, Tensor]:
    """What `to_json` wrote."""
    read = {}
    for name, entry in document.items():
        values = np.frombuffer(base64.b64decode(entry["float32"]), dtype="<f4").astype(np.float32)
        read[name] = torch.from_numpy(values.reshape(entry["shape"]))
    return read
