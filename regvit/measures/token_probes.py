"""What a single token knows: linear probes from outlier tokens against the same from normal ones.

Darcet et al. 2024 (arXiv:2309.16588, section 2.2) read three things linearly from single tokens: where in the image the
patch lies, what its pixels are, and which class the image has. DINOv2-g there: position top-1 41.7 from normal and 22.8
from outlier tokens, mean distance 0.79 and 5.09, pixel error 18.38 and 25.23; class from one random token 65.8 normal,
69.0 outlier, 86.0 CLS. Tokens here are what readouts get, x in R^d.

**Position and pixels** are learned from all patches of the training images, outliers and normal ones alike, and tested
on each kind. Both have a closed form in sums over tokens, so that no token needs to be kept. With x~ = [x; 1]:

    pixels:    W = (Σ x~ x~' + λ I)^-1 Σ x~ y',   λ = RIDGE * mean diagonal of Σ x~ x~'  (not on the 1)
    position:  linear discriminant, class i a place of the grid with mean m_i, C the covariance within places, ridged:
               score_i = m_i' C^-1 x - m_i' C^-1 m_i / 2      (all places are equally frequent)

A least-squares fit to one-hot places would be closed as well, but places inside the grid are masked by those around.

The class of the image: `token_classes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regvit.features.dense_set import DenseSet, grid_side
from regvit.measures.tables import image_means

RIDGE = 1e-2  # of the mean diagonal: on images held out of a training split better than 1e-4 by a sixth (pixels), a
# quarter (position); tokens of one image resemble each other, so there are fewer of them than it seems
ALIKE = 1e-12  # of the mean square of a token: a variance within places that is nothing but rounding


@dataclass(frozen=True)
class Affine:
    """x -> x W' + b."""

    weight: Float[Tensor, "m d"]
    bias: Float[Tensor, " m"]

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... m"]:
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class PatchProbes:
    """Position and pixels of a patch from its token.

    Args:
        position: scores of the places of the grid, row by row.
        pixels: the patch's normalised pixel values, channel by channel.
        mean_pixels: the mean training patch, the guess of a probe that knows nothing.
    """

    position: Affine
    pixels: Affine
    mean_pixels: Float[Tensor, " m"]


def patch_pixels(images: Float[Tensor, "b 3 h w"], patches: int) -> Float[Tensor, "b p m"]:
    """The normalised pixel values of each patch of a square image, channel by channel.

    Raises:
        ValueError: the images do not divide into so many square patches.
    """
    side = grid_side(patches)
    if images.shape[-1] % side or images.shape[-2] != images.shape[-1]:
        raise ValueError(
            f"images of {images.shape[-1]} x {images.shape[-2]} px do not divide into {side} x {side} patches; "
            "use a square img_size that is a multiple of the patch size"
        )
    size = images.shape[-1] // side
    return F.unfold(images, size, stride=size).mT


def tokens_and_pixels(
    dense: DenseSet, rows: Sequence[int]
) -> Iterator[tuple[Float[Tensor, "b p d"], Float[Tensor, "b p m"]]]:
    """Patch tokens of some images and the pixels under them, a unit of the store at a time, in float64."""
    for own, arrays in dense.batches(rows, "patches"):
        x = arrays["patches"].double()
        yield x, patch_pixels(dense.images(own), x.shape[1]).to(x)


@torch.inference_mode()
def fit_patch_probes(seen: Iterable[tuple[Float[Tensor, "b p d"], Float[Tensor, "b p m"]]]) -> PatchProbes:
    """Learns position and pixels from all patches of the training images, in closed form.

    Args:
        seen: tokens and pixels in float64, gone through once; nothing is kept but sums.
    Raises:
        ValueError: there are fewer than two images, or all are alike (the places would have no covariance).
    """
    images = 0
    for x, y in seen:
        if not images:
            d, device = x.shape[2], x.device
            xx, x_sum = x.new_zeros(d, d), x.new_zeros(x.shape[1:])
            xy, y_sum = x.new_zeros(d, y.shape[2]), x.new_zeros(y.shape[2])
        flat = x.flatten(0, 1)
        xx += flat.T @ flat
        xy += flat.T @ y.flatten(0, 1)
        x_sum += x.sum(0)
        y_sum += y.sum((0, 1))
        images += len(x)
    if images < 2:
        raise ValueError(f"{images} training image(s) cannot teach where a patch lies; give a hundred")
    tokens = images * len(x_sum)
    mean, means = x_sum.sum(0) / tokens, x_sum / images  # (d,), (p, d)
    eye = torch.eye(d, dtype=xx.dtype, device=device)
    # Centring x takes the constant out of the system, which leaves the bias without a penalty.
    centred = xx - tokens * torch.outer(mean, mean)
    ridge = RIDGE * centred.diagonal().mean()
    weight = torch.linalg.solve(centred + ridge * eye, xy - torch.outer(x_sum.sum(0), y_sum / tokens)).T  # (m, d)
    pixels = Affine(weight, y_sum / tokens - weight @ mean)
    within = (xx - images * means.T @ means) / (tokens - len(means))
    if within.trace() <= ALIKE * xx.trace() / tokens:
        raise ValueError(
            f"the tokens of all {images} training images are alike, place by place: they cannot teach where a patch lies; "
            "give images that differ"
        )
    within = within + RIDGE * within.diagonal().mean() * eye
    discriminant = torch.linalg.solve(within, (means - mean).T).T  # (p, d); a shift of all means shifts all scores
    position = Affine(discriminant, -((means + mean) * discriminant).sum(1) / 2)
    return PatchProbes(position, pixels, y_sum / tokens)


@torch.inference_mode()
def read_patches(
    probes: PatchProbes, seen: Iterable[tuple[Float[Tensor, "b p d"], Float[Tensor, "b p m"]]]
) -> dict[str, Float[np.ndarray, "b p"]]:
    """What the probes get right and wrong at every patch of test images, by metric.

    - `position_top1`: the right place has the highest score (1 or 0); `position_distance`: of the place with the highest
      score from the right one, in patches;
    - `pixels_l2`: L2 norm of the error over the patch's normalised pixel values; `pixels_guess_l2` the same for the mean
      training patch as the guess, what a token that knows nothing would give.

    Args:
        seen: tokens and pixels in float64.
    """
    parts: list[dict[str, Tensor]] = []
    for x, y in seen:
        side, places = grid_side(x.shape[1]), torch.arange(x.shape[1], device=x.device)
        guess = probes.position(x).argmax(-1)  # (b, p)
        apart = torch.stack([guess // side - places // side, guess % side - places % side]).double()
        parts.append(
            {
                "position_top1": (guess == places).double(),
                "position_distance": apart.norm(dim=0),
                "pixels_l2": (probes.pixels(x) - y).norm(dim=-1),
                "pixels_guess_l2": (probes.mean_pixels - y).norm(dim=-1),
            }
        )
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def by_kind(
    values: Mapping[str, Float[np.ndarray, "b p"]], outliers: Bool[np.ndarray, "b p"]
) -> dict[str, Float[np.ndarray, " b"]]:
    """Of each metric `_normal`, `_outlier` (means over an image's patches of that kind) and `_difference`, outlier −
    normal within an image: one value an image, nan where it has no such patch."""
    columns = {}
    for name, each in values.items():
        normal, outlier = image_means(each, ~outliers), image_means(each, outliers)
        columns |= {f"{name}_normal": normal, f"{name}_outlier": outlier, f"{name}_difference": outlier - normal}
    return columns


def chance(patches: int) -> dict[str, float]:
    """What position would score at random: top-1, and the mean distance of two places."""
    i, j = np.divmod(np.arange(patches), grid_side(patches))
    apart = np.hypot(i[:, None] - i, j[:, None] - j)
    return {"position_top1_chance": 1 / patches, "position_distance_chance": float(apart.mean())}
