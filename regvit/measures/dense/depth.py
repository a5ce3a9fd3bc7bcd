"""Depth by a linear layer on patch tokens, as in DINOv2's linear depth evaluation (arXiv:2304.07193, section 7.4).

    z = W x + b on the patch grid, upsampled by `upsample` (bilinear)                      256 outputs, one a bin
    depth = Σₖ dₖ (relu(zₖ) + ε) / Σₖ (relu(zₖ) + ε),   dₖ = n_bins depths from min_depth to max_depth, evenly spaced
    upsampled (bilinear) to the size of the ground truth

The loss is theirs, of g = log(depth + η) − log(truth + η) over the pixels whose depth is known:

    √(var g + 0.15 (mean g)²)  +  0.5 · Σ over strides 1, 2, 4, 8 of (Σ |∂x g| + Σ |∂y g|) / known pixels

the scale-invariant loss of Eigen et al. (2014) as AdaBins writes it, and MegaDepth's gradient matching. DINOv2 drops
the variance for the first 100 steps; so does this for the first `WARM_UP` of them.
Deviations: those of `regvit.measures.dense.dense_heads`; patch tokens alone, without CLS beside them; while training, ground truth is
compared at `COMPARED` places a patch and axis (the nearest pixels) instead of at every pixel. `upsample` is 4 there; 1 is
sixteen times cheaper.

Errors are means over images of each image's own value, as in BTS, AdaBins and DINOv2 (a pooled RMSE is larger); depth is
in metres. Pixels without ground truth, nearer than `min_depth` or beyond `max_depth` are left out, predictions are
clipped to the same range, and NYU's are read inside the crop of Eigen et al. (2014) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regvit.measures.dense.dense_heads import (
    WARM_UP,
    Batch,
    DenseHeads,
    DenseTraining,
    LinearLayer,
    PatchTokens,
    best_head,
    pixels_of_patches,
    train_heads,
)
from regvit.measures.tables import mean_figures
from regvit.stats.figures import Figure

EPSILON = 0.1  # added to each bin before they are normalised (AdaBins, DINOv2): no sum is 0
ETA = 0.001  # metres, inside logarithms
MEAN_WEIGHT = 0.15  # of the squared mean log error, which makes up the scale; the variance has weight 1
GRADIENT_WEIGHT = 0.5
STRIDES = (1, 2, 4, 8)  # places, of the gradient loss
ERRORS = ("rmse", "rmse_log", "abs_rel", "log10", "silog", "delta1", "delta2", "delta3")
COMPARED = 8  # places; a patch has 14 to 16 pixels a side, and depth is smooth within it by construction
# Rows 45 to 470 and columns 41 to 600 of 480 x 640 pixels: where every NYUd image has valid depth.
CROPS = {"none": (0.0, 0.0, 1.0, 1.0), "eigen": (45 / 480, 41 / 640, 471 / 480, 601 / 640)}


@dataclass(frozen=True)
class DepthBins:
    """Which depths count, in metres, in which part of an image, and how a layer's outputs become depth.

    Attributes:
        crop: `none`, or `eigen` (NYUd; in proportion for images of another size).
        bins: outputs of the layer; they lie evenly from min_depth to max_depth.
        upsample: of the outputs before they become depth.
    """

    min_depth: float = 0.001
    max_depth: float = 10.0
    crop: str = "none"
    bins: int = 256
    upsample: int = 1

    def __post_init__(self):
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(
                f"min_depth {self.min_depth} and max_depth {self.max_depth} do not fit; expected 0 < min_depth < max_depth"
            )
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}; expected one of {', '.join(CROPS)}")
        if self.bins < 2 or self.upsample < 1:
            raise ValueError(f"bins is {self.bins} and upsample {self.upsample}; expected at least 2 and 1")

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
        val_rmse: metres, by (learning rate, weight decay).
    """

    layer: LinearLayer
    bins: DepthBins
    val_rmse: dict[tuple[float, float], float]

    def __call__(self, patches: Float[Tensor, "b p d"], size: tuple[int, int]) -> Float[Tensor, "b h w"]:
        """Depth in metres at every pixel of images of one size."""
        return F.interpolate(_depth_of(self.layer(patches), 1, self.bins), size, mode="bilinear", align_corners=False)[
            :, 0
        ]


@dataclass(frozen=True)
class DepthMeasured:
    """Errors of each image, and their sums in the square of each patch.

    Attributes:
        errors: by name (`ERRORS`), one value an image; nan where no pixel counts.
        squared: Σ error², m².
        relative: Σ |error| / truth.
        counted: pixels.
    """

    errors: dict[str, Float[np.ndarray, " b"]]
    squared: Float[np.ndarray, "b p"]
    relative: Float[np.ndarray, "b p"]
    counted: Int[np.ndarray, "b p"]

    def __len__(self) -> int:
        return len(self.counted)


def train(
    tokens: PatchTokens,
    val: PatchTokens,
    truth: Callable[[int], Float[np.ndarray, "h w"]],
    bins: DepthBins,
    training: DenseTraining,
) -> DepthModel:
    """Trains a head for each learning rate and weight decay, and keeps the one of smallest RMSE on the validation split.

    Args:
        tokens, val: of the training and the validation split.
        truth: depth in metres of a row of the store, 0 where it is not known.
    Raises:
        ValueError: all heads diverged.
    """
    size = COMPARED * tokens.side

    def loss(heads: DenseHeads, batch: Batch[np.ndarray], step: int) -> Float[Tensor, " h"]:
        wanted = torch.from_numpy(np.stack(batch.targets)).to(training.device)  # (b, s, s)
        depth = _depth_of(heads(batch.patches), len(heads), bins)
        maps = F.interpolate(depth, (size, size), mode="bilinear")
        return losses(maps, wanted, only_scale=step < WARM_UP * training.steps)

    heads = train_heads(tokens, lambda row: _nearest(truth(row), bins, size), bins.bins, training, loss)
    models = [DepthModel(heads.layer(head), bins, {}) for head in range(len(heads))]
    rmse = [float(np.nanmean(measure(model, val, truth, training.device).errors["rmse"])) for model in models]
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
) -> DepthMeasured:
    """Errors of every image of `tokens`, in order, at the full size of its ground truth."""
    model = replace(model, layer=model.layer.to(device))
    squares = np.arange(tokens.side**2)
    found: list[dict[str, float]] = []
    squared, relative, counted = [], [], []
    for rows, patches in tokens.in_order():
        for row, one in zip(rows, patches, strict=True):
            wanted = truth(row)
            guess = model(one[None].to(device), wanted.shape)[0].cpu().numpy()
            known = model.bins.known(wanted)
            patch = pixels_of_patches(squares, *wanted.shape)[known]
            guess, wanted = guess[known].clip(model.bins.min_depth, model.bins.max_depth), wanted[known]
            error = guess.astype(np.float64) - wanted
            found.append(errors(guess, wanted))
            squared.append(np.bincount(patch, error**2, len(squares)))
            relative.append(np.bincount(patch, np.abs(error) / wanted, len(squares)))
            counted.append(np.bincount(patch, minlength=len(squares)))
    by_name = {name: np.array([values[name] for values in found]) for name in ERRORS}
    return DepthMeasured(by_name, np.stack(squared), np.stack(relative), np.stack(counted))


def image_columns(measured: DepthMeasured, outliers: Bool[np.ndarray, "b p"]) -> dict[str, Float[np.ndarray, " b"]]:
    """The errors of each image; of its RMSE and relative error also `_at_outliers` and `_elsewhere`, the other patches of
    images that have outliers; nan where there are none.

    Args:
        outliers: patches of the untreated model.
    """
    columns = dict(measured.errors)
    for kind, where in (("at_outliers", outliers), ("elsewhere", ~outliers & outliers.any(1, keepdims=True))):
        counted = (measured.counted * where).sum(1)
        squared, relative = ((v * where).sum(1) / np.maximum(counted, 1) for v in (measured.squared, measured.relative))
        columns[f"rmse_{kind}"] = np.where(counted > 0, np.sqrt(squared), np.nan)
        columns[f"abs_rel_{kind}"] = np.where(counted > 0, relative, np.nan)
    return columns


def figures(
    model: DepthModel, measured: DepthMeasured, outliers: Bool[np.ndarray, "b p"], seed: int = 0
) -> list[Figure]:
    """Means of `image_columns`, and what the validation split chose."""
    return [
        *mean_figures(image_columns(measured, outliers), seed),
        Figure("val_rmse", min(model.val_rmse.values())),
        Figure("learning_rate", model.layer.learning_rate),
        Figure("weight_decay", model.layer.weight_decay),
    ]


def errors(depth: Float[np.ndarray, " n"], truth: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Errors over some pixels, in float64; nan where there is none. Lower is better but for the deltas.

    - `rmse` root mean square error, metres; `rmse_log` the same of natural logarithms;
    - `abs_rel` mean |error| / truth; `log10` mean |log10 error|;
    - `silog` standard deviation of the log error (times 100 in KITTI's tables);
    - `delta1`, `delta2`, `delta3` share of pixels with max(depth / truth, truth / depth) below 1.25, 1.25², 1.25³.
    """
    if not len(truth):
        return dict.fromkeys(ERRORS, float("nan"))
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


def _depth_of(outputs: Float[Tensor, "b hk g g"], n_heads: int, depths: DepthBins) -> Float[Tensor, "b h u u"]:
    """Depth on the grid, upsampled: the mean depth of the bins under the normalised outputs."""
    if depths.upsample > 1:
        outputs = F.interpolate(outputs, scale_factor=depths.upsample, mode="bilinear", align_corners=False)
    weights = outputs.unflatten(1, (n_heads, -1)).relu()  # (b, h, k, u, u)
    count = weights.shape[2]
    bins = torch.linspace(depths.min_depth, depths.max_depth, count, device=outputs.device, dtype=outputs.dtype)
    # EPSILON is added to every bin after the sums: this is the largest tensor of a step, and one pass over it is enough.
    both = torch.stack([bins, torch.ones_like(bins)]) @ weights.flatten(3)  # (b, h, 2, u u)
    total, weight = both.unbind(2)
    return ((total + EPSILON * bins.sum()) / (weight + EPSILON * count)).unflatten(-1, weights.shape[3:])


def _nearest(truth: Float[np.ndarray, "h w"], depths: DepthBins, size: int) -> Float[np.ndarray, "s s"]:
    """Ground truth squashed to a square by taking the nearest pixel; 0 where it does not count."""
    truth = np.where(depths.known(truth), truth, np.float32(0))
    rows, columns = ((np.arange(size) + 0.5) * side / size for side in truth.shape)
    return truth[rows.astype(int)[:, None], columns.astype(int)]


def _gradients(g: Float[Tensor, "b h y x"], known: Bool[Tensor, "b 1 y x"]) -> Float[Tensor, " h"]:
    """Sum of absolute differences of neighbours that are both known, by the number of known pixels."""
    down = ((g[..., 1:, :] - g[..., :-1, :]).abs() * (known[..., 1:, :] & known[..., :-1, :])).sum((0, 2, 3))
    right = ((g[..., 1:] - g[..., :-1]).abs() * (known[..., 1:] & known[..., :-1])).sum((0, 2, 3))
    return (down + right) / known.sum().clamp_min(1)
