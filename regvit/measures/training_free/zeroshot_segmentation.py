"""Zero-shot segmentation: pixels against class names, by a CLIP model whose image tower is a run's backbone.

By class, with unit embeddings p of patches (`clip_patches`) and w of class names (`zeroshot.class_embeddings`):

    share_c = softmax_c(s · p · w_c),   the largest class where its share is at least t, else background

A class may have several names (`names_of`: split at commas), of which the nearest counts; so may the background, if the
set has one. Shares are upsampled (bilinear) to the mask's own size.

Object against background, as published for ImageNet-Segmentation: the map of the class that the image is taken for, less
the mean over all classes, is upsampled by the patch size, cut at 0 and stretched to [0, 1]; a pixel is object where it is
above the image's mean. Pixel accuracy and the IoU of the two are pooled over images; AP is that of map and 1 − map together,
an image at a time. Deviation: image and mask are squashed to the same square (published: the mask squashed, the image cropped).

Sources: Jiang et al. 2025, arXiv:2506.08010, table 4; Gandelsman et al. 2024, arXiv:2310.05916, and its code; Wang et al. 2023,
arXiv:2312.01597 (background and threshold). Shape letters: b image, p patch, c class, e shared space, n name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from regvit.data.dense_labels import IGNORE
from regvit.measures.dense.dense_heads import on_grid
from regvit.measures.dense.segmentation import count_maps, place_columns
from regvit.measures.training_free.clip_patches import attributions, patch_embeddings
from regvit.stats.bootstrap import mean_over_images
from regvit.stats.figures import Figure
from regvit.stats.miou import Counts, accuracy, image_miou, miou_with_interval

OBJECTS = "objects"
SHOWN = 8  # images whose masks are kept to be drawn


@dataclass(frozen=True)
class Names:
    """Names of the classes of a mask's values, and whose each is.

    Attributes:
        names: of all classes, one after the other.
        owner: mask value of each name; ascending.
    """

    names: tuple[str, ...]
    owner: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, classes: Sequence[str], background: Sequence[str]) -> Names:
        """Args: classes: of the mask values 1, 2, …; names of one class stand between commas. background: of 0, if any."""
        split = [list(background), *([name.strip() for name in one.split(",")] for one in classes)]
        owner = np.repeat(np.arange(len(split)), [len(own) for own in split])
        return cls(tuple(name for own in split for name in own), owner)


@dataclass(frozen=True)
class Texts:
    """What patches are held against.

    Attributes:
        embeddings: unit vectors of the names.
        scale: s of the module's formula.
        threshold: t of it; 0: never background by threshold.
    """

    embeddings: Float[Tensor, "n e"]
    names: Names
    scale: float
    threshold: float


@dataclass(frozen=True)
class Segmented:
    """What was found in the images of a set.

    Attributes:
        counts: by foil; of objects under the one name `objects`.
        first_masks: of the first images, classes found on any grid.
        ap: of objects, by image; empty where classes are sought.
    """

    counts: dict[str, Counts]
    first_masks: list[np.ndarray]
    ap: Float[np.ndarray, " b"]


def segment_classes(
    model: nn.Module,
    projection: nn.Module,
    batches: Iterable[Float[Tensor, "b 3 s s"]],
    texts: Texts,
    foils: Sequence[str],
    mask: Callable[[int], UInt8[np.ndarray, "h w"]],
) -> Segmented:
    """Classes of pixels with each of `clip_patches.FOILS` that is asked for.

    Args:
        mask: of an image by its number.
    """
    parts: dict[str, list[Counts]] = {foil: [] for foil in foils}
    classes, row, first = int(texts.names.owner.max()) + 1, 0, []
    for images in batches:
        truth = [mask(row + i) for i in range(len(images))]
        for foil in foils:
            shares = class_shares(patch_embeddings(model, projection, images, foil), texts)
            parts[foil].append(count_maps(zip(truth, shares, strict=True), classes, shares.shape[-1]))
            first += list(shares.argmax(1).cpu().numpy()) if foil == foils[0] and row < SHOWN else []
        row += len(images)
    return Segmented({foil: joined(own) for foil, own in parts.items()}, first, np.array([]))


def segment_objects(
    model: nn.Module,
    projection: nn.Module,
    batches: Iterable[Float[Tensor, "b 3 s s"]],
    texts: Float[Tensor, "c e"],
    mask: Callable[[int], UInt8[np.ndarray, "h w"]],
) -> Segmented:
    """Object against background; the mask is squashed to the image's square."""
    parts, precision, first = [], [], []
    for images in batches:
        added = attributions(model, projection, images)
        chosen = (added.images @ texts.T).argmax(1).tolist()
        for own, best in zip(added.patches, chosen, strict=True):
            heat = object_map(own, texts, best, images.shape[-1])
            truth = np.asarray(Image.fromarray(mask(len(parts))).resize(heat.shape, Image.Resampling.NEAREST))
            found = objects_of(heat)
            maps = torch.from_numpy(np.stack([~found, found]).astype(np.float32))
            parts.append(count_maps([(np.where(truth == IGNORE, truth, truth > 0), maps)], 2, math.isqrt(len(own))))
            precision.append(object_ap(heat, truth, truth != IGNORE))
            first += [found.astype(np.uint8)] if len(first) < SHOWN else []
    return Segmented({OBJECTS: joined(parts)}, first, np.array(precision))


def figures(found: Segmented, seed: int = 0) -> list[Figure]:
    """mIoU and pixel accuracy of each foil, the mean AP of objects; `miou` is that of the first foil."""
    written = [Figure.of("miou", miou_with_interval(next(iter(found.counts.values())), seed))]
    for foil, counts in found.counts.items():
        written.append(Figure.of(f"miou_{foil}", miou_with_interval(counts, seed)))
        written.append(Figure.of(f"pixel_accuracy_{foil}", accuracy(counts, None, seed)))
    return [*written, *([Figure.of("ap", mean_over_images(found.ap, seed))] if len(found.ap) else [])]


def image_columns(found: Segmented) -> dict[str, np.ndarray]:
    """One value an image, by which runs are paired."""
    columns = {"ap": found.ap} if len(found.ap) else {}
    for foil, counts in found.counts.items():
        everywhere = place_columns(f"pixel_accuracy_{foil}", counts, np.zeros(counts.right.shape, dtype=bool))
        columns |= {name: values for name, values in everywhere.items() if "outliers" not in name}
        columns[f"miou_by_image_{foil}"] = image_miou(counts)
    return columns


def joined(parts: Sequence[Counts]) -> Counts:
    """Counts of several batches as one."""
    return Counts(
        **{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Counts)}
    )


def class_shares(patches: Float[Tensor, "b p e"], texts: Texts) -> Float[Tensor, "b c g g"]:
    """Shares of the mask's values at each patch; where no class reaches the threshold, background gets 1 more."""
    shares = (texts.scale * patches @ texts.embeddings.T).softmax(-1)
    owner = torch.from_numpy(texts.names.owner).to(patches.device)
    count = int(texts.names.owner.max()) + 1
    best = shares.new_zeros(*shares.shape[:2], count)
    best.scatter_reduce_(2, owner.expand_as(shares), shares, "amax")
    best[..., 0] += (best.amax(-1) < texts.threshold).to(best)
    return on_grid(best)


def object_map(
    added: Float[Tensor, "p e"], texts: Float[Tensor, "c e"], chosen: int, size: int
) -> Float[np.ndarray, "s s"]:
    """How much each pixel speaks for one class rather than for all, from 0 to 1.

    Args:
        added: from `clip_patches.attributions`.
        chosen: the class.
        size: pixels a side.
    """
    by_class = added @ texts.T
    heat = on_grid((by_class[:, chosen] - by_class.mean(1))[None, :, None])
    heat = F.interpolate(heat, (size, size), mode="bilinear", align_corners=False)[0, 0].clip(min=0)
    return ((heat - heat.min()) / (heat.max() - heat.min())).nan_to_num(0).double().cpu().numpy()


def objects_of(heat: Float[np.ndarray, "s s"]) -> Bool[np.ndarray, "s s"]:
    """Pixels above the mean."""
    return heat > heat.mean()


def object_ap(heat: Float[np.ndarray, "s s"], truth: UInt8[np.ndarray, "s s"], known: Bool[np.ndarray, "s s"]) -> float:
    """Average precision of object and background together; nan where nothing is known."""
    scores, right = heat[known], truth[known] > 0
    if not len(scores):
        return float("nan")
    return float(average_precision_score(np.concatenate([~right, right]), np.concatenate([1 - scores, scores])))
