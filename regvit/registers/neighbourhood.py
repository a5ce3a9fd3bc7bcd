"""How much a patch resembles its neighbours, by which outlier tokens are told: they sit where nothing is new.

Source: Darcet et al. 2024, arXiv:2309.16588, figure 5.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
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


@torch.no_grad()
def low_information(model: nn.Module, images: Float[Tensor, "b 3 s s"], batch_size: int = 8) -> Float[Tensor, "b p"]:
    """Mean cosine similarity of each patch embedding to its (up to four) neighbours, embeddings centred over all.

    Source: Darcet et al. 2024, arXiv:2309.16588: outliers appear where a patch resembles its neighbours.
    """
    e = torch.cat([_embed(model, batch) for batch in images.split(batch_size)])  # (b, rows, columns, d)
    return neighbour_cosine(e - e.mean((0, 1, 2)))


def _embed(model: nn.Module, batch: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b y x d"]:
    """Patch embeddings on their grid, whether or not the model flattens them."""
    e = model.patch_embed(batch)
    rows = batch.shape[-2] // model.patch_embed.patch_size[0]
    return e.reshape(len(e), rows, -1, e.shape[-1])
