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
| `reg_<i>` | register i alone | d |
| `reg_mean_<m>`, `cls_reg_mean_<m>` | the same as `reg_mean` and `cls_reg` with the first m registers | d, 2 d |
| `patch_reg` | [mean of the patches; mean of the registers], for models without CLS | 2 d |
| `cls_reg_learned` | [CLS; register 0; …; register r − 1] | (1 + r) d |
| `cls_reg_attn` | the same | (1 + r) d |
| `cls_noise` | [CLS; CLS + noise] | 2 d |
| `cls_random` | [CLS; CLS · R] | 2 d |

`cls_reg` is the readout of arXiv:2501.04784. Registers are all that the store holds, trained and test-time.

For `cls_reg_learned` and `cls_reg_attn` the probe pools the registers itself, with weights that are trained with its
head (`probes`), down to 2 d channels. A single register leaves nothing to weigh, so there they are left out: they
would be `cls_reg`.

`cls_noise` and `cls_random` are controls of width: as wide as `cls_reg`, but with nothing in them besides CLS. Only
what `cls_reg` gains beyond them comes from the registers. The noise is normal, in each channel with the standard
deviation that the channel has over the images of the store; R has independent normal entries of variance 1/d.
Both are the same on every call: R is a function of d alone, and an image's noise is drawn from a hash of its own CLS
token, so that it does not depend on the row or on the other images, and images that show the same thing in two data
sets do not share it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt64

MISSING = {
    "cls": "its backbone has no CLS token",
    "registers": "the run has no registers",
    "patch_mean": "the store holds no patch means",
}
POOLED = ("cls_reg_learned", "cls_reg_attn")  # the probe weighs the registers
CONTROLS = ("cls_noise", "cls_random")  # as wide as cls_reg, without registers
PROJECTION_SEED = 0  # of R: a constant, so that a probe fits features that are read another day
NOISE_ROWS = 4096  # images whose noise is made at once


class FeatureSource(Protocol):
    """What readouts are made from: a `FeatureStore`, or anything else with the shape of a row by array name."""

    arrays: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> Float[np.ndarray, "b ..."]: ...


class InMemory:
    """Arrays in memory under the interface of a store."""

    def __init__(self, values: Mapping[str, Float[np.ndarray, "b ..."]]):
        self._values, self.arrays = values, {name: array.shape[1:] for name, array in values.items()}

    def read(self, name: str) -> Float[np.ndarray, "b ..."]:
        return self._values[name]


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
    "patch_reg": ("patch_mean", "registers"),
    "cls_reg_max": ("cls", "registers"),
    "cls_reg_learned": ("cls", "registers"),
    "cls_reg_attn": ("cls", "registers"),
    "cls_noise": ("cls",),
    "cls_random": ("cls",),
}


def arrays_needed(name: str) -> tuple[str, ...]:
    """Arrays of a feature store that a readout is made from, in the order of its channels.

    Raises:
        ValueError: the readout is unknown; the message gives the nearest name.
    """
    if name in READOUTS:
        return READOUTS[name]
    if _some_registers(name) is not None:
        return ("cls", "registers") if name.startswith("cls") else ("registers",)
    near = get_close_matches(name, READOUTS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"readout {name!r} is unknown; {hint}Known are {', '.join(READOUTS)}, reg_<i> and cls_reg_<i>, i from "
                     "0, reg_mean_<m> and cls_reg_mean_<m>, m from 1")  # fmt: skip


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
        some = _some_registers(name)
        if missing := [array for array in arrays_needed(name) if array not in arrays]:
            left_out[name] = " and ".join(MISSING[array] for array in missing)
        elif some is not None and some.stop > arrays["registers"][0]:
            left_out[name] = f"register {some.stop - 1} is out of range (0 to {arrays['registers'][0] - 1})"
        elif name in POOLED and arrays["registers"][0] == 1:
            left_out[name] = "the run has one register, with which it would be cls_reg"
    return Available(tuple(name for name in names if name not in left_out), left_out)


def readout(
    features: FeatureSource, name: str, spread: Float[np.ndarray, " d"] | None = None
) -> Float[np.ndarray, "b d"]:
    """Features of every image under one readout, float32; two parts are concatenated along the channels.

    Args:
        spread: of the noise of `cls_noise`, as `noise_spread` gives it, where `features` are a part of all images.
    Raises:
        ValueError: the readout is unknown, or cannot be made from these arrays; the message says why.
    """
    if reason := available(features.arrays, [name]).left_out.get(name):
        raise ValueError(f"readout {name!r} cannot be made: {reason}; leave it out, or choose another run")
    parts = [features.read(array) for array in arrays_needed(name)]
    parts = [_reduce_registers(name, part) if part.ndim == 3 else part for part in parts]  # (b, d) each
    if name in CONTROLS:
        noisy = name == "cls_noise"
        parts.append(_with_noise(parts[0], spread) if noisy else _projected(parts[0]))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _some_registers(name: str) -> slice | None:
    """The registers of `reg_<i>` and `reg_mean_<m>`, behind CLS or alone; None for any other name."""
    if match := re.fullmatch(r"(?:cls_)?reg_(0|[1-9]\d*)", name):
        return slice(int(match[1]), int(match[1]) + 1)
    match = re.fullmatch(r"(?:cls_)?reg_mean_([1-9]\d*)", name)
    return slice(0, int(match[1])) if match else None


def _reduce_registers(name: str, registers: Float[np.ndarray, "b r d"]) -> Float[np.ndarray, "b d"]:
    """The part of a readout that comes from the registers: (b, d), or (b, r · d) where the probe pools them."""
    if name in POOLED:
        return registers.reshape(len(registers), -1)
    if name == "cls_reg_max":
        return registers.max(1)
    return registers[:, _some_registers(name) or slice(None)].mean(1)


def _projected(cls: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b d"]:
    """CLS · R, in float64, so that an image's values do not hang on which others stand beside it."""
    d = cls.shape[1]
    values = np.random.default_rng(PROJECTION_SEED).standard_normal((d, d)) / np.sqrt(d)
    return (cls.astype(np.float64) @ values).astype(np.float32)


def noise_spread(blocks: Callable[[], Iterable[Float[np.ndarray, "b d"]]]) -> Float[np.ndarray, " d"]:
    """σ of each channel of CLS over all images, float64, in two passes over blocks of them (`blocks` starts one).

    Summed row after row, as NumPy does along the first axis: the bits do not depend on how the rows are cut.
    """
    n = sum(map(len, blocks()))
    mean = sum_of_rows(blocks()) / n
    return np.sqrt(sum_of_rows((block.astype(np.float64) - mean) ** 2 for block in blocks()) / n)


def sum_of_rows(blocks: Iterable[Float[np.ndarray, "b d"]]) -> Float[np.ndarray, " d"]:
    """Σ over the rows of all blocks, one after another, in float64: of one block what `sum(0)` gives, to the bit."""
    total = None
    for block in blocks:
        block = block.astype(np.float64)
        total = (block if total is None else np.concatenate([total[None], block])).sum(0)
    return total


def _with_noise(cls: Float[np.ndarray, "b d"], spread: Float[np.ndarray, " d"] | None) -> Float[np.ndarray, "b d"]:
    """CLS + σ ε, σ the standard deviation of each channel over the images, ε standard normal."""
    spread = noise_spread(lambda: [cls]) if spread is None else spread
    noisy = np.empty_like(cls)
    for start in range(0, len(cls), NOISE_ROWS):
        part = cls[start : start + NOISE_ROWS]
        noisy[start : start + NOISE_ROWS] = part + spread * _normal(part)
    return noisy


def _normal(cls: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b d"]:
    """Standard normal numbers by Box and Muller, from uniform ones that are hashes of (the image's CLS, channel)."""
    digests = [hashlib.blake2b(np.ascontiguousarray(row, dtype="<f4"), digest_size=8).digest() for row in cls]
    seeds = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)[:, None]
    counters = np.arange(1, 2 * cls.shape[1] + 1, dtype=np.uint64)
    uniform = (_splitmix(seeds + counters * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)) * 2.0**-53  # [0, 1)
    one, other = uniform[:, ::2], uniform[:, 1::2]
    return np.sqrt(-2 * np.log1p(-one)) * np.cos(2 * np.pi * other)


def _splitmix(x: UInt64[np.ndarray, "b d"]) -> UInt64[np.ndarray, "b d"]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014); products wrap around on purpose."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
