"""The device that a command computes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regvit.cli.errors import WrongInput

if TYPE_CHECKING:
    import torch

    from regvit.models.backbones import Backbone


def named_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one."""
    import torch  # why here and not above: see cli.py

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    known = ("cpu", "cuda", *(["mps"] if torch.backends.mps.is_available() else []))
    if device is None or device.type not in known:
        raise WrongInput(f"--device {name} is unknown; use auto, {', '.join(known)} or cuda:<n>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WrongInput(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s); use auto or cpu")
    return device


def device_of(backbone: Backbone) -> torch.device:
    """Where a backbone's weights lie."""
    return next(backbone.model.parameters()).device
