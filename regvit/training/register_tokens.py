"""Register tokens added to a timm vision transformer that has none: to be trained, unlike test-time registers.

The new model is timm's own with `reg_tokens=M`, so that it needs no code of ours. Its registers start as N(0, 0.02²) by the
seed, all else as it was. Where the position table has rows for the prefix tokens, the registers' rows are zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.backbones import create, load_strictly
from regvit.models.positions import TrainedPositions
from regvit.models.tokens import TokenLayout

INITIAL = 0.02  # standard deviation, timm's of new tokens; from equal ones, registers would stay equal


def add_register_tokens(
    model: nn.Module, architecture: str, model_args: Mapping, registers: int, seed: int = 0
) -> tuple[nn.Module, dict]:
    """The model with so many registers more, and the arguments that timm makes such a one with.

    Args:
        model: made by timm from `architecture` and `model_args`; left as it is.
        registers: 0 gives the model itself.
        seed: of their first values.
    Raises:
        ValueError: the model has registers already, or timm's class takes no `reg_tokens`.
    """
    if not registers:
        return model, dict(model_args)
    name, layout = type(model).__name__, TokenLayout.of(model)
    if "reg_tokens" not in inspect.signature(type(model).__init__).parameters:
        raise ValueError(
            f"timm's {name} ({architecture}) takes no reg_tokens; train.registers needs a VisionTransformer"
        )
    if layout.num_registers:
        raise ValueError(
            f"{architecture} has {layout.num_registers} registers already; leave train.registers out to train with these"
        )
    args = {**model_args, "reg_tokens": registers}
    new = create(architecture, args)
    state, generator = dict(model.state_dict()), torch.Generator().manual_seed(seed)
    state["reg_token"] = INITIAL * torch.randn(new.reg_token.shape, generator=generator)
    rows = 0 if model.pos_embed is None else new.pos_embed.shape[1] - model.pos_embed.shape[1]
    if rows:
        state["pos_embed"] = _with_rows(state["pos_embed"], layout.prefix, rows)
    load_strictly(new, state, architecture)
    if trained := getattr(model, "trained_positions", None):
        table = _with_rows(trained.table, trained.prefix, rows)
        new.trained_positions = replace(trained, table=table, prefix=trained.prefix + rows)
    return new, args


def positions_were_trained(model: nn.Module) -> None:
    """Has other image sizes start from the table that the model now has, where it remembered an earlier one."""
    if trained := getattr(model, "trained_positions", None):
        model.trained_positions = TrainedPositions(model.pos_embed.detach().clone(), trained.prefix, trained.rule)


def _with_rows(table: Float[Tensor, "1 n d"], after: int, rows: int) -> Float[Tensor, "1 m d"]:
    """A position table with rows of zeros behind those of the prefix tokens."""
    return torch.cat([table[:, :after], table.new_zeros(1, rows, table.shape[2]), table[:, after:]], dim=1)
