"""Readouts: which summary of an image's tokens a probe is trained on.

| name | features | channels |
|---|---|---|
| `cls` | CLS | d |
| `reg_mean` | mean of the registers | d |
| `patch_mean` | mean of the patches | d |
| `cls_reg` | [CLS; mean of the registers] | 2 d |
| `cls_patch` | [CLS; mean of the patches] | 2 d |
| `cls_reg_max` | [CLS; maximum over the registers, channel by channel] | 2 d |
| `cls_reg_<i>` | [CLS; register i], i from 0 | 2 d |

`cls_reg` is the readout of arXiv:2501.04784. Registers are all that the store holds, trained and test-time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

import numpy as np
from jaxtyping import Float

MISSING = {
    "cls": "its backbone has no CLS token",
    "registers": "the run has no registers",
    "patch_mean": "the store holds no patch means",
}


class Features(Protocol):
    """What readouts are made from: a `FeatureStore`, or anything else with the shape of a row by array name."""

    arrays: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> Float[np.ndarray, "b ..."]: ...


@dataclass(frozen=True)
class Available:
    """Readouts that can be made from a store, in the order asked for, and why the others cannot."""

    names: tuple[str, ...]
    left_out: dict[str, str]


READOUTS: dict[str, tuple[str, ...]] = {
    "cls": ("cls",),
    "reg_mean": ("registers",),
    "patch_mean": ("patch_mean",),
    "cls_reg": ("cls", "registers"),
    "cls_patch": ("cls", "patch_mean"),
    "cls_reg_max": ("cls", "registers"),
}


def arrays_needed(name: str) -> tuple[str, ...]:
    """Arrays of a feature store that a readout is made from, in the order of its channels.

    Raises:
        ValueError: the readout is unknown; the message gives the nearest name.
    """
    if name in READOUTS:
        return READOUTS[name]
    if _register_index(name) is not None:
        return ("cls", "registers")
    near = get_close_matches(name, READOUTS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"readout {name!r} is unknown; {hint}Known are {', '.join(READOUTS)} and cls_reg_<i>, i from 0")


def available(arrays: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> Available:
    """Which readouts can be made from these arrays.

    Args:
        arrays: shape of one row by array name, as `FeatureStore.arrays`.
        names: readouts asked for.
    Raises:
        ValueError: a readout is unknown or asked for twice.
    """
    names = tuple(names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"readout {twice[0]!r} is asked for twice; name each readout once")
    left_out = {}
    for name in names:
        index = _register_index(name)
        if missing := [array for array in arrays_needed(name) if array not in arrays]:
            left_out[name] = " and ".join(MISSING[array] for array in missing)
        elif index is not None and index >= arrays["registers"][0]:
            left_out[name] = f"register {index} is out of range (0 to {arrays['registers'][0] - 1})"
    return Available(tuple(name for name in names if name not in left_out), left_out)


def readout(features: Features, name: str) -> Float[np.ndarray, "b d"]:
    """Features of every image under one readout, float32; two parts are concatenated along the channels.

    Raises:
        ValueError: the readout is unknown, or cannot be made from these arrays; the message says why.
    """
    if reason := available(features.arrays, [name]).left_out.get(name):
        raise ValueError(f"readout {name!r} cannot be made: {reason}; leave it out, or choose another run")
    parts = [features.read(array) for array in arrays_needed(name)]
    parts = [_reduce_registers(name, part) if part.ndim == 3 else part for part in parts]  # (b, d) each
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def read_all(features: Features, names: Iterable[str]) -> dict[str, Float[np.ndarray, "b d"]]:
    """Several readouts, each array of the store read once. Raises as `readout`."""
    names = tuple(names)
    needed = dict.fromkeys(array for name in names for array in arrays_needed(name) if array in features.arrays)
    held = _Held({array: features.read(array) for array in needed})
    return {name: readout(held, name) for name in names}


class _Held:
    """Arrays in memory under the interface of a store."""

    def __init__(self, values: Mapping[str, np.ndarray]):
        self._values, self.arrays = values, {name: array.shape[1:] for name, array in values.items()}

    def read(self, name: str) -> np.ndarray:
        return self._values[name]


def _register_index(name: str) -> int | None:
    """i of `cls_reg_<i>`, None for any other name."""
    match = re.fullmatch(r"cls_reg_(0|[1-9]\d*)", name)
    return int(match[1]) if match else None


def _reduce_registers(name: str, registers: Float[np.ndarray, "b r d"]) -> Float[np.ndarray, "b d"]:
    """The part of a readout that comes from the registers."""
    if name == "cls_reg_max":
        return registers.max(1)
    index = _register_index(name)
    return registers.mean(1) if index is None else registers[:, index]
