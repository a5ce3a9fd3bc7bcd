"""Zero-shot classification: images against class names, by a CLIP model whose image tower is a run's backbone.

    w_c = normalise( mean over templates t of normalise(text(t(name_c))) )        (Radford et al. 2021)
    class of an image = argmax_c  normalise(project(image)) . w_c

The image tower is timm's (with or without test-time registers) and ends before the projection, as every backbone here;
text tower, tokenizer and the image tower's projection come from open_clip. Both must be of one checkpoint, and of one
activation (QuickGELU or GELU): `check_same_tower` compares timm's tower with open_clip's own on noise.
Letters: b image, c class, t template, d channel of the backbone, e channel of the space that images and texts share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.data import ImageNetInfo
from torch import Tensor, nn
from tqdm.auto import tqdm

from regvit.data.batches import Batches
from regvit.data.hub_errors import why
from regvit.data.manifest import Row
from regvit.models.backbones import Backbone, load_backbone, unplanted
from regvit.models.nan_check import check_finite
from regvit.stats.accuracy import accuracy, paired_accuracy_difference, top1_correct
from regvit.stats.figures import Figure

TEMPLATES = {
    "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,  # the 80 of the CLIP paper
    "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,  # the seven of them that its authors found to be enough
}
TEXTS_PER_BATCH = 256
SAME_TOWER = 0.99999  # cosine; GELU for QuickGELU or other weights fall below, float32 rounding stays above 0.999999
CHECK_IMAGES = 4


class TextTowerError(ValueError):
    """A text tower that cannot be had, or is not of the backbone's checkpoint; the message gives the cure."""


@dataclass(frozen=True)
class Clip:
    """An open_clip model taken apart.

    Attributes:
        source: as in `params.yaml`.
        label: the same without the folders of a path.
        model: the whole of it, float32, in eval mode, without gradients.
        tokenizer: texts to token indices (t, n).
        projection: from the image tower's pooled feature (b, d) into the shared space (b, e).
        image_size: side of the images that its own image tower takes, pixels.
    """

    source: str
    label: str
    model: nn.Module
    tokenizer: Callable[[list[str]], Int[Tensor, "t n"]]
    projection: nn.Module
    image_size: int

    def to(self, device: str) -> Clip:
        """Itself, moved."""
        self.model.to(device)
        self.projection.to(device)
        return self


class _Matrix(nn.Module):
    """x @ weight, as open_clip's own vision transformer projects."""

    def __init__(self, weight: Float[Tensor, "d e"]):
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        return x @ self.weight


def open_text_tower(source: str) -> Clip:
    """An open_clip model with its weights.

    Args:
        source: `folder:<path>` (a folder with `open_clip_config.json` and weights, as open_clip saves it),
            `file:<model>:<path>` (an open_clip architecture and a checkpoint of plain tensors), or
            `hub:<model>/<tag>` (pretrained weights through open_clip's hub client).
    Raises:
        TextTowerError: the source is not known, its files or weights cannot be had, its activation is not that of the
            weights, or its image tower has no projection that can be taken off.
    """
    kind, _, where = source.partition(":")
    if kind == "folder" and where:
        name, tag = f"local-dir:{where}", None
        if not (Path(where) / "open_clip_config.json").is_file():
            raise TextTowerError(f"{where} has no open_clip_config.json; give a folder that open_clip saved")
        if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in Path(where).iterdir()):
            raise TextTowerError(f"{where} holds no weights (.safetensors, .bin or .pth); put the checkpoint there")
    elif kind == "file" and ":" in where:
        name, _, tag = where.partition(":")
        if not Path(tag).is_file():
            raise TextTowerError(f"{tag} does not exist; give the path of a checkpoint, from the repository's root")
    elif kind == "hub" and "/" in where:
        name, _, tag = where.rpartition("/")
        _check_activation(name, tag)
    else:
        raise TextTowerError(
            f"text tower {source!r} is unknown; use folder:<path>, file:<open_clip model>:<path> or "
            "hub:<open_clip model>/<pretrained tag>"
        )
    try:
        model = open_clip.create_model(name, pretrained=tag, weights_only=True)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ImportError, ValueError) as error:  # what open_clip and its hub client raise
        reason = why(error) if kind == "hub" else f"{str(error).strip().splitlines()[0]}; check the name and the files"
        raise TextTowerError(f"text tower {source} cannot be had: {reason}") from error
    model = model.float().eval().requires_grad_(False)
    size = model.visual.image_size
    label = source if kind == "hub" else f"{source.rpartition(':')[0]}:{Path(source.rpartition(':')[2]).name}"
    projection = _projection(label, model.visual)
    return Clip(source, label, model, tokenizer, projection, size[0] if isinstance(size, tuple) else size)


def _check_activation(name: str, tag: str) -> None:
    """open_clip only warns where weights trained with QuickGELU are asked for in a model with GELU, or the reverse."""
    config, weights = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
    if config is None or not weights:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) if config else "no such model"
        raise TextTowerError(
            f"open_clip has no weights {tag!r} for {name!r} ({known}); see open_clip.list_pretrained()"
        )
    quick = bool(weights.get("quick_gelu", False))
    if quick != bool(config.get("quick_gelu", False)):
        other = f"{name}-quickgelu" if quick else name.removesuffix("-quickgelu")
        raise TextTowerError(
            f"the weights {tag} were trained with {'QuickGELU' if quick else 'GELU'}, which open_clip's {name} does not "
            f"use; say hub:{other}/{tag}"
        )


def _projection(label: str, visual: nn.Module) -> nn.Module:
    """What stands between the image tower's pooled feature and the shared space."""
    if isinstance(visual, open_clip.transformer.VisionTransformer) and visual.attn_pool is None:
        return nn.Identity() if visual.proj is None else _Matrix(visual.proj)
    if isinstance(visual, open_clip.timm_model.TimmModel) and not hasattr(visual.head, "pool"):
        inside = getattr(visual.trunk, "head", None)  # the classifier's place: there where timm_proj is not set
        return nn.Sequential(visual.head, inside) if isinstance(inside, nn.Linear) else visual.head
    raise TextTowerError(
        f"text tower {label}: its image tower ({type(visual).__name__}) pools in a way of its own, which no timm "
        "backbone has; use a CLIP or SigLIP model with a plain vision transformer"
    )


@torch.inference_mode()
def embed_images(
    model: nn.Module,
    projection: nn.Module,
    images: Float[Tensor, "b 3 h w"],
    rows: Sequence[Row] | None = None,
    start: int = 0,
) -> Float[Tensor, "b e"]:
    """Unit vectors of images in the shared space.

    Args:
        model: a backbone without a head.
        images: normalised.
        rows, start: of the images, for errors; see `check_finite`.
    Raises:
        BadFeatures: an image's embedding is NaN or infinite.
    """
    embedding = projection(model(images))
    check_finite(model, images, {"embedding": embedding}, rows, start)
    return F.normalize(embedding, dim=-1)


def open_towers(source: str, folder: Path, device: str) -> tuple[Clip, Backbone, float | None]:
    """An open_clip model, the backbone of its image tower as it stands on disk, and what `check_same_tower` finds.

    Args:
        folder: of the backbone; a planted one is compared as it was before planting.
    Raises:
        TextTowerError: see `open_text_tower` and `check_same_tower`.
    """
    clip, backbone = open_text_tower(source).to(device), load_backbone(folder)
    intact = unplanted(folder) if backbone.planted else backbone
    intact.model.to(device)
    return clip, backbone, check_same_tower(clip, intact)


def check_same_tower(clip: Clip, backbone: Backbone) -> float | None:
    """Compares the backbone with the image tower that came with the text tower, on noise images.

    Args:
        backbone: without test-time registers, as it was before planting; on the same device as `clip`.
    Returns: the smallest cosine of the two embeddings; None where the backbone was made for another image size, so that
        its position table was resampled and the two cannot agree.
    Raises:
        TextTowerError: they disagree, or the projection does not fit.
        BadFeatures: the backbone gives NaN or infinity.
    """
    if backbone.transform.size != clip.image_size:
        return None
    size, device = clip.image_size, next(backbone.model.parameters()).device
    images = torch.randn(CHECK_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        ours = embed_images(backbone.model, clip.projection, images)
    except RuntimeError as error:
        raise TextTowerError(
            f"the projection of {clip.label} does not fit backbone {backbone.name} "
            f"({backbone.model.num_features} channels): {error}; give the text tower of the same checkpoint"
        ) from error
    with torch.inference_mode():
        theirs = clip.model.encode_image(images, normalize=True)
    cosine = float((ours * theirs).sum(-1).min())
    if not cosine >= SAME_TOWER:
        raise TextTowerError(
            f"backbone {backbone.name} and the image tower of {clip.label} disagree (cosine {cosine:.4f}, expected at "
            f"least {SAME_TOWER}): take both from the same checkpoint, and for weights trained with QuickGELU (OpenAI's) "
            "the …_clip_quickgelu_… architecture in timm and the …-quickgelu model in open_clip"
        )
    return cosine


def names_of(classes: Sequence[str]) -> list[str]:
    """Class names as they go into prompts: WordNet ids of ImageNet by open_clip's curated names, `_` as a space.

    Raises:
        ValueError: a class looks like a WordNet id, but is none of ImageNet-1k's.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return [name.replace("_", " ").strip() for name in classes]
    place = {wnid: i for i, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    if strange := [name for name in classes if name not in place]:
        raise ValueError(
            f"class {strange[0]!r} is not one of ImageNet-1k's 1,000 WordNet ids; name its classes in words"
        )
    return [open_clip.IMAGENET_CLASSNAMES[place[name]] for name in classes]


@torch.inference_mode()
def class_embeddings(
    clip: Clip, names: Sequence[str], templates: Sequence[Callable[[str], str]], label: str = "prompts"
) -> Float[Tensor, "c e"]:
    """The prompt ensemble: one unit vector a class, on the model's device.

    Args:
        names: of the classes.
        templates: each makes a prompt of a name.
        label: what the progress line says.
    Raises:
        TextTowerError: the embedding of a class is NaN or infinite.
    """
    device = next(clip.model.parameters()).device
    at_once = max(1, TEXTS_PER_BATCH // len(templates))
    rows = []
    for start in tqdm(range(0, len(names), at_once), label, mininterval=1):
        some = names[start : start + at_once]
        texts = clip.tokenizer([template(name) for name in some for template in templates]).to(device)
        embedded = F.normalize(clip.model.encode_text(texts), dim=-1)  # (c·t, e)
        rows.append(F.normalize(embedded.unflatten(0, (len(some), -1)).mean(1), dim=-1))
    embeddings = torch.cat(rows)
    sound = embeddings.isfinite().all(1)
    if not sound.all():
        name = names[int((~sound).int().argmax())]
        raise TextTowerError(
            f"the text tower of {clip.label} gives NaN or infinity for class {name!r}; get its weights again"
        )
    return embeddings


def classify(
    model: nn.Module,
    projection: nn.Module,
    batches: Iterable[Float[Tensor, "b 3 h w"]],
    classes: Float[Tensor, "c e"],
) -> Float[np.ndarray, "b c"]:
    """Cosine of every image to every class.

    Args:
        model: a backbone, with or without test-time registers.
        batches: normalised images; of `Batches` an error names the image, of others its number.
        classes: from `class_embeddings`.
    Raises:
        BadFeatures: an image's embedding is NaN or infinite.
    """
    device, cosines, start = next(model.parameters()).device, [], 0
    rows = batches.dataset.rows if isinstance(batches, Batches) else None
    for images in batches:
        cosines.append(embed_images(model, projection, images.to(device), rows, start) @ classes.T)
        start += len(images)
    return torch.cat(cosines).float().cpu().numpy()


def among_first(cosines: Float[np.ndarray, "b c"], labels: Int[np.ndarray, " b"], k: int = 5) -> Bool[np.ndarray, " b"]:
    """Whether fewer than `k` classes are nearer to the image than its own; of equal ones the first come first."""
    own = np.take_along_axis(cosines, labels[:, None], axis=1)
    before = np.arange(cosines.shape[1])[None] < labels[:, None]
    return ((cosines > own) | ((cosines == own) & before)).sum(1) < k


def hits(cosines: Float[np.ndarray, "b c"], labels: Int[np.ndarray, " b"]) -> dict[str, Bool[np.ndarray, " b"]]:
    """`top1`, and `top5` where there are more classes than that: whether an image's own class is among the first."""
    found = {"top1": top1_correct(cosines, labels)}
    return found | ({"top5": among_first(cosines, labels)} if cosines.shape[1] > 5 else {})


def figures(columns: Mapping[str, Bool[np.ndarray, " b"]], tower_cosine: float | None) -> list[Figure]:
    """Accuracy by column; `gain` is that of the run over its untreated backbone, paired by image."""
    found = [Figure.of(name, accuracy(values)) for name, values in columns.items()]
    if "untreated_top1" in columns:
        gain = paired_accuracy_difference(columns["top1"], columns["untreated_top1"])
        found.append(Figure("gain", gain.value, gain.lo, gain.hi, gain.n))
    return [*found, Figure("tower_cosine", tower_cosine)]


def class_table(
    names: Sequence[str], labels: Int[np.ndarray, " b"], columns: Mapping[str, Bool[np.ndarray, " b"]]
) -> pd.DataFrame:
    """Accuracy of every class that has images."""
    by_class = pd.DataFrame(columns).groupby(labels)
    table = by_class.mean()
    table.insert(0, "n", by_class.size())
    table.insert(0, "class", np.array(names)[table.index])
    return table
