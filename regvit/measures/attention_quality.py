"""How good an attention map is: sharpness, spatial coherence, what it spends on outliers, whether it finds objects.

For the attention A of one prefix token in one head, over all n tokens, and its map over the P patches,
a_i = A_i / Σ_patches A (so that maps compare whatever share CLS and registers take):

    on_outliers, on_registers, on_patches, on_cls    sums of A, registers of either kind
    entropy             −Σ a_i ln a_i in nats, and entropy_share = entropy / ln P in [0, 1]
    largest             max a_i
    morans_i            (P / W) Σ_ij w_ij (a_i − m)(a_j − m) / Σ_i (a_i − m)², m = 1/P; w_ij = 1 where j is a neighbour of
                        i by an edge (rook), W = Σ w_ij. 1: smooth, about 0: scattered at random (Moran 1950)
    distance_correlation  Pearson correlation over the patches but the peak of a_i with the distance on the grid from the
                        peak, the largest a_i. Negative: attention falls off around its peak; about 0: isolated peaks
    object_mass         Σ a_i f_i, f_i the share of the patch's pixels that belong to an object
    object_lift         object_mass over the objects' share of the image: 1 where objects get no more than their area
    object_auroc        probability that a pixel of an object has more attention than one of the background, ties half
    object_iou          intersection over union of the objects with the smallest set of patches that holds 60 % of the
                        map (Caron et al. 2021, arXiv:2104.14294, threshold their visualisations so)

Shape letters: b image, l layer, h head, q query (CLS, then registers), n token, p patch, i and j row and column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regvit.data.batches import Batches
from regvit.data.decoding import open_image
from regvit.data.manifest import Dataset
from regvit.data.transform import Transform
from regvit.files import cell, write_table
from regvit.measures.anatomy import Subject, grid_side
from regvit.models.attention import query_names, watch_prefix_attention
from regvit.models.hooks import blocks, watch_outputs
from regvit.models.nan_check import check_finite
from regvit.models.tokens import TokenLayout
from regvit.stats.bootstrap import mean_with_interval

OBJECT_MASS = 0.6  # of the map, that the patches taken for the object hold
RESAMPLES = 1000
METRICS = (
    "entropy", "entropy_share", "largest", "on_outliers", "on_registers", "on_patches", "on_cls", "morans_i",
    "distance_correlation", "object_mass", "object_lift", "object_auroc", "object_iou",
)  # fmt: skip


@dataclass(frozen=True)
class AttentionQuality:
    """The metrics of every image, nan where one is not defined (no outlier, no object, a constant map).

    Args:
        queries: names of the tokens that attend: `cls`, `register_0`, …
        later: blocks over which `maps` were averaged.
        heads: by metric, of every block and head.
        maps: by metric, of the attention averaged over heads and the later blocks.
        outliers: which patches are outliers in the untreated model.
    """

    queries: tuple[str, ...]
    later: tuple[int, ...]
    heads: dict[str, Float[np.ndarray, "b l h q"]]
    maps: dict[str, Float[np.ndarray, "b q"]]
    outliers: Bool[np.ndarray, "b p"]


@dataclass(frozen=True)
class Measured:
    """The attention of a run, and of its untreated backbone on the same images (None where they are the same)."""

    run: AttentionQuality
    untreated: AttentionQuality | None


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


def object_iou(maps: Float[Tensor, "*b p"], objects: Float[Tensor, "*b p"]) -> Float[Tensor, "*b"]:
    """Intersection over union, in pixels, of objects and the smallest set of patches that holds 60 % of the map.

    Args:
        objects: as in `object_auroc`.
    """
    ordered, order = maps.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    taken = torch.zeros_like(maps).scatter(-1, order, (before < OBJECT_MASS * ordered.sum(-1, keepdim=True)).to(maps))
    overlap = (taken * objects).sum(-1)
    return overlap / (taken.sum(-1) + objects.sum(-1) - overlap)


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
    found["entropy_share"] = found["entropy"] / np.log(a.shape[-1])
    if not layout.num_registers:
        found["on_registers"] = torch.full_like(on_patches, torch.nan)
    if objects is None:
        objects = torch.full(outliers.shape, torch.nan, device=a.device)
    f = objects.double()[lift]
    found["object_mass"] = (a * f).sum(-1)
    found["object_lift"] = found["object_mass"] / f.mean(-1)
    known = ~f.isnan().any(-1) & (f.sum(-1) > 0)
    for name, measure in (("object_auroc", object_auroc), ("object_iou", object_iou)):
        found[name] = measure(a, f.nan_to_num(0.0))
    return {name: found[name].where(known, torch.nan) if name.startswith("object") else found[name] for name in METRICS}


def later_blocks(depth: int, first: int | None = None) -> list[int]:
    """The blocks from `first` on; by default the later half, which is the same in every run on an architecture.

    Raises:
        ValueError: the first block is out of range.
    """
    first = depth // 2 if first is None else first
    if not 0 <= first < depth:
        raise ValueError(f"first layer {first} is out of range: the model has {depth} blocks (0 to {depth - 1})")
    return list(range(first, depth))


@torch.inference_mode()
def measure_attention(
    subject: Subject,
    batches: Iterable[Float[Tensor, "b 3 h w"]],
    later: Sequence[int],
    objects: Float[np.ndarray, "b p"] | None = None,
) -> Measured:
    """The attention of CLS and registers in every block and head of a run, before and after its registers are added.

    Args:
        batches: normalised images, gone through once; of `Batches` an error names the image, of others its number.
        later: blocks over which maps are averaged.
        objects: share of object pixels by patch of each image; None where the set has no masks.
    Raises:
        ValueError: there are no images, the model has no prefix token, or a block's attention cannot be read.
        BadFeatures: an image's attention or patch norms are NaN or infinite.
    """
    rows = batches.dataset.rows if isinstance(batches, Batches) else None
    device = next(subject.run.model.parameters()).device
    models = [subject.untreated, subject.run] if subject.treated else [subject.run]
    parts: list[list[AttentionQuality]] = [[] for _ in models]
    start = 0
    for images in batches:
        images = images.to(device)
        share = None if objects is None else torch.from_numpy(objects[start : start + len(images)]).to(device)
        outliers = None  # decided by the first, untreated model
        for place, backbone in enumerate(models):
            seen = _attend(backbone.model, images, subject)
            check_finite(backbone.model, images, {"attention": seen.attention, "patch norms": seen.norms}, rows, start)
            outliers = seen.outliers if outliers is None else outliers
            layout = TokenLayout.of(backbone.model)
            heads = qualities(seen.attention, layout, outliers, share)
            mean = seen.attention[:, list(later)].mean((1, 2), keepdim=True)
            maps = qualities(mean, layout, outliers, share)
            parts[place].append(
                AttentionQuality(
                    query_names(layout),
                    tuple(later),
                    {name: values.cpu().numpy() for name, values in heads.items()},
                    {name: values[:, 0, 0].cpu().numpy() for name, values in maps.items()},
                    outliers.cpu().numpy(),
                )
            )
        start += len(images)
    if not start:
        raise ValueError("no images to measure attention on; give at least one batch")
    joined = [_join(of_model) for of_model in parts]
    return Measured(joined[-1], joined[0] if subject.treated else None)


@dataclass(frozen=True)
class _Seen:
    """One forward: attention of the prefix tokens, norms of the patches in the detection layer (0 where there is none),
    and the patches over the threshold."""

    attention: Float[Tensor, "b l h q n"]
    norms: Float[Tensor, "b p"]
    outliers: Bool[Tensor, "b p"]


def _attend(model: nn.Module, images: Float[Tensor, "b 3 h w"], subject: Subject) -> _Seen:
    layout, detection, norms = TokenLayout.of(model), subject.detection, {}
    watched = {} if detection is None else {detection.layer: blocks(model)[detection.layer]}
    see = watch_outputs(watched, lambda layer, x: norms.update({layer: layout.patches(x).float().norm(dim=-1)}))
    with watch_prefix_attention(model) as weights, see:
        model.forward_features(images)
    attention = torch.stack([weights[layer] for layer in sorted(weights)], dim=1)
    if detection is None:
        none = torch.zeros(len(images), attention.shape[-1] - layout.prefix, device=images.device)
        return _Seen(attention, none, none > 0)
    return _Seen(attention, norms[detection.layer], norms[detection.layer] > detection.threshold)


def _join(parts: Sequence[AttentionQuality]) -> AttentionQuality:
    def joined(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([table[name] for table in tables]) for name in METRICS}

    return AttentionQuality(
        parts[0].queries,
        parts[0].later,
        joined([part.heads for part in parts]),
        joined([part.maps for part in parts]),
        np.concatenate([part.outliers for part in parts]),
    )


def object_shares(dataset: Dataset, transform: Transform, patch_size: int) -> Float[np.ndarray, "b p"] | None:
    """Share of each patch's pixels that belong to an object, under the geometry of the backbone's transform.

    Args:
        dataset: whose rows name masks, 0 for background.
        patch_size: pixels a side.
    Returns: nan for images without a mask; None where no image has one.
    Raises:
        ValueError: the transform's size is no multiple of the patch size.
    """
    if not any(row.mask for row in dataset.rows):
        return None
    side, left = divmod(transform.size, patch_size)
    if left:
        raise ValueError(
            f"images of {transform.size} px do not divide into patches of {patch_size} px; change img_size"
        )
    nearest = replace(transform, interpolation="nearest")
    shares = np.full((len(dataset), side**2), np.nan, dtype=np.float32)
    for share, row in zip(shares, dataset.rows, strict=True):
        if row.mask:
            with open_image(dataset.root / row.mask) as mask:
                inside = np.asarray(nearest.crop(mask)) > 0  # class index + 1
            share[:] = inside.reshape(side, patch_size, side, patch_size).mean((1, 3)).ravel()
    return shares


def summary(measured: Measured, seed: int = 0) -> dict:
    """Metrics of the first query's attention, CLS where there is one, for a metrics file, each with its interval over images; None where not defined.

    `heads` is the mean over the later blocks and all heads of each map's metric, `map` the metric of the one map that
    is averaged over them. A run with test-time registers has the same of its untreated backbone under `untreated`, and
    the paired difference, run − untreated, under `change`.
    """
    found = _estimates(_by_image(measured.run), seed)
    found |= {"query": measured.run.queries[0], "later_blocks": list(measured.run.later)}
    found |= {"n": len(measured.run.outliers), "n_with_outliers": int(measured.run.outliers.any(1).sum())}
    if measured.untreated is not None:
        after, before = _by_image(measured.run), _by_image(measured.untreated)
        found["untreated"] = _estimates(before, seed)
        change = {kind: {name: after[kind][name] - before[kind][name] for name in METRICS} for kind in after}
        found["change"] = _estimates(change, seed)
    return found


def _by_image(quality: AttentionQuality) -> dict[str, dict[str, Float[np.ndarray, " b"]]]:
    """One value an image of the first query."""
    later = list(quality.later)
    return {
        "heads": {name: values[..., 0][:, later].mean((1, 2)) for name, values in quality.heads.items()},
        "map": {name: values[:, 0] for name, values in quality.maps.items()},
    }


def _estimates(values: Mapping[str, Mapping[str, np.ndarray]], seed: int) -> dict:
    return {
        kind: {key: v for name in METRICS for key, v in mean_with_interval(name, table[name], seed).items()}
        for kind, table in values.items()
    }


def write_tables(folder: Path, quality: AttentionQuality | None, image_ids: Sequence[str], seed: int = 0) -> None:
    """Writes what the first query attends to, CLS where there is one, and beside it the same of the other prefix tokens.

    - `layers.csv`, `heads.csv`: a row a block (mean over heads), a row a block and head; `registers.csv`: a row a query,
      block and head of the other queries. Each metric has its mean over images and its 95 % bootstrap interval.
    - `images.csv`: a row an image, with the metrics that `heads` of `summary` is the mean of.

    Cells are empty where a metric is not defined. Without a quality (a model that has no prefix token) there are headers only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    estimates = [f"{name}{end}" for name in METRICS for end in ("", "_lo", "_hi")]
    layers, heads, others, images = [], [], [], []
    if quality is not None:
        by_layer = {name: values.mean(2, keepdims=True) for name, values in quality.heads.items()}
        layers = [row[1:2] + row[3:] for row in _rows(quality.queries[:1], by_layer, seed)]
        rows = list(_rows(quality.queries, quality.heads, seed))
        heads = [row[1:] for row in rows if row[0] == quality.queries[0]]
        others = [row for row in rows if row[0] != quality.queries[0]]
        columns = _by_image(quality)["heads"]
        values = zip(image_ids, *(columns[name] for name in METRICS), strict=True)
        images = [[image, *map(cell, row)] for image, *row in values]
    write_table(folder / "layers.csv", ["layer", *estimates], layers)
    write_table(folder / "heads.csv", ["layer", "head", *estimates], heads)
    write_table(folder / "registers.csv", ["query", "layer", "head", *estimates], others)
    write_table(folder / "images.csv", ["image_id", *METRICS], images)


def _rows(
    queries: Sequence[str], tables: Mapping[str, Float[np.ndarray, "b l h q"]], seed: int
) -> Iterator[list[str | int]]:
    """Query, block, head and the estimates of every metric."""
    stacked = np.stack([_means_with_intervals(tables[name], seed) for name in METRICS], axis=-1)
    for q, query in enumerate(queries):
        for layer, head in np.ndindex(stacked.shape[1:3]):
            yield [query, layer, head, *map(cell, stacked[:, layer, head, q].T.ravel())]  # (metric, 3) row by row


def _means_with_intervals(values: Float[np.ndarray, "b ..."], seed: int) -> Float[np.ndarray, "3 ..."]:
    """Mean over images, 2.5 and 97.5 percentile of its bootstrap, of many columns at once; nan left out."""
    flat = values.reshape(len(values), -1)
    there = (~np.isnan(flat)).astype(np.float64)
    draws = np.random.default_rng(seed).integers(len(flat), size=(RESAMPLES, len(flat)))
    times = np.stack([np.bincount(draw, minlength=len(flat)) for draw in draws]).astype(np.float64)  # (resample, b)
    measured = there.any(0)  # columns in which some image has a value
    flat, there = np.nan_to_num(flat[:, measured]), there[:, measured]
    with np.errstate(invalid="ignore"):  # 0 / 0 where a resample draws no image with a value: left out below
        means = times @ flat / (times @ there)
    found = np.full((3, len(measured)), np.nan)
    found[0, measured] = flat.sum(0) / there.sum(0)
    found[1:, measured] = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return found.reshape(3, *values.shape[1:])
