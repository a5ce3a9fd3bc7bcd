"""Registers held against each other, pair by pair: whether they look at the same patches, and whether they say the same.

    overlap    Σ min(a_i, a'_i) of the two attention maps over the patches, each summing to 1: 1 where they look at the same
               patches, 0 where at none in common; mean over blocks and heads
    cosine     of the two tokens after the last norm

Shape letters: b image, r register, k pair of registers, p patch, d channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from regvit.features.dense_set import DenseSet
from regvit.measures.tables import means_with_intervals

COLUMNS = ("overlap", "cosine")


def pairwise_overlap(maps: Float[Tensor, "*b r p"]) -> Float[Tensor, "*b k"]:
    """What the maps of each pair of registers, which sum to 1, have in common."""
    pairs = combinations(maps.unbind(-2), 2)
    shared = [torch.minimum(one, other).sum(-1) for one, other in pairs]
    return torch.stack(shared, -1) if shared else maps.new_zeros(*maps.shape[:-2], 0)


def pairwise_cosine(registers: Float[Tensor, "b r d"]) -> Float[Tensor, "b k"]:
    """Cosine between the tokens of each pair of registers."""
    unit = torch.nn.functional.normalize(registers, dim=-1)
    one, other = torch.triu_indices(unit.shape[1], unit.shape[1], offset=1)
    return (unit[:, one] * unit[:, other]).sum(-1)


@torch.inference_mode()
def register_pairs(
    dense: DenseSet, rows: Sequence[int], layers: Sequence[int], heads: Sequence[int] | None = None
) -> pd.DataFrame:
    """A row a pair: `register, other`, and of overlap and cosine the mean over images with its 95 % t interval.

    Args:
        rows: of `dense`, ascending.
        layers, heads: over which maps are averaged; None: all heads.
    Returns: no rows where there are fewer than two registers; no cosine where registers were not kept (`patches`).
    """
    layout = dense.layout
    pairs = list(combinations(range(layout.num_registers), 2))
    parts: list[Float[np.ndarray, "b k m"]] = []
    kept = ["attention", *(["registers"] if "registers" in dense.store.arrays else [])]
    for _, arrays in dense.batches(rows, *kept) if pairs else ():
        attention = arrays["attention"].double()[:, list(layers)][:, :, slice(None) if heads is None else list(heads)]
        maps = attention[..., layout.cls : layout.prefix, layout.prefix :]  # (b, l, h, r, p)
        overlap = pairwise_overlap(maps / maps.sum(-1, keepdim=True)).mean((1, 2))
        cosine = torch.full_like(overlap, torch.nan)
        if "registers" in arrays:
            cosine = pairwise_cosine(arrays["registers"].double())
        parts.append(torch.stack([overlap, cosine], -1).cpu().numpy())
    table = pd.DataFrame(pairs, columns=["register", "other"])
    ends = means_with_intervals(np.concatenate(parts)) if parts else np.empty((3, 0, len(COLUMNS)))  # (3, k, m)
    for m, name in enumerate(COLUMNS):
        for end, values in zip(("", "_lo", "_hi"), ends[..., m], strict=True):
            table[f"{name}{end}"] = values
    return table
