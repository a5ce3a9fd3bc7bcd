"""How much a patch resembles its neighbours, by which outlier tokens are told: they sit where nothing is new.

Source: Darcet et al. 2024, arXiv:2309.16588, figure 5.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def neighbour_cosine(e: Float[Tensor, "b i j d"]) -> Float[Tensor, "b p"]:
    """Mean cosine of each patch embedding to its up to four neighbours on the grid, row by row."""
    e = F.normalize(e, dim=-1)
    down, right = (e[:, 1:] * e[:, :-1]).sum(-1), (e[:, :, 1:] * e[:, :, :-1]).sum(-1)
    total, count = e.new_zeros(e.shape[:3]), e.new_zeros(e.shape[1:3])
    for near, cosine in (
        (np.s_[1:, :], down),
        (np.s_[:-1, :], down),
        (np.s_[:, 1:], right),
        (np.s_[:, :-1], right),
    ):
        total[(slice(None), *near)] += cosine
        count[near] += 1
    return (total / count).flatten(1)
