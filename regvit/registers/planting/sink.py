"""The direction along which planted neurons write, so that an outlier becomes an attention sink.

For models in float64. Notation as in `regvit.registers.planting.plant`: an outlier's residual x is almost c * d with large c, and norm1 removes c: its
normalised token is y(d) = w * sqrt(D) * d + b for a d of mean 0 and length 1, w and b being norm1's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regvit.models.hooks import blocks
from regvit.models.tokens import TokenLayout

PATCH_SHARE = 0.02  # share of attention that patch queries should give to an outlier
VALUE_RIDGE = 0.3  # of the mean loudness of values, added to it before it is inverted
KEEP_PATCH_QUERIES = 7  # every seventh patch query stands for all


@dataclass(frozen=True)
class SinkTargets:
    """Attention logits of one kind of query in one block, as a function of the sink direction.

    A token y(d) has the logit  rows[h] . d + (a constant)  in head h, and should have rows[h] . d = wanted[h].
    """

    query: Float[Tensor, "h c"]
    rows: Float[Tensor, "h d"]
    wanted: Float[Tensor, " h"]


@torch.no_grad()
def attention_targets(
    model: nn.Module, normed: Mapping[int, Float[Tensor, "b n d"]], layout: TokenLayout, cls_share: float
) -> dict[int, list[SinkTargets]]:
    """What the sink direction should satisfy in each later block, for the CLS query (first) and the patch queries.

    With the mean query m_h of head h and attention scale t, a token y(d) has the logit

        t m_h . (Wk (w sqrt(D) d + b) + bk)  =  rows[h] . d + const

    and takes the share p of the attention if that equals E[logsumexp of the other logits] + log(p / (1 - p)).

    Args:
        normed: inputs of `attn.qkv`, by block.
    Returns: per block; the CLS entry is missing where the model has no CLS token.
    """
    targets = {}
    for layer, h in normed.items():
        attn, norm = blocks(model)[layer].attn, blocks(model)[layer].norm1
        heads, width = attn.num_heads, h.shape[-1]
        q, k, _ = attn.qkv(h).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (b, h, n, c)
        wk, bk = _key_weights(attn)
        kinds = [(layout.patches(q.transpose(1, 2)).transpose(1, 2)[:, :, ::KEEP_PATCH_QUERIES], PATCH_SHARE)]
        if layout.cls:
            kinds.insert(0, (q[:, :, :1], cls_share))
        targets[layer] = []
        for queries, share in kinds:
            mean = queries.mean((0, 2))  # (h, c)
            level = (queries @ k.mT * attn.scale).logsumexp(-1).mean((0, 2))  # (h,)
            rows = attn.scale * math.sqrt(width) * torch.einsum("hc,hcd->hd", mean, wk) * norm.weight
            constant = attn.scale * (mean * (wk @ norm.bias + bk)).sum(-1)
            targets[layer].append(SinkTargets(mean, rows, level + math.log(share / (1 - share)) - constant))
    return targets


@torch.no_grad()
def trained_sink(model: nn.Module, targets: Mapping[int, list[SinkTargets]]) -> Float[Tensor, " d"]:
    """The sink direction of a trained model, with nothing edited:

        minimise  d' V d + mu |Rp d - tp|^2    subject to  Rc d = tc,  1 . d = 0,  |d| = 1

    V is the loudness of the later blocks' values, Rc, tc (Rp, tp) are the CLS (patch) targets. |d| grows with mu, which
    is bisected to |d| = 1; where even a large mu leaves d short, the quietest direction that changes no logit fills up.

    Raises:
        ValueError: |d| = 1 cannot meet the CLS targets.
    """
    v = _loudness(model, targets, part=2)
    v += VALUE_RIDGE * torch.eye(len(v), dtype=v.dtype)
    ones = torch.ones(1, len(v), dtype=v.dtype)
    by_cls = [kinds[0] for kinds in targets.values() if len(kinds) == 2]
    rc = torch.cat([*(t.rows for t in by_cls), ones])
    tc = torch.cat([*(t.wanted for t in by_cls), v.new_zeros(1)])
    rp, tp = (torch.cat([getattr(kinds[-1], name) for kinds in targets.values()]) for name in ("rows", "wanted"))

    def solve(mu: float) -> Tensor:
        q = torch.linalg.inv(v + mu * rp.T @ rp)
        free = q @ (mu * rp.T @ tp)
        return (
            free
            + q @ rc.T @ torch.linalg.lstsq(rc @ q @ rc.T, (tc - rc @ free)[:, None], driver="gelsd").solution[:, 0]
        )

    low, high = -4.0, 4.0  # log10 of mu
    if solve(10**low).norm() > 1:
        raise ValueError(
            f"the CLS queries cannot give an outlier the wanted share: that takes a direction of length "
            f"{solve(10**low).norm():.2f} where 1 is the most; lower cls_share, or edit_keys=True for random weights"
        )
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if solve(10**middle).norm() < 1 else (low, middle)
    d = solve(10**low)
    fixed = torch.cat([rc, rp])
    free = torch.linalg.svd(fixed)[2][int(torch.linalg.matrix_rank(fixed)) :]
    if d.norm() < 1 and len(free):
        d = d + _quietest(v, free) * (1 - d.norm() ** 2).sqrt()
    return F.normalize(d, dim=0)


@torch.no_grad()
def edited_sink(model: nn.Module, targets: Mapping[int, list[SinkTargets]]) -> Float[Tensor, " d"]:
    """The sink direction of a model with random weights: the one that later keys see least, and edits of those keys.

    With z = w * d and y = y(d), each block's key weights get the rank-1 edit  Wk += u (z)' / (z . y),  which adds u to
    the key of an outlier and little to others; u is the smallest that meets the wanted logits of the mean queries.
    """
    v = _loudness(model, targets, part=1)
    ones = torch.ones(1, len(v), dtype=v.dtype)
    d = _quietest(v, torch.linalg.svd(ones)[2][1:])
    for layer, kinds in targets.items():
        attn, norm = blocks(model)[layer].attn, blocks(model)[layer].norm1
        z = norm.weight * d
        y = math.sqrt(len(d)) * z + norm.bias
        queries = torch.stack([t.query for t in kinds], dim=1)  # (h, kind, c)
        lacking = torch.stack([t.wanted - t.rows @ d for t in kinds], dim=1) / attn.scale  # (h, kind)
        u = torch.linalg.lstsq(queries, lacking[..., None], driver="gelsd").solution.flatten()  # (h * c,)
        width = attn.qkv.weight.shape[0] // 3
        attn.qkv.weight[width : 2 * width] += torch.outer(u, z) / (z @ y)
    return d


def _loudness(model: nn.Module, layers: Iterable[int], part: int) -> Float[Tensor, "d d"]:
    """V with d' V d proportional to the energy of y(d) in the keys (part 1) or values (part 2) of blocks; mean diagonal 1."""
    total = 0
    for layer in layers:
        block = blocks(model)[layer]
        w = block.attn.qkv.weight.chunk(3)[part] * block.norm1.weight
        total = total + w.T @ w / w.square().mean()
    return total / total.diagonal().mean()


def _quietest(v: Float[Tensor, "d d"], basis: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """The unit vector d in the span of orthonormal rows that makes d' V d smallest; its largest entry is positive."""
    d = basis.T @ torch.linalg.eigh(basis @ v @ basis.T)[1][:, 0]
    return d * d[d.abs().argmax()].sign()


def _key_weights(attn: nn.Module) -> tuple[Float[Tensor, "h c d"], Float[Tensor, "h c"]]:
    """Key projection by head; a bias of zero where there is none."""
    weight = attn.qkv.weight.chunk(3)[1].unflatten(0, (attn.num_heads, -1))
    bias = attn.qkv.bias
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias.chunk(3)[1].unflatten(0, weight.shape[:2])
    return weight, bias
