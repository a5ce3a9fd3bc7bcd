"""Patch features as colours: red, green and blue are the first three principal components.

    rgb = ((x − mean) @ V − low) / (high − low), clipped to [0, 1]
    V (d, 3): the leading right singular vectors of x − mean

`mean`, `V`, `low` and `high` are fitted once, on patches that are no outliers (these would take the first component for
themselves), and then paint every model and image that is to be compared: the same colour is the same feature. Signs are
fixed by making the largest weight of each component positive, so that the same patches give the same colours.
Source of the picture: Oquab et al. 2023, arXiv:2304.07193, figure 1.

Shape letters: p patch, d channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

COLOUR_RANGE = (0.02, 0.98)  # quantiles of the fitted patches that span each colour; what lies beyond is clipped


@dataclass(frozen=True)
class Palette:
    """What makes a feature a colour."""

    mean: Float[np.ndarray, " d"]
    basis: Float[np.ndarray, "d 3"]
    low: Float[np.ndarray, " 3"]
    high: Float[np.ndarray, " 3"]

    def paint(self, features: Float[np.ndarray, "*p d"]) -> Float[np.ndarray, "*p 3"]:
        """Red, green and blue from 0 to 1 of each patch; grey where the fitted patches did not differ.

        Raises:
            ValueError: the features have another number of channels than those that were fitted.
        """
        if features.shape[-1] != len(self.mean):
            raise ValueError(
                f"features have {features.shape[-1]} channels and the palette was fitted on {len(self.mean)}; "
                "fit one on the features of this backbone"
            )
        spread = np.where(self.high > self.low, self.high - self.low, 1.0)
        return np.clip(((features - self.mean) @ self.basis - self.low) / spread, 0, 1)


def fit_palette(features: Float[np.ndarray, "p d"]) -> Palette:
    """The palette of some patches, of one image or of several.

    Raises:
        ValueError: there is no patch.
    """
    if not len(features):
        raise ValueError("no patch is left to fit colours on; leave out fewer as outliers")
    fitted = features.astype(np.float64)
    mean = fitted.mean(0)
    _, _, v = np.linalg.svd(fitted - mean, full_matrices=False)
    basis = np.zeros((fitted.shape[1], 3))  # one or two patches have fewer components
    basis[:, : len(v[:3])] = v[:3].T
    basis *= np.where(basis[np.abs(basis).argmax(0), range(3)] < 0, -1, 1)
    low, high = np.quantile((fitted - mean) @ basis, COLOUR_RANGE, axis=0)
    return Palette(mean, basis, low, high)
