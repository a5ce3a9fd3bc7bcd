"""Attention over all queries, as the recipe of arXiv:2506.08010 looks at it: three numbers a block and head.

With A_ij the weight that query i gives to token j (rows sum to 1), n tokens of which p are patches on a grid:

    entropy     mean over all queries i of −Σ_j A_ij ln A_ij, nats
    largest     mean over all queries i of max_j A_ij
    coherence   Pearson correlation of A_ij with the distance of i and j on the grid, in patches, over all pairs of patches,
                each with itself too. Negative: patches attend to what lies near; 0: place does not matter, as where all are equal

No (n, n) matrix is made: rows come a few at a time, of more than `MOST` patches those of a random sample, the same in every
image and block. Weights are float32, sums float64.

Shape letters: b image, h head, q query, n token, p patch, m the three numbers, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regvit.models.attention import AttentionRows, watch_attention
from regvit.models.tokens import TokenLayout

QUALITIES = ("entropy", "largest", "coherence")
MOST = 256  # patches that are queries
AT_ONCE = 1 << 22  # weights held at once: 16 MiB of float32


@contextmanager
def watch_query_attention(
    model: nn.Module, layers: list[int] | None = None, most: int = MOST
) -> Iterator[dict[int, Float[Tensor, "b h m"]]]:
    """Inside the `with` block, each forward leaves the three numbers of every image and head in the yielded dict, by layer.

    Args:
        layers: block indices, all by default.
        most: patches whose rows are looked at.
    Raises:
        ValueError: as `watch_attention`; or the patches are no square grid.
    """
    prefix, seen = TokenLayout.of(model).prefix, {}
    with watch_attention(model, layers, lambda layer, rows: seen.update({layer: query_qualities(rows, prefix, most)})):
        yield seen


def query_qualities(rows: AttentionRows, prefix: int, most: int = MOST) -> Float[Tensor, "b h m"]:
    """The three numbers of one attention matrix, float32.

    Args:
        prefix: tokens before the first patch.
    """
    (b, h, n), first = rows.shape, rows[:1]
    places = _places(n - prefix).to(first.device)
    chosen = drawn_queries(n - prefix, most).to(first.device)
    sums = torch.zeros(5, b, h, dtype=torch.float64, device=first.device)
    whole, exact = rows[:prefix], {"dtype": torch.float64}
    ahead = (
        [torch.special.entr(whole).sum((-2, -1), **exact), whole.amax(-1).sum(-1, **exact)] if prefix else [0.0, 0.0]
    )
    distances = torch.cdist(places[chosen], places)  # (q, p)
    size = max(1, AT_ONCE // (b * h * n))
    for queries, d in zip(chosen.split(size), distances.split(size), strict=True):
        a = rows[prefix + queries]
        x = a[..., prefix:]
        parts = (torch.special.entr(a), a.amax(-1, keepdim=True), x, x.square(), x * d.float())
        sums += torch.stack([part.sum((-2, -1), **exact) for part in parts])
    entropy, largest = ((own + sums[i] / len(chosen) * (n - prefix)) / n for i, own in enumerate(ahead))
    x, xx, xd = sums[2:] / distances.numel()
    covariance = xd - x * distances.mean()
    variance = (xx - x**2).where(xx - x**2 > 1e-12 * xx, torch.inf)  # uniform but for rounding: nothing correlates
    coherence = covariance / (variance * distances.var(unbiased=False)).sqrt()
    return torch.stack([entropy, largest, coherence], dim=-1).float()


def drawn_queries(patches: int, most: int = MOST) -> Int[Tensor, " q"]:
    """Which patches are looked at, ascending: all, or a random sample of so many."""
    if patches <= most:
        return torch.arange(patches)
    return torch.randperm(patches, generator=torch.Generator().manual_seed(0))[:most].sort().values


def _places(patches: int) -> Float[Tensor, "p 2"]:
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches make no square grid; give the backbone a square img_size")
    axis = torch.arange(side, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)
