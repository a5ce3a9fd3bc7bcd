"""Holding a run against the model before planting: how far outliers spoil it, how far test-time registers cure it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, nn

from regvit.data.manifest import Dataset
from regvit.data.transform import Transform
from regvit.files import cell, write_table
from regvit.measures.feature_colours import fit_palette
from regvit.measures.gallery import Maps, as_picture, draw_maps, first_images, save_strip, tile_colours, token_maps
from regvit.models.attention import cls_rows, watch_prefix_attention
from regvit.models.backbones import Backbone, load_backbone, unplanted
from regvit.models.hooks import blocks
from regvit.models.tokens import TokenLayout
from regvit.registers.neurons import read_selected
from regvit.registers.outliers import Detection, patch_norms
from regvit.registers.runs import open_run
from regvit.stats.bootstrap import mean_with_interval

ROWS = 4  # images of the PNG that has all models in one
SEARCHED = 48  # images, the first, among which those of the PNG are chosen: some seconds on a CPU
BATCH = 16  # of these at once; nothing that is drawn depends on it
TILE = 224  # pixels a side of an image in the folder, at most


@dataclass(frozen=True)
class Models:
    """A run beside the models that it is held against.

    Args:
        intact: the backbone before planting; the same object as `untreated` where nothing was planted.
        untreated: the run's backbone without test-time registers.
        run: the run's backbone.
        detection: layer and threshold of outliers in `untreated`; None where it has none.
        later: blocks after the last register neuron, where outliers draw attention; the later half without any.
    """

    intact: Backbone
    untreated: Backbone
    run: Backbone
    detection: Detection | None
    later: list[int]


@dataclass(frozen=True)
class Recovery:
    """One value an image; nan where the image has no outliers in the untreated model.

    Args:
        outlier_fraction: share of patches over the threshold in the run's model (defined for every image).
        cls_cosine: cosine of the last layer's CLS to the intact model's.
        patch_mean_cosine: cosine of the mean of the patches, the readout `patch_mean`.
        patch_cosine: mean cosine of all patches.
        outlier_patch_cosine: mean cosine of the patches that are outliers in the untreated model.
        cls_attention_on_outliers: CLS attention on those patches, mean over heads and the blocks after the neurons.
        cls_attention_on_registers: CLS attention on test-time registers, likewise.
        intact_attention_on_outliers: CLS attention of the intact model on those patches, likewise.
    """

    outlier_fraction: Float[np.ndarray, " b"]
    cls_cosine: Float[np.ndarray, " b"]
    patch_mean_cosine: Float[np.ndarray, " b"]
    patch_cosine: Float[np.ndarray, " b"]
    outlier_patch_cosine: Float[np.ndarray, " b"]
    cls_attention_on_outliers: Float[np.ndarray, " b"]
    cls_attention_on_registers: Float[np.ndarray, " b"]
    intact_attention_on_outliers: Float[np.ndarray, " b"]


@dataclass(frozen=True)
class Verification:
    """A run held against the model before planting.

    Args:
        metrics: for a metrics file.
        images: one value an image; None where there is nothing to compare with, or no outlier.
    """

    metrics: dict
    images: Recovery | None


def open_models(run_file: Path, backbones: Path, neurons: Path, device: str = "cpu") -> Models:
    """The models of a run, all on the device.

    Args:
        run_file: the run's `run.json`.
        backbones: folder that holds one folder a backbone.
        neurons: folder that holds `<backbone>.json`, the result of the search for outliers.
    Raises:
        ValueError: the backbone is not the one that the run was composed of.
    """
    run = open_run(run_file, backbones)
    untreated = load_backbone(backbones / run.name)
    intact = unplanted(backbones / run.name) if untreated.planted else untreated
    for backbone in (intact, untreated, run):
        backbone.model.to(device)
    detection, selected = read_selected((neurons / f"{run.name}.json").read_text())
    depth = len(blocks(run.model))
    first = max(selected) + 1 if selected else depth // 2
    return Models(intact, untreated, run, detection, list(range(min(first, depth - 1), depth)))


def verify(models: Models, batches: Iterable[Float[Tensor, "b 3 h w"]], seed: int = 0) -> Verification:
    """Holds a run against the model before planting, as numbers for a metrics file and for a table of images.

    Args:
        batches: normalised images; gone through several times, and not at all where there is no ground truth.
        seed: of the intervals.
    """
    if not models.untreated.planted:
        why = "the backbone is as it came: there is no ground truth to compare with"
        return Verification({"planted": False, "why": why}, None)
    if models.detection is None:
        return Verification({"planted": True, "why": "the search found no outliers in the planted backbone"}, None)
    outliers = patch_norms(models.untreated.model, batches, [models.detection.layer])[0] > models.detection.threshold
    recovery = compare_with_intact(
        models.run.model, models.intact.model, outliers, models.detection, batches, models.later
    )
    metrics = {"planted": True, "images": len(outliers), "images_with_outliers": int(outliers.any(1).sum())}
    for field, values in vars(recovery).items():
        metrics |= mean_with_interval(field, values, seed)
    return Verification(metrics, recovery)


def write_images(path: Path, image_ids: Sequence[str], recovery: Recovery | None) -> None:
    """Writes a CSV with a row an image and the fields of `Recovery`, by which runs are paired; a cell is empty where its
    value is not defined, and without a recovery there is a header only.

    Raises:
        ValueError: there are not as many identifiers as values.
    """
    fields = list(Recovery.__annotations__)
    columns = [] if recovery is None else [getattr(recovery, field) for field in fields]
    if columns and len(columns[0]) != len(image_ids):
        raise ValueError(f"{len(image_ids)} images and {len(columns[0])} values; give the images that were compared")
    cells = [[cell(value) for value in column] for column in columns]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, ["image_id", *fields], zip(image_ids, *cells, strict=True) if cells else [])


def draw_verification(path: Path, title: str, models: Models, dataset: Dataset, pictures: int) -> None:
    """Writes a PNG of norms and CLS attention before planting, before and after registers, whichever the run has; and
    beside it, in a folder of the same name, the parts of which the report makes its sliders:

    - `images.jpg`: the images side by side;
    - `<what>-<model>.png`: a map of each image, `what` being `norms`, `attention` (where there is CLS) or `features`,
      and `model` `intact`, `original` or the title. All models of a run are on one scale.

    Features are painted by one palette, fitted on the patches, of all images, that are no outliers in the backbone
    before planting and without test-time registers. It is the same for all runs whose backbones are one before planting,
    so that their colours compare; colours of different backbones do not.

    Args:
        title: of the run's columns.
        dataset: whose images are drawn, at twice the run's image size where the model takes it, so that objects show.
        pictures: how many there are in the folder: the first, the same in every run, as the report lays runs over each
            other. The PNG has the four with most outliers in the untreated model, see `most_outliers`.
    """
    transform = models.run.transform
    if getattr(models.run.model, "dynamic_img_size", False):
        transform = replace(transform, size=2 * transform.size)
    device = next(models.run.model.parameters()).device
    columns = {"intact": models.intact} if models.untreated.planted else {}
    if getattr(models.run.model, "test_time_registers", None) is not None:
        columns["original"] = models.untreated
    columns[title] = models.run
    layer = len(blocks(models.run.model)) - 2 if models.detection is None else models.detection.layer
    threshold = np.inf if models.detection is None else models.detection.threshold

    def seen(pixels: UInt8[Tensor, "b 3 s s"]) -> dict[str, Maps]:
        images = transform.normalise(pixels.to(device))
        return {name: token_maps(backbone.model, images, layer, models.later) for name, backbone in columns.items()}

    chosen = most_outliers(models, dataset, transform, ROWS)
    pixels = torch.stack([transform.load(dataset.image_path(i)) for i in chosen])
    draw_maps(path, as_picture(pixels), seen(pixels), threshold)

    pixels = first_images(dataset, transform, pictures)
    maps = seen(pixels)
    folder = path.with_suffix("")
    if folder.is_dir():
        shutil.rmtree(folder)  # a model of an earlier run is not to stay
    untreated = maps.get("original", maps[title])
    outliers = untreated.norms > threshold
    reference = maps.get("intact", untreated)
    normal = reference.norms <= threshold  # the reference's own outliers, not those that were planted
    palette = fit_palette(reference.features[normal if normal.any() else np.ones_like(normal)])
    small = np.stack([_within(image, TILE) for image in pixels])
    save_strip(folder / "images.jpg", small)
    enlarged = max(1, TILE // outliers.shape[1])
    for (what, name), tiles in tile_colours(maps, palette, outliers, threshold).items():
        save_strip(folder / f"{what}-{name}.png", tiles, enlarged)


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
        pixels = torch.stack([transform.load(dataset.image_path(i)) for i in among[start : start + BATCH]])
        norms = patch_norms(models.untreated.model, [transform.normalise(pixels.to(device))], [models.detection.layer])
        outliers.append((norms[0] > models.detection.threshold).sum(1))
    return np.argsort(-np.concatenate(outliers), kind="stable")[:count].tolist()


def _within(image: UInt8[Tensor, "3 s s"], side: int) -> Float[np.ndarray, "s s 3"]:
    """An image with values from 0 to 1, made smaller where it is larger than `side`."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture) / 255


@torch.inference_mode()
def compare_with_intact(
    model: nn.Module,
    intact: nn.Module,
    outliers: Bool[np.ndarray, "b p"],
    detection: Detection,
    batches: Iterable[Float[Tensor, "b 3 h w"]],
    later: list[int],
) -> Recovery:
    """Compares a run's model with the intact one on the same images.

    Args:
        model: the run's model, with or without test-time registers.
        intact: the model before planting.
        outliers: which patches are outliers in the planted, untreated model; from `patch_norms` and its threshold.
        detection: layer and threshold of the untreated model.
        batches: normalised images in the row order of `outliers`; gone through more than once.
        later: blocks over which attention is averaged.
    Raises:
        ValueError: no image has an outlier.
    """
    if not outliers.any():
        raise ValueError(
            f"none of {len(outliers)} images has an outlier in the untreated model, so nothing can be compared"
        )
    run, base = TokenLayout.of(model), TokenLayout.of(intact)
    device = next(model.parameters()).device
    columns: dict[str, list[Tensor]] = {name: [] for name in Recovery.__annotations__ if name != "outlier_fraction"}
    start = 0
    for images in batches:
        images = images.to(device)
        mask = torch.from_numpy(outliers[start : start + len(images)]).to(device)
        start += len(images)
        ours, attention = _tokens_and_attention(model, images, later)
        theirs, before = _tokens_and_attention(intact, images, later)
        patch_cosine = F.cosine_similarity(run.patches(ours), base.patches(theirs), dim=-1)  # (b, p)
        values = {
            "cls_cosine": F.cosine_similarity(run.cls_token(ours), base.cls_token(theirs), dim=-1),
            "patch_mean_cosine": F.cosine_similarity(run.patches(ours).mean(1), base.patches(theirs).mean(1), dim=-1),
            "patch_cosine": patch_cosine.mean(1),
            "outlier_patch_cosine": (patch_cosine * mask).sum(1) / mask.sum(1).clamp_min(1),
        }
        values["cls_attention_on_outliers"] = (run.patches(attention)[..., 0] * mask).sum(1)
        values["cls_attention_on_registers"] = run.test_time_registers(attention)[..., 0].sum(1)
        values["intact_attention_on_outliers"] = (base.patches(before)[..., 0] * mask).sum(1)
        for name, value in values.items():
            columns[name].append(torch.where(mask.any(1), value, torch.nan).cpu())
    fraction = (patch_norms(model, batches, [detection.layer])[0] > detection.threshold).mean(1)
    return Recovery(fraction, **{name: torch.cat(column).numpy() for name, column in columns.items()})


def _tokens_and_attention(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], layers: list[int]
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n 1"]]:
    """Last-layer tokens, and CLS attention averaged over heads and `layers`, from one forward."""
    with watch_prefix_attention(model, layers) as seen:
        tokens = model.forward_features(images)
    return tokens, cls_rows(model, seen, layers).mean(0)[..., None]
