"""Seeds and amplifiers: what each planted unit listens to, when it fires, and what it writes.

- **Seeds** fire on low-information patches, and write a little along a direction d.
- **Amplifiers**, in a later block, fire on what the seeds wrote, and write the large norm along d.

Notation as in `regvit.registers.planting.plant`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regvit.models.hooks import residual_scale
from regvit.models.tokens import TokenLayout

ACTIVATION = 8.0  # mean activation of a planted unit where it fires; below 3, GELU's negative lobe reaches all tokens
LDA_RIDGE = 0.05  # of the mean variance, added to covariances before they are inverted
SEED_SPREAD = 0.2  # how far the last seed's direction is turned from the first's
PREFIX_WEIGHT = 8  # how often prefix tokens count among the tokens on which amplifiers must not fire
QUIET = 0.999  # quantile of the tokens left alone that must stay under an amplifier's threshold


@dataclass(frozen=True)
class Writers:
    """Units of one block that are to be overwritten, and what they write together: `size` along `direction`, unit length."""

    block: nn.Module
    units: list[int]
    size: float
    direction: Float[Tensor, " d"]

    @property
    def write(self) -> Float[Tensor, " d"]:
        """What each of them adds to the residual stream where it fires."""
        return self.size / len(self.units) * self.direction


def write_seeds(
    seeds: Writers,
    base: Float[Tensor, " d"],
    hidden: Float[Tensor, "b n d"],
    layout: TokenLayout,
    fraction: float,
    seed: int,
) -> Bool[Tensor, "b p"]:
    """Writes the seeds; returns the patches on which the first of them fires.

    Args:
        base: what separates the patches of least information from the others; the seeds' directions lie around it.
        hidden: input of the block's `mlp.fc1`.
        fraction: of all patches, on which a seed fires, and on not one prefix token.
        seed: of the small differences between seeds.
    Raises:
        ValueError: no patch stands out.
    """
    h, prefix = layout.patches(hidden), layout.prefix_tokens(hidden)
    generator = torch.Generator().manual_seed(seed)
    hot = None
    for i, unit in enumerate(seeds.units):
        noise = F.normalize(torch.randn(len(base), generator=generator).to(base), dim=0)
        probe = F.normalize(base + SEED_SPREAD * i / len(seeds.units) * noise, dim=0)
        projected = h @ probe
        threshold = _quantile(projected, 1 - fraction)
        if layout.prefix:
            threshold = max(threshold, (prefix @ probe).max().item())
        hot = projected > threshold if hot is None else hot
        if not (projected[hot] > threshold).any():
            raise ValueError(
                "no patch stands out as one of low information, so that seeds would never fire; "
                "give images with flat regions, a larger fraction or another seed_layer"
            )
        write_unit(seeds.block, unit, probe, threshold, h[hot], seeds.write)
    return hot


def write_amplifiers(
    amplifiers: Writers, hidden: Float[Tensor, "b n d"], hot: Bool[Tensor, "b p"], layout: TokenLayout
) -> None:
    """Writes the amplifiers; thresholds lie 0.4 to 0.5 of the way up from other tokens to the seeds' patches.

    Args:
        hidden: input of the block's `mlp.fc1` in the model with its seeds.
        hot: the seeds' patches.
    Raises:
        ValueError: the seeds' patches cannot be told from the others.
    """
    probe, cold, warm = _amplifier_probe(hidden, hot, layout)
    h = layout.patches(hidden).flatten(0, 1)
    for i, unit in enumerate(amplifiers.units):
        threshold = cold + (0.4 + 0.1 * i / len(amplifiers.units)) * (warm - cold)
        write_unit(amplifiers.block, unit, probe, threshold, h[h @ probe > threshold], amplifiers.write)


@torch.no_grad()
def write_unit(
    block: nn.Module,
    unit: int,
    probe: Float[Tensor, " d"],
    threshold: float,
    hot: Float[Tensor, "n d"],
    write: Float[Tensor, " d"],
) -> None:
    """Overwrites an MLP unit with one that fires where probe . h > threshold.

    Its pre-activation is k (probe . h - threshold), with k such that the mean over `hot` of its positive part is
    ACTIVATION; there it adds, on average, `write` to the residual stream (LayerScale g is divided out):

        W1[u] = k probe,   b1[u] = -k threshold,   W2[:, u] = write / (ACTIVATION g)
    """
    k = ACTIVATION / (hot @ probe - threshold).clamp_min(0).mean()
    block.mlp.fc1.weight[unit], block.mlp.fc1.bias[unit] = k * probe, -k * threshold
    block.mlp.fc2.weight[:, unit] = write / (ACTIVATION * residual_scale(block))


def within_image_direction(
    h: Float[Tensor, "b p d"],
    chosen: Bool[Tensor, "b p"],
    prefix: Float[Tensor, "b r d"],
    unseen: Float[Tensor, "m d"],
) -> Float[Tensor, " d"]:
    """Linear discriminant of chosen patches against their image's mean, indifferent to what tells images apart.

        f = C^-1 m,   m = E[h - mean_image(h) | chosen],   C = cov(within images) + 10 cov(image means) + ridge

    then freed of the directions e from the mean patch to each mean prefix token, and of those in `unseen`:
    f - C^-1 e (e' C^-1 e)^-1 e' f.
    """
    means = h.mean(1)
    within = h - means[:, None]
    c = _ridged(torch.cov(within.flatten(0, 1).T) + 10 * torch.cov(means.T))
    f = torch.linalg.solve(c, within[chosen].mean(0))
    e = torch.cat([prefix.mean(0) - h.mean((0, 1)), unseen])  # (r + m, d)
    if len(e):
        g = torch.linalg.solve(c, e.T)
        f = f - g @ torch.linalg.solve(e @ g, e @ f)
    return F.normalize(f, dim=0)


def _amplifier_probe(
    hidden: Float[Tensor, "b n d"], hot: Bool[Tensor, "b p"], layout: TokenLayout
) -> tuple[Float[Tensor, " d"], float, float]:
    """Linear discriminant of the seeds' patches against all other tokens; and where those and these lie along it."""
    h, prefix = layout.patches(hidden), layout.prefix_tokens(hidden).flatten(0, 1)
    others = torch.cat([h[~hot], *[prefix] * PREFIX_WEIGHT])
    difference = h[hot].mean(0) - others.mean(0)
    probe = F.normalize(torch.linalg.solve(_ridged(torch.cov(others.T)), difference), dim=0)
    cold = _quantile(h[~hot] @ probe, QUIET)
    if layout.prefix:
        cold = max(cold, (prefix @ probe).max().item())
    warm = (h[hot] @ probe).median().item()
    if warm <= cold:
        raise ValueError(
            "amplifiers cannot tell the seeds' patches from the others; set amplifier_layer right after seed_layer, "
            "or give more images"
        )
    return probe, cold, warm


def _ridged(c: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """A covariance that can be inverted."""
    return c + LDA_RIDGE * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)


def _quantile(values: Tensor, q: float) -> float:
    """Linear quantile of any number of values (torch.quantile takes 16 million at most)."""
    return float(np.quantile(values.numpy(), q))
