"""Reading weights: only ever as safetensors or by `torch.load(weights_only=True)`, so that no file can execute code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class WeightsError(ValueError):
    """Weights that are missing, damaged, unsafe, or those of another model; the message gives the cure."""


def read_checkpoint(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a user's file: safetensors, or what torch reads with `weights_only=True`.

    A dict under `model` or `state_dict` is unwrapped, and a `module.` before every name (DataParallel) dropped.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is damaged, would have to execute code, or holds something else than tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a weights file, from the repository's root")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what torch's reader raises on bytes that are no checkpoint is of any kind
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{path} cannot be read as plain tensors ({reason}); files that need code to be executed are refused: "
            "save the state dict alone, best as .safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        kinds = (
            sorted({type(v).__name__ for v in content.values()})
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise WeightsError(f"{path} holds {kinds}; expected a dict of name to tensor: save model.state_dict()")
    if strange := [name for name in content if not isinstance(name, str)]:
        raise WeightsError(f"{path} holds a tensor named {strange[0]!r}; expected names that are text: save "
                           "model.state_dict()")  # fmt: skip
    for name, value in content.items():
        if fault := _unusable(value):
            raise WeightsError(f"{path}: {name} is {fault}; save model.state_dict() of the whole model, on the CPU")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the backbone stage, or give the path of a weights file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); make or copy it again") from error


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Refuses weights of which a value is no number.

    Args:
        where: what the message calls the weights.
    Raises:
        WeightsError: a value is NaN or infinite; the tensor is named.
    """
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise WeightsError(
                f"{where}: {name} has {bad} of {value.numel()} values NaN or infinite; get the weights again"
            )


def _unusable(value: Tensor) -> str:
    """Why a tensor of a user's file cannot be a weight, or "". (A view that repeats its numbers may grow to terabytes.)"""
    if value.layout != torch.strided or value.is_nested:
        return "a sparse or nested tensor"
    if value.device.type == "meta":
        return "a meta tensor, which has a shape and no numbers"
    if value.is_quantized or value.is_complex():
        return f"a tensor of {value.dtype}, expected real numbers"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of shape {tuple(value.shape)}, more numbers than the file holds for it"
    return ""
