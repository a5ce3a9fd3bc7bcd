"""A mean over images with its 95 % bootstrap interval."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def mean_with_interval(
    name: str, values: Float[np.ndarray, " b"], seed: int = 0, resamples: int = 1000
) -> dict[str, float | None]:
    """Mean of one value an image, ready for a metrics file.

    Args:
        name: key of the mean; `<name>_lo` and `<name>_hi` stand beside it.
        values: one an image; nan where the image has none, and then it is left out.
        seed: of the resampling.
        resamples: of the images, with replacement; the interval is from the 2.5 to the 97.5 percentile.
    Returns: rounded to 6 digits; None where no image has a value.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return {name: None, f"{name}_lo": None, f"{name}_hi": None}
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {name: _round(values.mean()), f"{name}_lo": _round(low), f"{name}_hi": _round(high)}


def _round(value: float) -> float:
    return round(float(value), 6)
