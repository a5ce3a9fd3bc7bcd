"""Backbones: a timm vision transformer with its weights and its transform, as a folder on disk.

A folder `data/backbones/<name>/` holds

- `weights.safetensors`: the state dict, float32, without a classification head;
- `backbone.json`: `{name, architecture, model_args, transform, weights_sha256, source, licence, planted}`, where
  `weights_sha256` is the digest of that file's bytes and `planted` is null or `{neurons: {layer: [..]}, …}`;
- `replaced.safetensors`, of planted backbones only: the values that planting replaced, under the names of the state
  dict, so that the model before planting comes back exactly;
- `training.csv`, `norms.csv` and `training.png`, of backbones that were trained here (`regvit.training`); `trained` of
  `backbone.json` says how;
- `positions.safetensors`, where the position table was resampled: the one that was trained (`regvit.models.positions`),
  from which other sizes are made; `positions` of `backbone.json` has its digest.

This module is the only caller of `timm.create_model`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypedDict, Unpack

import timm
from safetensors.torch import save_file
from torch import Tensor, nn

from regvit.data.packages import file_sha256
from regvit.data.transform import Transform
from regvit.files import write_atomic, write_text
from regvit.models.backbone_file import DESCRIPTION, KEYS, read_description
from regvit.models.checkpoints import WeightsError, check_finite, read_safetensors
from regvit.models.hooks import blocks, output_projection
from regvit.models.positions import TrainedPositions, set_image_size
from regvit.models.tokens import TokenLayout

WEIGHTS, REPLACED, POSITIONS = "weights.safetensors", "replaced.safetensors", "positions.safetensors"


@dataclass
class Backbone:
    """A backbone that is ready to use.

    Attributes:
        name: as in `params.yaml`.
        model: float32, in eval mode, on the CPU, without gradients.
        transform: what turns an image into its input.
        weights_sha256: of the weights file's bytes, hex.
        planted: `{layer: [neuron, …]}` of the neurons planted on purpose; None where there are none.
        info: the whole of `backbone.json`.
    """

    name: str
    model: nn.Module
    transform: Transform
    weights_sha256: str
    planted: dict[int, list[int]] | None
    info: dict


class Origin(TypedDict):
    """What a backbone is called and where it comes from: the words of `backbone.json`."""

    name: str
    architecture: str
    model_args: Mapping
    source: str
    licence: str


def create(architecture: str, model_args: Mapping | None = None, pretrained: bool = False) -> nn.Module:
    """A timm model in eval mode without gradients.

    Raises:
        ValueError: timm has no such model (the nearest names are given), or it does not take an argument.
    """
    base = architecture.partition(".")[0]
    if not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), n=3, cutoff=0.3)
        raise ValueError(
            f"timm {timm.__version__} has no model {architecture!r}; nearest are {', '.join(near) or 'none'}"
        )
    try:
        model = timm.create_model(architecture, pretrained=pretrained, **(model_args or {}))
    except TypeError as error:
        raise ValueError(
            f"timm's {architecture} does not take the arguments {dict(model_args or {})}: {error}"
        ) from error
    return model.eval().requires_grad_(False)


def save_backbone(
    folder: Path | str,
    model: nn.Module,
    *,
    transform: Transform,
    planted: Mapping | None = None,
    replaced: Mapping[str, Tensor] | None = None,
    trained: Mapping | None = None,
    **origin: Unpack[Origin],
) -> str:
    """Writes a backbone's folder, which is made if it is missing; `backbone.json` comes last.

    Args:
        planted: `{neurons: {layer: [neuron, …]}, …}`, whatever else tells how; None for a model as it was trained.
        replaced: the values before planting, by name in the state dict; given exactly if `planted` is.
        trained: how it was trained here, plain JSON values; None where it was not.
        origin: `name`, `architecture`, `model_args`, `source` and `licence`.
    Returns: the digest of the weights file.
    Raises:
        ValueError: the model has test-time registers, or only one of `planted` and `replaced` is given.
        TypeError: a part of the origin is missing.
        WeightsError: a weight is NaN or infinite; nothing is written.
    """
    folder, name = Path(folder), origin.get("name")
    if missing := sorted(Origin.__required_keys__ - origin.keys()):
        raise TypeError(f"a backbone is saved with its {', '.join(missing)} too")
    if getattr(model, "test_time_registers", None) is not None:
        raise ValueError(
            f"backbone {name!r} has test-time registers; call remove_test_time_registers(model) before saving"
        )
    if (planted is None) != (replaced is None):
        raise ValueError(f"backbone {name!r}: give both planted and replaced, or neither")
    state = _storable(model.state_dict())
    check_finite(state, f"backbone {name!r}")
    _check_replaced(replaced or {}, state, f"backbone {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    _write_weights(state, folder / WEIGHTS)
    (folder / REPLACED).unlink(missing_ok=True)
    if replaced is not None:
        _write_weights(_storable(replaced), folder / REPLACED)
        neurons = {str(layer): sorted(units) for layer, units in sorted(planted["neurons"].items())}
        planted = {**planted, "neurons": neurons}
    digest = file_sha256(folder / WEIGHTS)
    made = {"transform": transform.to_dict(), "weights_sha256": digest, "planted": planted}
    description = {key: ({**origin, **made})[key] for key in KEYS}
    if table := getattr(model, "trained_positions", None):
        _write_weights(_storable({"pos_embed": table.table}), folder / POSITIONS)
        about = {"prefix": table.prefix, "rule": table.rule, "sha256": file_sha256(folder / POSITIONS)}
        description["positions"] = about
    else:
        (folder / POSITIONS).unlink(missing_ok=True)
    if trained is not None:
        description["trained"] = dict(trained)
    description["trained_registers"] = TokenLayout.of(model).trained
    description["mlp_widths"] = [output_projection(block).in_features for block in blocks(model)]
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1, ensure_ascii=False) + "\n")
    return digest


def load_backbone(folder: Path | str) -> Backbone:
    """The backbone of a folder, checked against its digest and loaded strictly.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: `backbone.json` lacks a key, or names an unknown architecture.
        WeightsError: the weights file was changed, does not fit, or holds NaN or infinity.
    """
    return _load(Path(folder), {})


def unplanted(folder: Path | str) -> Backbone:
    """The backbone as it was before planting, exactly; its digest stays that of the folder's weights file.

    Raises:
        ValueError: the backbone is not a planted one; else as `load_backbone`.
    """
    folder = Path(folder)
    if read_description(folder)["planted"] is None:
        raise ValueError(f"{folder} holds a backbone that was not planted; load_backbone gives it as it is")
    backbone = _load(folder, read_safetensors(folder / REPLACED))
    backbone.planted = None
    return backbone


def _load(folder: Path, replaced: Mapping[str, Tensor]) -> Backbone:
    info = read_description(folder)
    weights = folder / WEIGHTS
    state = _verified(weights, info["weights_sha256"])
    _check_replaced(replaced, state, str(folder / REPLACED))
    model = create(info["architecture"], info["model_args"])
    load_strictly(model, {**state, **replaced}, str(weights))
    if about := info.get("positions"):
        table = _verified(folder / POSITIONS, about["sha256"])["pos_embed"]
        model.trained_positions = TrainedPositions(table, about["prefix"], about["rule"])
    planted = info["planted"] and {int(layer): list(units) for layer, units in info["planted"]["neurons"].items()}
    transform = Transform.from_dict(info["transform"])
    _tell_timm(model, transform)
    return Backbone(info["name"], model, transform, info["weights_sha256"], planted or None, info)


def _verified(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file of a backbone's folder, held to the digest in its description."""
    state = read_safetensors(path)
    if (digest := file_sha256(path)) != sha256:
        raise WeightsError(
            f"{path} has SHA-256 {digest}, but {DESCRIPTION} says {sha256}: one of them was changed; run the backbone "
            "stage again"
        )
    return state


def _tell_timm(model: nn.Module, transform: Transform) -> None:
    """Lets the model's own configuration name the transform, for those who ask timm for it."""
    names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    size = {"input_size": (3, transform.size, transform.size)}
    model.pretrained_cfg = model.default_cfg = {
        **model.pretrained_cfg,
        **size,
        **{n: getattr(transform, n) for n in names},
    }


def resized(backbone: Backbone, img_size: int | None) -> Backbone:
    """A copy of the model for images of another size, as dense measurements want it; None leaves it as it is.

    Its position table is resampled from the one that was trained, not from that of the backbone's own size.

    Args:
        img_size: side of the square input, pixels, a multiple of the patch size.
    Raises:
        ValueError: the size is no multiple of the patch size, or the model was built for one size only.
    """
    if img_size is None or img_size == backbone.transform.size:
        return backbone
    patch = patch_size(backbone.model)
    if img_size < patch or img_size % patch:
        low = max(img_size // patch, 1) * patch
        raise ValueError(
            f"img_size {img_size} is not a multiple of the patch size {patch} of backbone {backbone.name}; "
            f"use {low} or {low + patch}"
        )
    if not getattr(backbone.model, "dynamic_img_size", False):
        raise ValueError(
            f"backbone {backbone.name} ({type(backbone.model).__name__}) takes images of {backbone.transform.size} px "
            f"only, not of {img_size}; use img_size: null, or give the backbone itself another img_size"
        )
    model, transform, info = copy.deepcopy(backbone.model), replace(backbone.transform, size=img_size), backbone.info
    if hasattr(model, "set_input_size"):
        set_image_size(model, img_size)
        info = {**info, "model_args": {**info.get("model_args", {}), "img_size": img_size}}
    _tell_timm(model, transform)
    return replace(backbone, model=model, transform=transform, info=info)


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Puts weights into a model; every name and shape must agree and every value be finite.

    Args:
        where: what the message calls the weights.
    Raises:
        WeightsError: names or shapes differ, or a value is NaN or infinite; the tensor is named.
    """
    check_finite(state, where)
    own = model.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        raise WeightsError(
            f"{where} does not fit {type(model).__name__}: missing {_some(missing)}; unexpected {_some(surplus)}; "
            "check that the architecture is the one that the weights were made with"
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise WeightsError(
                f"{where}: {name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}; "
                "check architecture and img_size"
            )
    model.load_state_dict(dict(state), strict=True)


def patch_size(model: nn.Module) -> int:
    """Side of a patch, pixels.

    Raises:
        ValueError: the model has no patch embedding.
    """
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size is None:
        raise ValueError(
            f"{type(model).__name__} has no patch embedding at `.patch_embed`; use a timm vision transformer"
        )
    return size[0] if isinstance(size, tuple) else int(size)


def _write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that others may read: the library makes it private to the user."""
    with write_atomic(path) as beside:
        save_file(dict(state), beside)
        beside.chmod(0o644)


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, floats as float32, each in memory of its own (safetensors refuses shared memory)."""
    return {
        name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().contiguous().clone()
        for name, value in state.items()
    }


def _check_replaced(replaced: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    for name, value in replaced.items():
        if name not in state or state[name].shape != value.shape:
            raise WeightsError(
                f"{where}: replaced tensor {name!r} of shape {tuple(value.shape)} is not one of the model's"
            )


def _some(names: list[str]) -> str:
    """The first names of a list and how many more there are."""
    if not names:
        return "none"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
