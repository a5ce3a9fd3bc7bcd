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
    return _split(LayerNorms.of(np.asarray(values, dtype=np.float64)))


def _split(cells: LayerNorms) -> Split:
    """Otsu's split, where only a boundary between two cells can split them; each stands for its middle."""
    n, middles = cells.size, cells.middles
    if n < 2:
        raise ValueError(f"otsu needs at least 2 values, got {n}")
    if len(middles) == 1:
        return Split(float(cells.highs[0]), 0.0, 0.0)
    below = np.cumsum(cells.counts)[:-1]
    sums = np.cumsum(cells.counts * middles)
    mean_below, mean_above = sums[:-1] / below, (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) * (mean_below - mean_above) ** 2
    best = int(between.argmax())
    variance = np.average((middles - sums[-1] / n) ** 2, weights=cells.counts)
    separation = float(between[best] / n**2 / variance) if variance > 0 else 0.0
    return Split(float((cells.highs[best] + cells.lows[best + 1]) / 2), float(1 - below[best] / n), separation)


def _split_logs(norms: LayerNorms | np.ndarray) -> Split:
    """Otsu's split of the log norms."""
    cells = _cells(norms)
    tiny = np.finfo(np.float32).tiny
    lows, highs = (np.log(v.clip(min=tiny)).astype(np.float64) for v in (cells.lows, cells.highs))
    return _split(LayerNorms(lows, highs, cells.counts))


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
    separates best wins.

    Args:
        norms: of all patches, or their cells; of binned norms, a threshold lies between two bins.
    Returns: None where no layer has outliers.
    """
    best = None
    for layer, values in enumerate(norms[:-1]):
        split, median = _split_logs(values), _cells(values).median()
        apart = split.threshold - np.log(max(median, np.finfo(np.float32).tiny)) >= np.log(MIN_RATIO)
        if apart and 0 < split.fraction <= MAX_FRACTION and (best is None or split.separation > best.separation):
            best = Detection(layer, float(np.exp(split.threshold)), split.separation)
    return best


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
        split = _split_logs(norms[layer])
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
