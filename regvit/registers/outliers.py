"""Outlier tokens: patches whose norm leaves the rest behind, with layer and threshold found from the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.hooks import blocks, forward_until, watch_outputs
from regvit.models.tokens import TokenLayout
from regvit.registers.norms import LayerNorms

MAX_FRACTION = 0.10  # more than a tenth of the patches is a population, not outliers
MIN_RATIO = 2.0  # threshold over the layer's median norm; early layers reach 4 without a second mode, but not by Otsu
SMALLEST = np.finfo(np.float32).tiny  # norms are cut off below it before their logarithm is taken


@dataclass(frozen=True)
class Split:
    """Otsu's split of a sample in two: `threshold`, share above it, and between-class share of the variance."""

    threshold: float
    fraction: float
    separation: float


@dataclass(frozen=True)
class Detection:
    """Where and above which norm patches count as outliers.

    Args:
        layer: index of the block whose output norms are compared.
        threshold: L2 norm, in the units of the residual stream.
        separation: between-class share of the variance of the log norms (0 to 1); nan where both were given.
    """

    layer: int
    threshold: float
    separation: float


def otsu(values: np.ndarray) -> Split:
    """The threshold that splits a sample with the largest between-class variance.

    Args:
        values: one-dimensional, at least two of them.
    Source: Otsu 1979, IEEE Trans. SMC 9(1).
    """
    return _splits(LayerNorms.of(np.asarray(values, dtype=np.float64)))[0]


def _splits(cells: LayerNorms) -> list[Split]:
    """Otsu's split, and after it the other local maxima of the between-class variance, largest first: the splits in which
    every value is nearer to the mean of its own class.

    Only a boundary between two cells can split them; each cell stands for its middle.
    """
    n, middles = cells.size, cells.middles
    if n < 2:
        raise ValueError(f"otsu needs at least 2 values, got {n}")
    if len(middles) == 1:
        return [Split(float(cells.highs[0]), 0.0, 0.0)]
    below = np.cumsum(cells.counts)[:-1]
    sums = np.cumsum(cells.counts * middles)
    mean_below, mean_above = sums[:-1] / below, (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) * (mean_below - mean_above) ** 2
    halfway = (mean_below + mean_above) / 2
    local = (middles[:-1] < halfway) & (halfway < middles[1:])
    local[between.argmax()] = True
    variance = np.average((middles - sums[-1] / n) ** 2, weights=cells.counts)
    return [
        Split(
            threshold=float((cells.highs[at] + cells.lows[at + 1]) / 2),
            fraction=float(1 - below[at] / n),
            separation=float(between[at] / n**2 / variance) if variance > 0 else 0.0,
        )
        for at in sorted(np.flatnonzero(local), key=lambda at: -between[at])
    ]


def _log_splits(cells: LayerNorms) -> list[Split]:
    """The splits of the log norms."""
    lows, highs = (np.log(v.clip(min=SMALLEST)).astype(np.float64) for v in (cells.lows, cells.highs))
    return _splits(LayerNorms(lows, highs, cells.counts))


def _cells(norms: LayerNorms | np.ndarray) -> LayerNorms:
    return norms if isinstance(norms, LayerNorms) else LayerNorms.of(norms)


@torch.inference_mode()
def patch_norms(
    model: nn.Module, batches: Iterable[Float[Tensor, "b 3 h w"]], layers: Iterable[int] | None = None
) -> Float[np.ndarray, "l b p"]:
    """L2 norm of every patch token at the output of each block.

    Args:
        batches: normalised images on any device; each is moved to the model's.
        layers: block indices to look at, all by default; the forward stops after the last of them.
    Returns: float32 norms in the order of `layers`; CLS and registers are left out.
    Raises:
        ValueError: there are no images, or a norm is not finite (layer and image are named).
    """
    all_blocks, layout = blocks(model), TokenLayout.of(model)
    wanted = sorted(range(len(all_blocks)) if layers is None else layers)
    found: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    parameter = next(model.parameters())
    with watch_outputs(
        {layer: all_blocks[layer] for layer in wanted},
        lambda layer, out: found[layer].append(layout.patches(out).float().norm(dim=-1).cpu()),
    ):
        for images in batches:
            forward_until(model, images.to(parameter.device, parameter.dtype), all_blocks[wanted[-1]])
    if not found[wanted[-1]]:
        raise ValueError("no images to measure patch norms on; give at least one batch")
    norms = torch.stack([torch.cat(found[layer]) for layer in wanted]).numpy()
    if not np.isfinite(norms).all():
        at, image, _ = (int(i) for i in np.argwhere(~np.isfinite(norms))[0])
        raise ValueError(
            f"patch norms are not finite in layer {wanted[at]} for image {image}; check weights and images"
        )
    return norms


def detect(norms: Sequence[LayerNorms] | Float[np.ndarray, "l b p"]) -> Detection | None:
    """Finds the layer and threshold at which a second, small mode of large patch norms stands apart.

    Each layer but the last (whose norms grow for all tokens) is split by Otsu on log norms; a split counts if the
    upper class holds at most a tenth of the patches and starts at twice the median or more. The layer that
    separates best wins. Where none counts, the patches may be of two kinds, see `_outliers`.

    Args:
        norms: of all patches, or their cells; of binned norms, a threshold lies between two bins.
    Returns: None where no layer has outliers.
    """
    for kinds in (1, 2):
        found = [
            Detection(layer, float(np.exp(split.threshold)), split.separation)
            for layer, values in enumerate(norms[:-1])
            if (split := _outliers(_cells(values), kinds))
        ]
        if found:
            return max(found, key=lambda detection: detection.separation)
    return None


def _outliers(norms: LayerNorms, kinds: int) -> Split | None:
    """The split of a layer's log norms that sets outliers apart.

    Args:
        kinds: of other patches. If 1, it is Otsu's split that may set outliers apart. If 2, they are so many that Otsu's
            split is the one between them: flat areas, say, fill a part of the images, and norms are half as large there.
            Then outliers are set apart by another local maximum of the between-class variance, from twice the median of
            the upper kind on.
    Returns: None where no split is of outliers.
    """
    first, *others = _log_splits(norms)
    if kinds == 2:
        upper = np.log(norms.lows.clip(min=SMALLEST)) > first.threshold
        norms = LayerNorms(norms.lows[upper], norms.highs[upper], norms.counts[upper])
    splits = [first] if kinds == 1 else others
    least = np.log(max(norms.median(), SMALLEST) * MIN_RATIO) if splits else np.inf
    return next((split for split in splits if split.threshold >= least and 0 < split.fraction <= MAX_FRACTION), None)


def settle_detection(
    norms: Sequence[LayerNorms] | Float[np.ndarray, "l b p"],
    threshold: float | None = None,
    layer: int | None = None,
    sigma: float | None = None,
) -> Detection | None:
    """The detection to use: found from the data, or as given.

    Args:
        norms: of all patches, or their cells.
        threshold: norm above which a patch is an outlier; found from the data when None.
        layer: block index, negative ones count from the end; found from the data when None.
        sigma: instead of a threshold: outliers lie this many standard deviations above the layer's mean norm.
    Returns: None where no patch is above the threshold.
    Raises:
        ValueError: the layer is out of range, or a threshold is given without its layer.
    """
    depth = len(norms)
    check_layer(depth, threshold, layer, sigma)
    if layer is None:
        return detect(norms)
    layer %= depth
    if sigma is not None:
        threshold = _cells(norms[layer]).mean() + sigma * _cells(norms[layer]).std()
    if threshold is None:
        cells = _cells(norms[layer])
        split = _outliers(cells, 1) or _outliers(cells, 2) or _log_splits(cells)[0]
        return Detection(layer, float(np.exp(split.threshold)), split.separation)
    return Detection(layer, float(threshold), float("nan")) if _cells(norms[layer]).max() > threshold else None


def check_layer(depth: int, threshold: float | None, layer: int | None, sigma: float | None = None) -> None:
    """Holds a given layer and threshold to a model of `depth` blocks.

    Raises:
        ValueError: the layer is out of range, a threshold or sigma is given without its layer, or both are.
    """
    if threshold is not None and sigma is not None:
        raise ValueError(f"threshold {threshold} and sigma {sigma} exclude each other; leave one out")
    for name, value in (("threshold", threshold), ("sigma", sigma)):
        if layer is None and value is not None:
            raise ValueError(f"{name} {value} needs its layer: norms differ by layer; set layer too (e.g. -2)")
    if layer is not None and not -depth <= layer < depth:
        raise ValueError(
            f"layer {layer} is out of range: the model has {depth} blocks (0 to {depth - 1}, or -{depth} to -1)"
        )
