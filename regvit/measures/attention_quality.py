"""How good an attention map is: sharpness, spatial coherence, what it spends on outliers, whether it finds objects.

For the attention A of one prefix token in one head, over all n tokens, and its map over the P patches,
a_i = A_i / Σ_patches A (so that maps compare whatever share CLS and registers take):

    on_outliers, on_registers, on_patches, on_cls    sums of A, registers of either kind
    entropy             −Σ a_i ln a_i in nats
    largest             max a_i
    morans_i            (P / W) Σ_ij w_ij (a_i − m)(a_j − m) / Σ_i (a_i − m)², m = 1/P; w_ij = 1 where j is a neighbour of
                        i by an edge (rook), W = Σ w_ij. 1: smooth, about 0: scattered at random (Moran 1950)
    distance_correlation  Pearson correlation over the patches but the peak of a_i with the distance on the grid from the
                        peak, the largest a_i. Negative: attention falls off around its peak; about 0: isolated peaks
    object_mass         Σ a_i f_i, f_i the share of the patch's pixels that belong to an object
    object_auroc        probability that a pixel of an object has more attention than one of the background, ties half

    register_overlap    Σ min(a_i, a'_i), mean over the pairs of registers: 1 where they look at the same patches, 0 where at
                        none in common

Over *all* queries, patches too, there are entropy, largest weight and coherence as the recipe of arXiv:2506.08010 has them
(`regvit.models.query_attention`): `all_entropy`, `all_largest`, `all_coherence`.

Shape letters: b image, l layer, h head, q query (CLS, then registers), n token, p patch, i and j row and column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regvit.data.dense_labels import IGNORE, read_mask
from regvit.features.dense_set import DenseSet, grid_side
from regvit.measures.register_pairs import pairwise_overlap
from regvit.measures.tables import mean_figures, means_with_intervals
from regvit.models.attention import query_names
from regvit.models.query_attention import QUALITIES
from regvit.models.tokens import TokenLayout
from regvit.stats.figures import Figure, write_csv

METRICS = (
    "entropy", "largest", "on_outliers", "on_registers", "on_patches", "on_cls", "morans_i", "distance_correlation",
    "register_overlap", "object_mass", "object_auroc",
)  # fmt: skip


@dataclass(frozen=True)
class AttentionQuality:
    """The metrics of every image, nan where one is not defined (no outlier, no object, a constant map).

    Args:
        queries: names of the tokens that attend: `cls`, `register_0`, …
        later: blocks that are summed up.
        heads: by metric, of every block and head; empty where nothing but patches attends.
        outliers: which patches are outliers in the untreated model.
        over_all: the metrics over all queries.
        summed_heads: heads that are summed up; None: all.
    """

    queries: tuple[str, ...]
    later: tuple[int, ...]
    heads: dict[str, Float[np.ndarray, "b l h q"]]
    outliers: Bool[np.ndarray, "b p"]
    over_all: dict[str, Float[np.ndarray, "b l h"]]
    summed_heads: tuple[int, ...] | None = None


def entropy(maps: Float[Tensor, "*b p"]) -> Float[Tensor, "*b"]:
    """Entropy in nats of maps that sum to 1."""
    return torch.special.entr(maps).sum(-1)


def morans_i(maps: Float[Tensor, "*b p"]) -> Float[Tensor, "*b"]:
    """Moran's I with rook weights on a square grid; nan for a constant map."""
    side = grid_side(maps.shape[-1])
    x = (maps - maps.mean(-1, keepdim=True)).unflatten(-1, (side, side))
    pairs = (x[..., 1:, :] * x[..., :-1, :]).sum((-2, -1)) + (x[..., 1:] * x[..., :-1]).sum((-2, -1))
    weights = 4 * side * (side - 1)  # every pair of neighbours in both directions
    return side**2 / weights * 2 * pairs / x.square().sum((-2, -1))


def distance_correlation(maps: Float[Tensor, "*b p"]) -> Float[Tensor, "*b"]:
    """Pearson correlation of attention with the distance from the peak, over all other patches; nan for constant ones."""
    side = grid_side(maps.shape[-1])
    axis = torch.arange(side, device=maps.device, dtype=maps.dtype)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)  # (p, 2)
    peak = maps.argmax(-1, keepdim=True)
    distance = torch.cdist(places, places)[peak[..., 0]]  # (..., p)
    others = torch.ones_like(maps).scatter(-1, peak, 0)

    def centred(x: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
        return (x - (x * others).sum(-1, keepdim=True) / others.sum(-1, keepdim=True)) * others

    a, d = centred(maps), centred(distance)
    return (a * d).sum(-1) / (a.square().sum(-1) * d.square().sum(-1)).sqrt()


def register_overlap(maps: Float[Tensor, "*b r p"]) -> Float[Tensor, "*b"]:
    """Mean over the pairs of registers of what their maps, which sum to 1, have in common; nan for fewer than two."""
    return pairwise_overlap(maps).mean(-1)


def object_auroc(maps: Float[Tensor, "*b p"], objects: Float[Tensor, "*b p"]) -> Float[Tensor, "*b"]:
    """AUROC over pixels of attention as a detector of objects; nan where there are only objects or none.

    Args:
        objects: share of each patch's pixels that belong to an object, of a shape that broadcasts.
    """
    objects = objects.expand_as(maps)
    order = maps.argsort(-1)
    ordered, hit = maps.gather(-1, order), objects.gather(-1, order)
    miss = torch.nn.functional.pad((1 - hit).cumsum(-1), (1, 0))  # background below each place in the order
    below = miss.gather(-1, torch.searchsorted(ordered, ordered))
    up_to = miss.gather(-1, torch.searchsorted(ordered, ordered, right=True))
    return (hit * (below + up_to)).sum(-1) / (2 * hit.sum(-1) * (1 - hit).sum(-1))


def qualities(
    attention: Float[Tensor, "b l h q n"],
    layout: TokenLayout,
    outliers: Bool[Tensor, "b p"],
    objects: Float[Tensor, "b p"] | None,
) -> dict[str, Float[Tensor, "b l h q"]]:
    """All metrics of a batch, in float64, by the names and formulas above.

    Args:
        attention: rows that sum to 1 over the tokens of `layout`.
        objects: share of object pixels by patch; nan rows for images without a mask; None for no masks at all.
    """
    attention = attention.double()
    patches = attention[..., layout.prefix :]
    on_patches = patches.sum(-1)
    a = patches / on_patches[..., None]
    lift = (slice(None), None, None, None)  # (b, p) -> (b, 1, 1, 1, p)
    has = outliers.any(1)[:, None, None, None].expand_as(on_patches)
    found = {
        "entropy": entropy(a),
        "largest": a.amax(-1),
        "on_outliers": (patches * outliers[lift]).sum(-1).where(has, torch.nan),
        "on_registers": attention[..., layout.cls : layout.prefix].sum(-1),
        "on_patches": on_patches,
        "on_cls": attention[..., : layout.cls].sum(-1),
        "morans_i": morans_i(a),
        "distance_correlation": distance_correlation(a),
    }
    found["register_overlap"] = register_overlap(a[..., layout.cls : layout.prefix, :])[..., None].expand_as(on_patches)
    if not layout.num_registers:
        found["on_registers"] = torch.full_like(on_patches, torch.nan)
    if objects is None:
        objects = torch.full(outliers.shape, torch.nan, device=a.device)
    f = objects.double()[lift]
    found["object_mass"] = (a * f).sum(-1)
    known = ~f.isnan().any(-1) & (f.sum(-1) > 0)
    found["object_auroc"] = object_auroc(a, f.nan_to_num(0.0))
    return {name: found[name].where(known, torch.nan) if name.startswith("object") else found[name] for name in METRICS}


def later_blocks(depth: int, first: int | None = None, layers: Sequence[int] | None = None) -> list[int]:
    """The blocks from `first` on; by default the later half, which is the same in every run on an architecture; or `layers`.

    Raises:
        ValueError: a block is out of range.
    """
    if layers is not None:
        if strange := [layer for layer in layers if not 0 <= layer < depth]:
            raise ValueError(f"attention.layers has {strange[0]}, but the model has {depth} blocks (0 to {depth - 1})")
        return list(layers)
    first = depth // 2 if first is None else first
    if not 0 <= first < depth:
        raise ValueError(f"first layer {first} is out of range: the model has {depth} blocks (0 to {depth - 1})")
    return list(range(first, depth))


@torch.inference_mode()
def measure_attention(
    dense: DenseSet, rows: Sequence[int], later: Sequence[int], heads: Sequence[int] | None = None
) -> AttentionQuality:
    """The attention of CLS and registers in every block and head; objects are those of the masks, where there are some.

    Args:
        rows: of `dense`, ascending.
        later: blocks that are summed up.
        heads: that are summed up; None: all.
    Raises:
        KeyError: attention was not kept.
        ValueError: there is no such head.
    """
    over_all = dense.read("all_queries", rows)
    if strange := [head for head in heads or () if head >= over_all.shape[2]]:
        raise ValueError(
            f"attention.heads has {strange[0]}, but the model has {over_all.shape[2]} heads (0 to {over_all.shape[2] - 1})"
        )
    parts: list[dict[str, np.ndarray]] = []
    for own, arrays in dense.batches(rows, "attention", "outliers") if dense.layout.prefix else ():
        attention, outliers = arrays["attention"].double(), arrays["outliers"] > 0
        attention = attention / attention.sum(-1, keepdim=True)  # they are kept in float16
        objects = object_shares(dense, own)
        objects = None if objects is None else torch.from_numpy(objects).to(attention.device)
        found = qualities(attention, dense.layout, outliers, objects)
        parts.append({name: values.cpu().numpy() for name, values in found.items()})
    of_prefix = {name: np.concatenate([part[name] for part in parts]) for name in METRICS if parts}
    return AttentionQuality(
        query_names(dense.layout),
        tuple(later),
        of_prefix,
        dense.outliers(rows),
        {f"all_{name}": over_all[..., m] for m, name in enumerate(QUALITIES)},
        None if heads is None else tuple(heads),
    )


def object_shares(dense: DenseSet, rows: Sequence[int]) -> Float[np.ndarray, "b p"] | None:
    """Share of each patch's pixels that belong to an object, nan for images without a mask; None where none has one."""
    masks = [dense.dataset.rows[row].mask for row in rows]
    if not any(masks):
        return None
    side, size = dense.side, dense.transform.size // dense.side
    shares = np.full((len(rows), side**2), np.nan)
    for share, mask in zip(shares, masks, strict=True):
        if mask:
            inside = read_mask(dense.dataset.root / mask, dense.transform.size)
            inside = (inside > 0) & (inside != IGNORE)  # class index + 1
            share[:] = inside.reshape(side, size, side, size).mean((1, 3)).ravel()
    return shares


def figures(quality: AttentionQuality, seed: int = 0) -> list[Figure]:
    """Means over images of `image_columns` with their intervals, and how many images have outliers."""
    with_outliers = Figure("images_with_outliers", int(quality.outliers.any(1).sum()), n=len(quality.outliers))
    return [*mean_figures(image_columns(quality), seed), with_outliers]


def image_columns(quality: AttentionQuality) -> dict[str, Float[np.ndarray, " b"]]:
    """Each metric of the first query, CLS where there is one, and those over all queries: mean over the blocks and heads that
    are summed up, by image."""
    later, heads = list(quality.later), slice(None) if quality.summed_heads is None else list(quality.summed_heads)
    of_first = {name: values[..., 0] for name, values in quality.heads.items()}
    return {name: values[:, later][:, :, heads].mean((1, 2)) for name, values in (of_first | quality.over_all).items()}


def write_tables(folder: Path, quality: AttentionQuality) -> None:
    """What the prefix tokens attend to, each metric with its mean over images and its 95 % t interval.

    - `layers.csv`: a row a query and block (mean over heads); of the first query only;
    - `heads.csv`: a row a query, block and head;
    - `all_queries.csv`: a row a block and head, the metrics over all queries.

    Cells are empty where a metric is not defined.
    """
    lifted = {name: values[..., None] for name, values in quality.over_all.items()}
    write_csv(folder / "all_queries.csv", _table(("all",), lifted).drop(columns="query"))
    if not quality.heads:
        return
    means = {name: values.mean(2, keepdims=True)[..., :1] for name, values in quality.heads.items()}
    write_csv(folder / "layers.csv", _table(quality.queries[:1], means).drop(columns=["query", "head"]))
    write_csv(folder / "heads.csv", _table(quality.queries, quality.heads))


def _table(queries: Sequence[str], values: Mapping[str, Float[np.ndarray, "b l h q"]]) -> pd.DataFrame:
    """Query, block, head, and of every metric mean and interval."""
    _, n_layers, n_heads, n_queries = next(iter(values.values())).shape
    layer, head, query = (axis.ravel() for axis in np.indices((n_layers, n_heads, n_queries)))
    columns = {"query": np.array(queries)[query], "layer": layer, "head": head}
    for name, each in values.items():
        for end, estimate in zip(("", "_lo", "_hi"), means_with_intervals(each), strict=True):
            columns[f"{name}{end}"] = estimate.ravel()
    return pd.DataFrame(columns).sort_values(["query", "layer", "head"], kind="stable")


def attention_maps(
    dense: DenseSet, rows: Sequence[int], layers: Sequence[int]
) -> dict[str, Float[np.ndarray, "b i j"]]:
    """Attention of each prefix token to the patches, mean over heads and `layers`, by the token's name."""
    maps = dense.read("attention", rows)[:, list(layers)].mean((1, 2))[..., dense.layout.prefix :]  # (b, q, p)
    maps = maps.reshape(*maps.shape[:2], dense.side, dense.side)
    return {name: maps[:, q] for q, name in enumerate(query_names(dense.layout))}


def head_maps(dense: DenseSet, rows: Sequence[int]) -> dict[str, Float[np.ndarray, "b h i j"]]:
    """Attention of each prefix token to the patches in the last block, by the token's name and head."""
    maps = dense.read("attention", rows)[:, -1, ..., dense.layout.prefix :]  # (b, h, q, p)
    maps = maps.reshape(*maps.shape[:3], dense.side, dense.side)
    return {name: maps[:, :, q] for q, name in enumerate(query_names(dense.layout))}
