"""Depth by a linear layer on patch tokens, as in DINOv2's linear depth evaluation (arXiv:2304.07193, section 7.4).

    z = W x + b on the patch grid, upsampled by `upsample` (bilinear)                      256 outputs, one a bin
    depth = Σₖ dₖ (relu(zₖ) + ε) / Σₖ (relu(zₖ) + ε),   dₖ = n_bins depths from min_depth to max_depth, evenly spaced
    upsampled (bilinear) to the size of the ground truth

The loss is theirs, of g = log(depth + η) − log(truth + η) over the pixels whose depth is known:

    √(var g + 0.15 (mean g)²)  +  0.5 · Σ over strides 1, 2, 4, 8 of (Σ |∂x g| + Σ |∂y g|) / known pixels

the scale-invariant loss of Eigen et al. (2014) as AdaBins writes it, and MegaDepth's gradient matching. DINOv2 drops
the variance for the first 100 steps; so does this for the first `WARM_UP` of them.
Deviations: those of `regvit.measures.dense`; patch tokens alone, without CLS beside them; while training, ground truth is
compared at `COMPARED` places a patch and axis (the nearest pixels) instead of at every pixel. `upsample` is 4 there; 1 is
sixteen times cheaper.

Errors are means over images of each image's own value, as in BTS, AdaBins and DINOv2 (a pooled RMSE is larger); depth is
in metres. Pixels without ground truth, nearer than `min_depth` or beyond `max_depth` are left out, predictions are
clipped to the same range, and NYU's are read inside the crop of Eigen et al. (2014) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regvit.measures.dense import (
    WARM_UP,
    DenseHeads,
    LinearLayer,
    PatchTokens,
    batches,
    best_head,
    pixels_of_patches,
    statistics,
)
from regvit.stats.bootstrap import mean_with_interval

EPSILON = 0.1  # added to each bin before they are normalised (AdaBins, DINOv2): no sum is 0
ETA = 0.001  # metres, inside logarithms
MEAN_WEIGHT = 0.15  # of the squared mean log error, which makes up the scale; the variance has weight 1
GRADIENT_WEIGHT = 0.5
STRIDES = (1, 2, 4, 8)  # places, of the gradient loss
COMPARED = 8  # places; a patch has 14 to 16 pixels a side, and depth is smooth within it by construction
# Rows 45 to 470 and columns 41 to 600 of 480 x 640 pixels: where every NYUd image has valid depth.
CROPS = {"none": (0.0, 0.0, 1.0, 1.0), "eigen": (45 / 480, 41 / 640, 471 / 480, 601 / 640)}


@dataclass(frozen=True)
class Range:
    """Which depths count, in metres, and in which part of an image.

    Attributes:
        crop: `none`, or `eigen` (NYUd; in proportion for images of another size).
    """

    min_depth: float = 0.001
    max_depth: float = 10.0
    crop: str = "none"

    def __post_init__(self):
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(
                f"min_depth {self.min_depth} and max_depth {self.max_depth} do not fit; expected 0 < min_depth < max_depth"
            )
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}; expected one of {', '.join(CROPS)}")

    def known(self, truth: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
        """The pixels that count."""
        top, left, bottom, right = CROPS[self.crop]
        height, width = truth.shape
        inside = np.zeros(truth.shape, dtype=bool)
        inside[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
        return inside & (truth > self.min_depth) & (truth < self.max_depth)


@dataclass(frozen=True)
class DepthModel:
    """A trained layer with what turns its outputs into depth.

    Attributes:
        layer: takes raw patch tokens; one output a bin.
        range: the bins lie evenly from its min_depth to its max_depth.
        upsample: of the outputs before they become depth.
        val_rmse: metres, by (learning rate, weight decay).
    """

    layer: LinearLayer
    range: Range
    upsample: int
    val_rmse: dict[tuple[float, float], float]

    def __call__(self, patches: Float[Tensor, "b p d"], size: tuple[int, int]) -> Float[Tensor, "b h w"]:
        """Depth in metres at every pixel of images of one size."""
        return F.interpolate(
            _depth_of(self.layer(patches), 1, self.range, self.upsample), size, mode="bilinear", align_corners=False
        )[:, 0]


@dataclass(frozen=True)
class DepthErrors:
    """One value an image; nan where no pixel counts. Lower is better but for the deltas.

    Attributes:
        rmse: root mean square error, metres.
        rmse_log: the same of natural logarithms.
        abs_rel: mean |error| / truth.
        log10: mean |log10 error|.
        silog: standard deviation of the log error (times 100 in KITTI's tables).
        delta1, delta2, delta3: share of pixels with max(depth / truth, truth / depth) below 1.25, 1.25², 1.25³.
    """

    rmse: Float[np.ndarray, " b"]
    rmse_log: Float[np.ndarray, " b"]
    abs_rel: Float[np.ndarray, " b"]
    log10: Float[np.ndarray, " b"]
    silog: Float[np.ndarray, " b"]
    delta1: Float[np.ndarray, " b"]
    delta2: Float[np.ndarray, " b"]
    delta3: Float[np.ndarray, " b"]


@dataclass(frozen=True)
class Measured:
    """Errors of each image, and their sums in the square of each patch.

    Attributes:
        errors: by image.
        squared: Σ error², m².
        relative: Σ |error| / truth.
        counted: pixels.
    """

    errors: DepthErrors
    squared: Float[np.ndarray, "b p"]
    relative: Float[np.ndarray, "b p"]
    counted: Int[np.ndarray, "b p"]

    def __len__(self) -> int:
        return len(self.counted)


def train(
    tokens: PatchTokens,
    val: PatchTokens,
    truth: Callable[[int], Float[np.ndarray, "h w"]],
    depths: Range,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    steps: int,
    batch_size: int,
    seed: int,
    n_bins: int = 256,
    upsample: int = 1,
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] | None = None,
) -> DepthModel:
    """Trains a head for each learning rate and weight decay, and keeps the one of smallest RMSE on the validation split.

    Args:
        tokens, val: of the training and the validation split.
        truth: depth in metres of a row of the store, 0 where it is not known.
        n_bins, upsample: see above.
        on_step: called with 1 after each step.
    Raises:
        ValueError: settings are out of range, or all heads diverged.
    """
    if n_bins < 2 or upsample < 1:
        raise ValueError(f"n_bins is {n_bins} and upsample {upsample}; expected at least 2 and 1")
    size = COMPARED * tokens.side
    heads = DenseHeads(statistics(tokens), n_bins, learning_rates, weight_decays, steps, seed, device)
    nearest = lambda row: _nearest(truth(row), depths, size)  # noqa: E731
    drawn = batches(tokens, nearest, batch_size, np.random.default_rng(seed), device)
    for step in range(steps):
        batch = next(drawn)
        wanted = torch.from_numpy(np.stack(batch.targets)).to(device)  # (b, s, s)
        maps = F.interpolate(
            _depth_of(heads(batch.patches), len(heads), depths, upsample), (size, size), mode="bilinear"
        )
        heads.step(losses(maps, wanted, only_scale=step < WARM_UP * steps))
        if on_step is not None:
            on_step(1)
    models = [DepthModel(heads.layer(head), depths, upsample, {}) for head in range(len(heads))]
    rmse = [float(np.nanmean(measure(model, val, truth, device).errors.rmse)) for model in models]
    best = best_head(heads, rmse, "depth")
    return replace(models[best], val_rmse=dict(zip(heads.settings, rmse, strict=True)))


def losses(
    depth: Float[Tensor, "b h s s"], truth: Float[Tensor, "b s s"], only_scale: bool = False
) -> Float[Tensor, " h"]:
    """Loss of each head over a batch, see above.

    Args:
        depth: of each head, metres.
        truth: metres; 0 where it is not known.
        only_scale: whether the mean log error alone counts, as in the first steps.
    """
    known = (truth > 0)[:, None]  # (b, 1, s, s)
    n = known.sum().clamp_min(2)
    g = torch.where(known, (depth + ETA).log() - (truth[:, None] + ETA).log(), 0.0)
    mean = g.sum((0, 2, 3)) / n
    scale = MEAN_WEIGHT * mean.square()
    gradients = sum(_gradients(g[..., ::s, ::s], known[..., ::s, ::s]) for s in STRIDES)
    if only_scale:
        return (scale + ETA**2).sqrt() + GRADIENT_WEIGHT * gradients  # the root has no gradient at 0
    variance = (torch.where(known, g - mean[:, None, None], 0.0).square().sum((0, 2, 3))) / (n - 1)
    return (variance + scale + ETA**2).sqrt() + GRADIENT_WEIGHT * gradients


@torch.inference_mode()
def measure(
    model: DepthModel,
    tokens: PatchTokens,
    truth: Callable[[int], Float[np.ndarray, "h w"]],
    device: torch.device | str = "cpu",
) -> Measured:
    """Errors of every image of `tokens`, in order, at the full size of its ground truth."""
    model = replace(model, layer=model.layer.to(device))
    squares = np.arange(tokens.side**2)
    found: list[dict[str, float]] = []
    squared, relative, counted = [], [], []
    for rows, patches in tokens.in_order():
        for row, one in zip(rows, patches, strict=True):
            wanted = truth(row)
            guess = model(one[None].to(device), wanted.shape)[0].cpu().numpy()
            known = model.range.known(wanted)
            patch = pixels_of_patches(squares, *wanted.shape)[known]
            guess, wanted = guess[known].clip(model.range.min_depth, model.range.max_depth), wanted[known]
            error = guess.astype(np.float64) - wanted
            found.append(errors(guess, wanted))
            squared.append(np.bincount(patch, error**2, len(squares)))
            relative.append(np.bincount(patch, np.abs(error) / wanted, len(squares)))
            counted.append(np.bincount(patch, minlength=len(squares)))
    by_name = {name: np.array([values[name] for values in found]) for name in DepthErrors.__annotations__}
    return Measured(DepthErrors(**by_name), np.stack(squared), np.stack(relative), np.stack(counted))


def rmse_within(measured: Measured, where: Bool[np.ndarray, "b p"]) -> Float[np.ndarray, " b"]:
    """RMSE of each image over the pixels of some of its patches, metres; nan where there are none."""
    counted = (measured.counted * where).sum(1)
    return np.sqrt(np.where(counted > 0, (measured.squared * where).sum(1) / np.maximum(counted, 1), np.nan))


def abs_rel_within(measured: Measured, where: Bool[np.ndarray, "b p"]) -> Float[np.ndarray, " b"]:
    """Mean relative error of each image over the pixels of some of its patches; nan where there are none."""
    counted = (measured.counted * where).sum(1)
    return np.where(counted > 0, (measured.relative * where).sum(1) / np.maximum(counted, 1), np.nan)


def summary(
    model: DepthModel, measured: Measured, outliers: Bool[np.ndarray, "b p"] | None, seed: int = 0
) -> dict[str, float | int | None]:
    """What goes into the metrics file; values at outliers are None where the untreated model has none."""
    where = np.zeros(measured.counted.shape, dtype=bool) if outliers is None else outliers
    columns = dict(vars(measured.errors))
    elsewhere = ~where & where.any(1, keepdims=True)  # in the same images
    for name, within in (("rmse", rmse_within), ("abs_rel", abs_rel_within)):
        columns |= {f"{name}_at_outliers": within(measured, where), f"{name}_elsewhere": within(measured, elsewhere)}
    metrics: dict[str, float | int | None] = {"n": len(measured), "n_with_outliers": int(where.any(1).sum())}
    for name, values in columns.items():
        metrics |= mean_with_interval(name, values, seed)
    return metrics | {
        "val_rmse": round(min(model.val_rmse.values()), 6),
        "learning_rate": model.layer.learning_rate,
        "weight_decay": model.layer.weight_decay,
    }


def errors(depth: Float[np.ndarray, " n"], truth: Float[np.ndarray, " n"]) -> dict[str, float]:
    """The errors of `DepthErrors` over some pixels, in float64; nan where there is none."""
    if not len(truth):
        return dict.fromkeys(DepthErrors.__annotations__, float("nan"))
    depth, truth = depth.astype(np.float64), truth.astype(np.float64)
    log = np.log(depth) - np.log(truth)
    ratio = np.maximum(depth / truth, truth / depth)
    return {
        "rmse": float(np.sqrt(np.mean((depth - truth) ** 2))),
        "rmse_log": float(np.sqrt(np.mean(log**2))),
        "abs_rel": float(np.mean(np.abs(depth - truth) / truth)),
        "log10": float(np.mean(np.abs(log)) / np.log(10)),
        "silog": float(np.std(log)),
        **{f"delta{i}": float(np.mean(ratio < 1.25**i)) for i in (1, 2, 3)},
    }


def _depth_of(
    outputs: Float[Tensor, "b hk g g"], n_heads: int, depths: Range, upsample: int
) -> Float[Tensor, "b h u u"]:
    """Depth on the grid, upsampled: the mean depth of the bins under the normalised outputs."""
    if upsample > 1:
        outputs = F.interpolate(outputs, scale_factor=upsample, mode="bilinear", align_corners=False)
    weights = outputs.unflatten(1, (n_heads, -1)).relu()  # (b, h, k, u, u)
    count = weights.shape[2]
    bins = torch.linspace(depths.min_depth, depths.max_depth, count, device=outputs.device, dtype=outputs.dtype)
    # EPSILON is added to every bin after the sums: this is the largest tensor of a step, and one pass over it is enough.
    both = torch.stack([bins, torch.ones_like(bins)]) @ weights.flatten(3)  # (b, h, 2, u u)
    total, weight = both.unbind(2)
    return ((total + EPSILON * bins.sum()) / (weight + EPSILON * count)).unflatten(-1, weights.shape[3:])


def _nearest(truth: Float[np.ndarray, "h w"], depths: Range, size: int) -> Float[np.ndarray, "s s"]:
    """Ground truth squashed to a square by taking the nearest pixel; 0 where it does not count."""
    truth = np.where(depths.known(truth), truth, np.float32(0))
    rows, columns = ((np.arange(size) + 0.5) * side / size for side in truth.shape)
    return truth[rows.astype(int)[:, None], columns.astype(int)]


def _gradients(g: Float[Tensor, "b h y x"], known: Bool[Tensor, "b 1 y x"]) -> Float[Tensor, " h"]:
    """Sum of absolute differences of neighbours that are both known, by the number of known pixels."""
    down = ((g[..., 1:, :] - g[..., :-1, :]).abs() * (known[..., 1:, :] & known[..., :-1, :])).sum((0, 2, 3))
    right = ((g[..., 1:] - g[..., :-1]).abs() * (known[..., 1:] & known[..., :-1])).sum((0, 2, 3))
    return (down + right) / known.sum().clamp_min(1)
