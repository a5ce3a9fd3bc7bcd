"""`average_views`: the mean over the features of n shifted and flipped views of an image, re-aligned on its patches.

A view is shifted by whole patches, up to the share `shift` of a side in either direction, with what lies outside repeated from
the border, and every other one is flipped. Its patches are moved back; of each place the views that show it are averaged:

    y_p = mean over views v that show p of f(view_v)[where p stands in it],   prefix tokens: mean over all views

The first of the n is the image itself. It goes through last, so that what is watched inside the model (norms, attention,
keys) is that of the plain model on the plain image: only the output of `forward_features` is averaged. It changes every
image, and costs n forwards.

Source: the teacher of Chen et al. 2025 (PH-Reg), arXiv:2505.21501, and its code: ten views, shifts up to 0.15 of a side. Their
shifts are drawn for each image and not bound to patches; here they are drawn once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regvit.models.backbones import patch_size
from regvit.models.tokens import TokenLayout
from regvit.registers.cures.given import Given
from regvit.registers.cures.mixins import CureMixin
from regvit.registers.mixed_class import mix


@dataclass(frozen=True)
class View:
    """How the image is seen: `down` and `right` in shares of the largest shift, then flipped or not."""

    down: float
    right: float
    flipped: bool

    def within(self, largest: int) -> tuple[int, int]:
        """The shift in patches."""
        return round(self.down * largest), round(self.right * largest)


class _Averaged(CureMixin):
    """A model that answers with the mean over its views."""

    holds = ("views", "view_shift", "view_layout")

    def forward_features(self, x: Float[Tensor, "b 3 h w"], *args: object, **kwargs: object) -> Float[Tensor, "b n d"]:
        patch, layout = patch_size(self), self.view_layout
        rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
        largest = math.ceil(self.view_shift * min(rows, columns) - 1e-9)
        total = seen = first = 0
        for view in (*self.views, View(0, 0, False)):  # itself last
            down, right = view.within(largest)
            tokens = super().forward_features(_view(x, down * patch, right * patch, view.flipped), *args, **kwargs)
            grid = layout.patches(tokens).float().unflatten(1, (rows, columns))
            grid = grid.flip(2) if view.flipped else grid
            shown = torch.ones_like(grid[:1, :, :, :1])
            total = total + _moved_back(grid, down, right)
            seen = seen + _moved_back(shown, down, right)
            first = first + layout.prefix_tokens(tokens).float()
        mean = torch.cat([first / (1 + len(self.views)), (total / seen).flatten(1, 2)], dim=1)
        return mean.to(tokens.dtype)


def apply(model: nn.Module, given: Given, views: int, shift: float) -> None:
    """Lets the model see `views` views.

    Raises:
        ValueError: the model has no patch embedding with a patch size.
    """
    patch_size(model)
    rng = np.random.default_rng(given.seed)
    drawn = [View(*rng.uniform(-1, 1, size=2).tolist(), flipped=i % 2 == 0) for i in range(views - 1)]
    mix(model, _Averaged, views=tuple(drawn), view_shift=shift, view_layout=TokenLayout.of(model))


def _view(x: Float[Tensor, "b 3 h w"], down: int, right: int, flipped: bool) -> Float[Tensor, "b 3 h w"]:
    """An image moved down and to the right by pixels, then flipped."""
    h, w = x.shape[-2:]
    if down or right:
        x = F.pad(x, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)), mode="replicate")
        x = x[..., max(-down, 0) : max(-down, 0) + h, max(-right, 0) : max(-right, 0) + w]
    return x.flip(-1) if flipped else x


def _moved_back(grid: Float[Tensor, "b i j d"], down: int, right: int) -> Float[Tensor, "b i j d"]:
    """The grid of a view at the places of the image; zero where the view does not show it."""
    rows, columns = grid.shape[1:3]
    kept = grid[:, max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)]
    return F.pad(kept, (0, 0, max(-right, 0), max(right, 0), max(-down, 0), max(down, 0)))
