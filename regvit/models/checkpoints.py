"""Reading weights: only ever as safetensors or by `torch.load(weights_only=True)`, so that no file can execute code.

A checkpoint may be a file, a folder of Hugging Face, or the index of shards. In it, the weights of one vision transformer
are looked for: in the containers and behind the prefixes that training code puts around them. Averaged weights (EMA, or a
teacher) are taken where there are any, since they are what is evaluated.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from regvit.models.checkpoint_files import WeightsError, checkpoint_files, files_sha256

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")
CONTAINERS = (*AVERAGED, "state_dict", "model_state_dict", "model", "module", "student", "net", "backbone", "weights")
PATCH_EMBEDDINGS = {  # the weight by which a transformer is known, without what stands before it -> whose names these are
    "patch_embed.proj.weight": "timm",
    "embeddings.patch_embeddings.projection.weight": "transformers",
    "embeddings.patch_embedding.weight": "transformers CLIP",
    "visual.conv1.weight": "CLIP",
    "embeds.proj.weight": "timm",
}
PLAIN_OBJECTS = [argparse.Namespace]  # holds attributes and has no code of its own; DeiT's and MAE's files have one


class Checkpoint(NamedTuple):
    """The weights of one transformer.

    Args:
        tensors: by name, without prefixes.
        names: whose names these are, see `PATCH_EMBEDDINGS`; "" where no transformer was recognised.
        taken: where in the file they stood: containers and prefix, as in "state_dict_ema: module."; may be empty.
        sha256: digest of the file, or of its shards' digests.
    """

    tensors: dict[str, Tensor]
    names: str
    taken: str
    sha256: str


def read_checkpoint(path: Path | str) -> Checkpoint:
    """The weights of a user's file or folder.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        WeightsError: the file is damaged, would have to execute code, or holds something else than tensors.
    """
    files = checkpoint_files(path)
    contents = [_read(file) for file in files]
    content, containers = _unwrapped(contents[0]) if len(files) == 1 else (_merged(contents), [])
    _check_tensors(content, files[0])
    prefix, names = _transformer(content, files[0])
    if names:
        content = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    taken = ": ".join([*containers, *([prefix] if prefix else [])])
    return Checkpoint(content, names, taken, files_sha256(files))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged.
    """
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


def _read(path: Path) -> object:
    """What a file holds."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        with torch.serialization.safe_globals(PLAIN_OBJECTS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what torch's reader raises on bytes that are no checkpoint is of any kind
        raise WeightsError(
            f"{path} cannot be read as plain tensors ({_reason(error)}); files that need code to be executed are refused: "
            "save the state dict alone, best as .safetensors"
        ) from error


def _reason(error: Exception) -> str:
    """Why torch could not read a file, in a few words: its own advice, in colours, is to execute what the file says."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if code := re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"Unsupported class ([\w.]+)", text):
        return f"it needs the code of {code[1]}"
    return (text.splitlines() or [type(error).__name__])[0].partition("weights_only")[0].strip() or type(error).__name__


def _merged(contents: list[dict]) -> dict:
    return {name: value for content in contents for name, value in content.items()}


def _unwrapped(content: object) -> tuple[object, list[str]]:
    """What is inside of the containers, and their names."""
    inside: list[str] = []
    while isinstance(content, dict):
        name = next((name for name in CONTAINERS if isinstance(content.get(name), dict) and content[name]), None)
        if name is None:
            break
        content = content[name]
        inside.append(name)
    return content, inside


def _check_tensors(content: object, path: Path) -> None:
    """Refuses what is no state dict, and tensors that cannot be weights."""
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        kinds = (
            sorted({type(v).__name__ for v in content.values()})
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise WeightsError(f"{path} holds {kinds}; expected a dict of name to tensor: save model.state_dict()")
    for name, value in content.items():
        if not isinstance(name, str):
            raise WeightsError(
                f"{path} holds a tensor named {name!r}; expected names that are text: save model.state_dict()"
            )
        if fault := _unusable(value):
            raise WeightsError(f"{path}: {name} is {fault}; save model.state_dict() of the whole model, on the CPU")


def _transformer(content: Mapping[str, Tensor], path: Path) -> tuple[str, str]:
    """What stands before the names of the one vision transformer, and whose names these are; "" twice where none is known."""
    known = []
    for name in content:
        for embedding, names in PATCH_EMBEDDINGS.items():
            prefix = name.removesuffix(embedding)
            if prefix != name and (not prefix or prefix.endswith(".")):
                known.append((prefix, names))
                break
    averaged = [one for one in known if re.search(r"(^|[._])(ema|teacher)", one[0])]
    chosen = averaged or known
    if len(chosen) > 1:
        raise WeightsError(
            f"{path} holds {len(chosen)} vision transformers, under {', '.join(repr(prefix) for prefix, _ in chosen)}; "
            "save the state dict of the one that is meant"
        )
    return chosen[0] if chosen else ("", "")


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
