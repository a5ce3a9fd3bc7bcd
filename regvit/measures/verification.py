"""What a run does on its own images, for every backbone: outliers left, where CLS looks, norms by block; and, where the
backbone was planted, how far it is from the model before planting.

Outliers are told by the untreated model's detection, and a second time by the run's own norms, as a run may shift them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, nn

from regvit.data.manifest import Dataset
from regvit.data.transform import Transform
from regvit.features.dense_features import Subject, open_subject
from regvit.features.dense_set import as_pictures, load_images
from regvit.measures.feature_colours import fit_palette
from regvit.measures.gallery import Maps, draw_maps, save_strip, tile_colours
from regvit.measures.tables import mean_figures
from regvit.models.attention import cls_rows, watch_prefix_attention
from regvit.models.backbones import Backbone, unplanted
from regvit.models.hooks import blocks, watch_outputs
from regvit.models.tokens import TokenLayout
from regvit.registers.neurons_file import read_neurons
from regvit.registers.outliers import Detection, detect, patch_norms
from regvit.stats.figures import Figure

ROWS = 4  # images of the PNG that has all models in one
SEARCHED = 24  # images, the first, among which those of the PNG are chosen: a few seconds on a CPU
BATCH = 16  # of these at once; nothing that is drawn depends on it
TILE = 224  # pixels a side of an image in the strips, at most


@dataclass(frozen=True)
class Models(Subject):
    """A run beside the models that it is held against.

    Args:
        intact: the backbone before planting; None where nothing was planted.
        later: blocks after the last register neuron, where outliers draw attention; the later half without any.
    """

    intact: Backbone | None
    later: list[int]

    @property
    def threshold(self) -> float:
        """Norm above which a patch is an outlier; infinite where there are none."""
        return np.inf if self.detection is None else self.detection.threshold

    @property
    def layer(self) -> int:
        """Block whose output norms tell outliers, and are drawn."""
        return len(blocks(self.run.model)) - 2 if self.detection is None else self.detection.layer


def open_models(run_file: Path, backbones: Path, neurons: Path, device: str = "cpu") -> Models:
    """The models of a run, all on the device.

    Args:
        run_file: the run's description, `features/runs/<run>.json`.
        backbones: folder that holds one folder a backbone.
        neurons: folder that holds `<backbone>.json`, the result of the search for register neurons.
    Raises:
        ValueError: the backbone is not the one that the run was composed of.
    """
    subject = open_subject(run_file, backbones, device)
    name, intact = subject.run.name, None
    if subject.run.planted:
        intact = unplanted(backbones / name)
        intact.model.to(device)
    selected = read_neurons((neurons / f"{name}.json").read_text()).selected
    depth = len(blocks(subject.run.model))
    first = max(selected) + 1 if selected else depth // 2
    return Models(**vars(subject), intact=intact, later=list(range(min(first, depth - 1), depth)))


@dataclass(frozen=True)
class Outputs:
    """One forward of a batch: last-layer tokens; CLS attention, mean over heads and some blocks (None where there is no
    CLS); and patch norms at every block's output."""

    tokens: Float[Tensor, "b n d"]
    attention: Float[Tensor, "b n"] | None
    norms: Float[Tensor, "l b p"]


@torch.inference_mode()
def run_forward(model: nn.Module, images: Float[Tensor, "b 3 h w"], layers: Sequence[int]) -> Outputs:
    """Args: images: normalised, on the model's device. layers: blocks over which attention is averaged."""
    layout, norms = TokenLayout.of(model), {}
    watched = dict(enumerate(blocks(model)))
    with (
        watch_outputs(watched, lambda layer, x: norms.update({layer: layout.patches(x).float().norm(dim=-1)})),
        watch_prefix_attention(model, list(layers)) if layout.cls else nullcontext({}) as attended,
    ):
        tokens = model.forward_features(images)
    attention = cls_rows(model, attended, layers).mean(0) if layout.cls else None
    return Outputs(tokens, attention, torch.stack([norms[layer] for layer in watched]))


@dataclass(frozen=True)
class Verification:
    """What a run does on some images.

    Args:
        images: one value an image, nan where it is not defined; see `verify`.
        norms: of the patches at every block's output.
        own: layer and threshold of outliers by the run's own norms; None where it has none.
    """

    images: dict[str, Float[np.ndarray, " b"]]
    norms: Float[np.ndarray, "l b p"]
    own: Detection | None


@torch.inference_mode()
def verify(models: Models, batches: Iterable[Float[Tensor, "b 3 h w"]]) -> Verification:
    """Looks at a run, and holds it against the model before planting where there is one. By image:

    - `outlier_fraction`: share of the run's patches over the untreated model's threshold; `own_outlier_fraction`: over a
      threshold found in the run's own norms; `untreated_outlier_fraction`: of the untreated model's patches;
    - `cls_attention_on_registers`, `cls_attention_on_outliers`: CLS attention on registers of either kind, and on the
      patches that are outliers in the untreated model (where the image has some), mean over heads and the blocks after
      the neurons; `intact_attention_on_outliers` the same of the model before planting;
    - cosines to the model before planting, in images that have outliers: `cls_cosine`, `patch_mean_cosine` (of the
      readout), `patch_cosine` (mean over patches) and `outlier_patch_cosine`.

    Args:
        batches: normalised images; gone through once.
    Raises:
        ValueError: there are no images.
    """
    parts: list[dict[str, Tensor]] = []
    norms: list[Tensor] = []
    device, layout = next(models.run.model.parameters()).device, TokenLayout.of(models.run.model)
    for images in batches:
        images = images.to(device)
        ours = run_forward(models.run.model, images, models.later)
        of_layer = ours.norms[models.layer]
        before = of_layer
        if models.untreated is not models.run and models.detection is not None:
            before = torch.from_numpy(patch_norms(models.untreated.model, [images], [models.layer])[0]).to(device)
        outliers = before > models.threshold
        found = {
            "outlier_fraction": (of_layer > models.threshold).double().mean(1),
            "untreated_outlier_fraction": outliers.double().mean(1),
        }
        if ours.attention is not None:
            if layout.num_registers:
                found["cls_attention_on_registers"] = layout.registers(ours.attention[..., None]).sum((1, 2))
            found["cls_attention_on_outliers"] = _on(outliers, layout, ours.attention)
        if models.intact is not None:
            theirs = run_forward(models.intact.model, images, models.later)
            found |= _compare(layout, ours, TokenLayout.of(models.intact.model), theirs, outliers)
        parts.append(found)
        norms.append(ours.norms.cpu())
    if not parts:
        raise ValueError("no images to verify a run on; give at least one batch")
    columns = {name: torch.cat([part[name] for part in parts]).double().cpu().numpy() for name in parts[0]}
    every = torch.cat(norms, dim=1).numpy()
    own = detect(every)
    over = np.zeros(every.shape[1]) if own is None else (every[own.layer] > own.threshold).mean(1)
    return Verification(
        {"outlier_fraction": columns["outlier_fraction"], "own_outlier_fraction": over, **columns}, every, own
    )


def _on(outliers: Bool[Tensor, "b p"], layout: TokenLayout, attention: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Attention on the outliers of each image, nan where it has none."""
    share = (layout.patches(attention[..., None])[..., 0] * outliers).sum(1)
    return torch.where(outliers.any(1), share, torch.nan)


def _compare(
    run: TokenLayout, ours: Outputs, base: TokenLayout, theirs: Outputs, outliers: Bool[Tensor, "b p"]
) -> dict[str, Float[Tensor, " b"]]:
    """A run's tokens held against those of the intact model, in images that have outliers."""
    ours_patches, base_patches = run.patches(ours.tokens), base.patches(theirs.tokens)
    cosine = F.cosine_similarity(ours_patches, base_patches, dim=-1)  # (b, p)
    found = {
        "patch_mean_cosine": F.cosine_similarity(ours_patches.mean(1), base_patches.mean(1), dim=-1),
        "patch_cosine": cosine.mean(1),
        "outlier_patch_cosine": (cosine * outliers).sum(1) / outliers.sum(1).clamp_min(1),
    }
    if run.cls:
        ours_cls, base_cls = run.cls_token(ours.tokens), base.cls_token(theirs.tokens)
        found["cls_cosine"] = F.cosine_similarity(ours_cls, base_cls, dim=-1)
        found["intact_attention_on_outliers"] = _on(outliers, base, theirs.attention)
    return {name: torch.where(outliers.any(1), values, torch.nan) for name, values in found.items()}


def figures(verified: Verification, seed: int = 0) -> list[Figure]:
    """Means over images with their intervals, and how many have outliers in the untreated model."""
    has = verified.images["untreated_outlier_fraction"] > 0
    return [*mean_figures(verified.images, seed), Figure("images_with_outliers", float(has.sum()), n=len(has))]


def norm_table(verified: Verification) -> pd.DataFrame:
    """Quantiles of the run's patch norms, a row a block."""
    quantiles = np.quantile(verified.norms.reshape(len(verified.norms), -1), (0, 0.5, 0.99, 1), axis=1)
    columns = dict(zip(("min", "median", "q99", "max"), quantiles, strict=True))
    return pd.DataFrame({"layer": range(len(verified.norms)), **columns})


def draw_verification(folder: Path, title: str, models: Models, dataset: Dataset, pictures: int) -> None:
    """Writes `maps.png`, norms and CLS attention before planting, before and after registers, whichever the run has; and
    beside it the parts of which the report makes its sliders:

    - `images.jpg`: the images side by side;
    - `<what>-<model>.png`: a map of each image, `what` being `norms`, `attention` (where there is CLS) or `features`,
      and `model` `intact`, `original` or the title. All models of a run are on one scale.

    Features are painted by one palette, fitted on the patches, of all images, that are no outliers in the backbone
    before planting and without test-time registers. It is the same for all runs whose backbones are one before planting,
    so that their colours compare; colours of different backbones do not.

    Args:
        title: of the run's columns.
        dataset: whose images are drawn, at twice the run's image size where the model takes it, so that objects show.
        pictures: how many there are in the strips: the first, the same in every run, as the report lays runs over each
            other. `maps.png` has the four with most outliers in the untreated model, see `most_outliers`.
    """
    transform = models.run.transform
    if getattr(models.run.model, "dynamic_img_size", False):
        transform = replace(transform, size=2 * transform.size)
    columns = {} if models.intact is None else {"intact": models.intact}
    if models.untreated is not models.run:
        columns["original"] = models.untreated
    columns[title] = models.run

    def maps_of(pixels: UInt8[Tensor, "b 3 s s"]) -> dict[str, Maps]:
        images = transform.normalise(pixels.to(next(models.run.model.parameters()).device))
        return {name: token_maps(each.model, images, models.layer, models.later) for name, each in columns.items()}

    chosen = load_images(dataset, transform, most_outliers(models, dataset, transform, ROWS))
    draw_maps(folder / "maps.png", as_pictures(chosen), maps_of(chosen), models.threshold)

    pixels = load_images(dataset, transform, range(min(pictures, len(dataset))))
    maps = maps_of(pixels)
    untreated = maps.get("original", maps[title])
    outliers = untreated.norms > models.threshold
    reference = maps.get("intact", untreated)
    normal = reference.norms <= models.threshold  # the reference's own outliers, not those that were planted
    palette = fit_palette(reference.features[normal if normal.any() else np.ones_like(normal)])
    save_strip(folder / "images.jpg", np.stack([_within(image, TILE) for image in pixels]))
    enlarged = max(1, TILE // outliers.shape[1])
    for (what, name), tiles in tile_colours(maps, palette, outliers, models.threshold).items():
        save_strip(folder / f"{what}-{name}.png", tiles, enlarged)


def token_maps(model: nn.Module, images: Float[Tensor, "b 3 h w"], layer: int, attention_layers: Sequence[int]) -> Maps:
    """Norms in one block's output, CLS attention averaged over blocks, and last-layer tokens, on the patch grid.

    Args:
        images: normalised, on the model's device, square.
    """
    found, layout = run_forward(model, images, attention_layers), TokenLayout.of(model)
    side = round(found.norms.shape[2] ** 0.5)

    def grid(values: Float[Tensor, "b p ..."]) -> np.ndarray:
        return values.unflatten(1, (side, side)).float().cpu().numpy()

    attention = None if found.attention is None else grid(layout.patches(found.attention[..., None])[..., 0])
    return Maps(grid(found.norms[layer]), attention, grid(layout.patches(found.tokens)))


def most_outliers(models: Models, dataset: Dataset, transform: Transform, count: int) -> list[int]:
    """Indices of the images, among the first of a data set, that have most outliers in the untreated model, most first
    and equals in their order; the first images where the model has none.

    Args:
        count: how many, at most.
    """
    among = range(min(SEARCHED, len(dataset)))
    if models.detection is None:
        return list(among[:count])
    device, outliers = next(models.untreated.model.parameters()).device, []
    for start in among[::BATCH]:
        pixels = load_images(dataset, transform, among[start : start + BATCH])
        norms = patch_norms(models.untreated.model, [transform.normalise(pixels.to(device))], [models.layer])
        outliers.append((norms[0] > models.threshold).sum(1))
    return np.argsort(-np.concatenate(outliers), kind="stable")[:count].tolist()


def _within(image: UInt8[Tensor, "3 s s"], side: int) -> Float[np.ndarray, "s s 3"]:
    """An image with values from 0 to 1, made smaller where it is larger than `side`."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture) / 255
