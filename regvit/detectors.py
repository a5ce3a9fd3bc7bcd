"""Anomaly detectors on the logits of a probe; a score is larger for anomalies.

- `msp`: 1 − largest softmax probability (Hendrycks and Gimpel 2017, arXiv:1610.02136);
- `energy`: −log Σ exp(logits), temperature 1 (Liu et al. 2020, arXiv:2010.03759);
- `max_logit`: −largest logit (Hendrycks et al. 2022, arXiv:1911.11132).

All work in float64. No score saturates: `msp` is summed from the other classes' probabilities, so two confident images
stay apart where 1 − p would round to 0 for both.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

import numpy as np
from jaxtyping import Float


def msp(logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
    """One minus the maximum softmax probability, in [0, 1 − 1/c].

    Raises:
        ValueError: the logits are not (b, c), not finite, or of one class, which would give every image the score 0.
    """
    logits = _checked(logits)
    if logits.shape[1] < 2:
        raise ValueError("msp needs at least 2 classes: with one, every image scores 0; use energy or max_logit")
    exponentials = np.exp(logits - logits.max(1, keepdims=True))  # the largest is exactly 1
    others = np.sort(exponentials, axis=1)[:, :-1].sum(1)
    return others / (1 + others)


def energy(logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
    """Negative log-sum-exp of the logits, in nats.

    Raises:
        ValueError: the logits are not (b, c) with at least one class, or not finite.
    """
    logits = _checked(logits)
    largest = logits.max(1)
    return -(largest + np.log(np.exp(logits - largest[:, None]).sum(1)))


def max_logit(logits: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
    """Negative largest logit.

    Raises:
        ValueError: the logits are not (b, c) with at least one class, or not finite.
    """
    return -_checked(logits).max(1)


DETECTORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"msp": msp, "energy": energy, "max_logit": max_logit}


def detector(name: str) -> Callable[[Float[np.ndarray, "b c"]], Float[np.ndarray, " b"]]:
    """The detector of that name.

    Raises:
        ValueError: there is none; the message gives the nearest name.
    """
    if name not in DETECTORS:
        near = get_close_matches(name, DETECTORS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"detector {name!r} is unknown; {hint}Known are {', '.join(DETECTORS)}")
    return DETECTORS[name]


def _checked(logits: np.ndarray) -> Float[np.ndarray, "b c"]:
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits have shape {logits.shape}; expected (images, classes) with at least one class")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(1).sum())
        raise ValueError(f"{bad} of {len(logits)} images have infinite or NaN logits; look at their features")
    return logits
