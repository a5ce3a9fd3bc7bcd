"""95 % intervals from a variance, and p-values that agree with them.

What is measured on n images with S probe seeds varies with both. Let c be the mean covariance of two seeds over the images,
which is what images alone account for (with one seed: its variance), and v the variance of the mean of the seeds by what
they differ, Σ (mₛ − m̄)² / (S (S − 1)). Few seeds say little about v, so it takes Student's t where c takes the normal:

    h² = z² c + t² v,    t the 97.5 % point with S − 1 degrees of freedom, z = 1.96 (t where c is a bootstrap's of few images)

- a fraction p has Wilson's interval (1927), whose κ = 1.96² / n is h² / (p (1 − p)) here: it never leaves [0, 1] and holds
  for rare events, where p ± h is too short;
- a difference has d ± h; its p-value is the level whose interval ends at 0, so below 0.05 exactly where this one leaves 0 out.

2,000 simulations of known truth: `tests/stats/test_coverage.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean or a fraction with its 95 % interval and the number of images behind it."""

    value: float
    lo: float
    hi: float
    n: int


@dataclass(frozen=True)
class Difference:
    """How far two of something differ on the same images.

    Attributes:
        value: a minus b.
        lo, hi: its 95 % interval.
        p: two-sided p-value of "no difference", below 0.05 exactly where the interval leaves 0 out.
        n: images.
    """

    value: float
    lo: float
    hi: float
    p: float
    n: int


@dataclass(frozen=True)
class Variance:
    """Of a mean over images and probe seeds: c and v of the module's text, the number of seeds, degrees of freedom of c."""

    images: float
    seeds: float = 0.0
    n_seeds: int = 1
    df: float = 1e9

    @classmethod
    def of_seeds(cls, values: Float[np.ndarray, " s"], together: float, single: float, df: float = 1e9) -> Variance:
        """From the values of the seeds.

        Args:
            together: variance of their mean over images.
            single: variance of one of them over images, in the mean.
            df: degrees of freedom that these were estimated with.
        """
        seeds = len(values)
        if seeds == 1:
            return cls(together, df=df)
        covariance = max(0.0, (seeds * together - single) / (seeds - 1))
        return cls(covariance, float(np.var(values, ddof=1)) / seeds, seeds, df)

    def half_width(self, level: float = 0.05) -> float:
        """h at a level."""
        squared = float(stdtrit(self.df, 1 - level / 2)) ** 2 * self.images
        if self.n_seeds > 1:
            squared += float(stdtrit(self.n_seeds - 1, 1 - level / 2)) ** 2 * self.seeds
        return math.sqrt(squared)

    def p_value(self, distance: float) -> float:
        """The level at which h is this distance, by bisection."""
        if not distance or not self.images + self.seeds:
            return float(not distance)
        low, high = 1e-15, 1.0
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.half_width(middle) > distance else (low, middle)
        return high


def fraction(value: float, variance: Variance, n: int, least: float | None = None, most: float = math.inf) -> Estimate:
    """Wilson's interval of a fraction with that variance.

    Args:
        n: images, for the table.
        least: images that Wilson's own interval would be of, where the variance is 0 as all are alike; None: n.
        most: images that the variance may stand for, as it is itself uncertain where the fraction is near 0 or 1.
    """
    own, squared = value * (1 - value), variance.half_width() ** 2
    kappa = max(squared / own, Z_95**2 / most) if own > 0 and squared > 0 else Z_95**2 / (least or n)
    centre, half = (value + kappa / 2) / (1 + kappa), math.sqrt(kappa * own + kappa**2 / 4) / (1 + kappa)
    return Estimate(value, min(value, max(0.0, centre - half)), max(value, min(1.0, centre + half)), n)


def difference(value: float, variance: Variance, n: int, centre: float | None = None) -> Difference:
    """Interval and p-value of a difference of fractions.

    Args:
        centre: of the interval, where it is not the value.
    """
    centre, half = value if centre is None else centre, variance.half_width()
    lo, hi = max(-1.0, centre - half), min(1.0, centre + half)
    return Difference(value, min(lo, value), max(hi, value), variance.p_value(abs(centre)), n)
