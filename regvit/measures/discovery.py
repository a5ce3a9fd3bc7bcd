"""Object discovery without labels: LOST on patch features, and the attention mask that it is held against.

LOST, for the features F (p, d) of one image's patches:

    A      = F Fᵀ + bias · s                s = 1 where F is L2-normalised, else the median of the diagonal of F Fᵀ
    degree = number of other patches with A > 0
    seed   = patch of the lowest degree; of equal ones the first in reading order
    S      = those of the k patches of lowest degree (ties in reading order) with A[seed] > 0, and the seed itself
    mask   = patches with Σ_{s in S} A[s] > 0, and the seed itself
    box    = around the connected component (four neighbours) of the mask that holds the seed

With bias 0 this is the published code, but for two things: it sorts equal degrees in no fixed order, and it raises where
the seed is not in its own mask, which a bias can bring about (an isolated seed); here the box is then the seed's patch.
The bias makes up for features that are all positively correlated. It is swept over [−1, 0]; measured by s, it means the
same whether features are normalised or not (published: only absolute values, chosen by hand for each model).

Sources: Siméoni et al. 2021, arXiv:2109.14279, and its code; bias, kinds of feature and layers: Darcet et al. 2024,
arXiv:2309.16588, appendix. Shape letters: b image, p patch, d channel, h head, s setting, i row and j column of a grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor, nn

from regvit.data.batches import Batches
from regvit.data.decoding import original_size
from regvit.data.manifest import Row
from regvit.data.whole_images import WholeTransform, valid_patches
from regvit.models.attention import watch_prefix_attention
from regvit.models.hooks import blocks
from regvit.models.nan_check import check_finite
from regvit.models.token_features import Feature, watch_patch_features
from regvit.models.tokens import TokenLayout
from regvit.stats.boxes import HIT, best_iou, true_boxes

K_PATCHES = 100  # patches of lowest degree that may join the seed; the paper's value
MASS = 0.6  # share of the CLS attention that the mask of `attention_boxes` keeps; the value of DINO's code
# Four neighbours within an image of a stack of images, none between images.
IN_PLANE = np.stack([np.zeros((3, 3)), ndimage.generate_binary_structure(2, 1), np.zeros((3, 3))]).astype(int)


class Setting(NamedTuple):
    """How LOST is run: on which feature, L2-normalised or not, with which bias."""

    feature: Feature
    normalised: bool
    bias: float


@dataclass(frozen=True)
class Found:
    """What was found in each image of a batch, on the patch grid.

    Attributes:
        boxes: [x0, y0, x1, y1] in patches, x1 and y1 exclusive.
        masks: the connected component that the box is drawn around.
        seeds: index of the seed patch in reading order; of `attention_boxes` the patch of largest attention.
        isolated: True where no other patch is positively correlated with the seed.
    """

    boxes: Int[np.ndarray, "b 4"]
    masks: Bool[np.ndarray, "b i j"]
    seeds: Int[np.ndarray, " b"]
    isolated: Bool[np.ndarray, " b"]


def settings(features: Iterable[Feature], normalised: Iterable[bool], biases: Iterable[float]) -> tuple[Setting, ...]:
    """Every combination, in the order given; the settings of one feature stand together."""
    return tuple(Setting(*one) for one in product(features, tuple(normalised), tuple(biases)))


def similarity(features: Float[Tensor, "b p d"], normalised: bool) -> Float[Tensor, "b p p"]:
    """F Fᵀ of each image divided by its s (see the module), so that a bias of −1 takes a typical patch's own away.

    Dividing by a positive number changes no sign, so that with bias 0 nothing depends on it.
    """
    features = features.float()
    if normalised:
        features = F.normalize(features, dim=-1)
        return features @ features.mT
    gram = features @ features.mT
    own = gram.diagonal(dim1=1, dim2=2).median(dim=1).values.clamp_min(torch.finfo(gram.dtype).tiny)
    return gram / own[:, None, None]


def lost(
    similarities: Float[Tensor, "b p p"],
    grid: tuple[int, int],
    bias: float = 0.0,
    k_patches: int = K_PATCHES,
    valid: Bool[Tensor, "b p"] | None = None,
) -> Found:
    """LOST on a batch of images, on the device of the similarities; only the masks are labelled on the CPU.

    Args:
        similarities: from `similarity`.
        grid: rows and columns of patches.
        bias: added to every similarity.
        k_patches: how many patches of lowest degree may join the seed; all where there are fewer.
        valid: False where a patch shows nothing but padding: it takes no part. All are valid when None.
    Raises:
        ValueError: the similarities do not fit the grid, k_patches is below 1, or an image has no valid patch.
    """
    b, p, _ = similarities.shape
    if p != grid[0] * grid[1]:
        raise ValueError(f"similarities of {p} patches do not fit a grid of {grid[0]} x {grid[1]}")
    if k_patches < 1:
        raise ValueError(f"k_patches is {k_patches}; expected 1 or more")
    positive = similarities > -bias  # (b, p, p)
    if valid is not None:
        if not valid.any(1).all():
            raise ValueError("an image has no valid patch; check the frame that it was padded in")
        positive = positive & valid[:, None] & valid[:, :, None]
    degree = (
        positive.sum(2, dtype=torch.int32) - positive.diagonal(dim1=1, dim2=2).int()
    )  # (b, p); int32: 5 times as fast
    ranked = degree if valid is None else degree.masked_fill(~valid, p)
    order = ranked.argsort(dim=1, stable=True)
    image, seed = torch.arange(b, device=order.device), order[:, 0]
    chosen = torch.zeros_like(positive[:, 0]).scatter_(1, order[:, :k_patches], True) & positive[image, seed]
    chosen[image, seed] = True
    weights = chosen.to(similarities.dtype)  # (b, p)
    summed = torch.einsum("bp,bpq->bq", weights, similarities) + bias * weights.sum(1, keepdim=True)
    mask = summed > 0 if valid is None else (summed > 0) & valid
    mask[image, seed] = True
    isolated = degree[image, seed] == 0
    seeds = seed.cpu().numpy()
    masks = _component_of(mask.reshape(b, *grid).cpu().numpy(), seeds)
    return Found(boxes_around(masks), masks, seeds, isolated.cpu().numpy())


def attention_boxes(
    attention: Float[Tensor, "b p"],
    grid: tuple[int, int],
    mass: float = MASS,
    valid: Bool[Tensor, "b p"] | None = None,
) -> Found:
    """Boxes from the CLS attention of one head, the baseline "DINO-seg" of the LOST paper.

    The smallest set of patches that holds more than `mass` of the attention on patches is kept, and the box drawn
    around its largest connected component (four neighbours; of equal ones the first in reading order). The published
    code leaves the last component out of the comparison, and takes the background where there is just one.

    Args:
        attention: of the CLS token to every patch; any positive scale.
        valid: as in `lost`.
    Raises:
        ValueError: the attention does not fit the grid, or the mass is not in (0, 1].
    """
    b, p = attention.shape
    if p != grid[0] * grid[1]:
        raise ValueError(f"attention to {p} patches does not fit a grid of {grid[0]} x {grid[1]}")
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}; expected a share in (0, 1]")
    weights = attention.double() if valid is None else attention.double() * valid
    ascending, order = weights.sort(dim=1, stable=True)
    reached = ascending.cumsum(1) / ascending.sum(1, keepdim=True).clamp_min(torch.finfo(ascending.dtype).tiny)
    kept = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, order, reached > 1 - mass)
    kept[torch.arange(b, device=kept.device), order[:, -1]] = True
    labels, _ = ndimage.label(kept.reshape(b, *grid).cpu().numpy(), structure=IN_PLANE)
    masks = np.zeros_like(labels, dtype=bool)
    for image, own in enumerate(labels):
        sizes = np.bincount(own.ravel())
        sizes[0] = 0
        masks[image] = own == sizes.argmax()
    return Found(boxes_around(masks), masks, order[:, -1].cpu().numpy(), np.zeros(b, dtype=bool))


def boxes_around(masks: Bool[np.ndarray, "b i j"]) -> Int[np.ndarray, "b 4"]:
    """[x0, y0, x1, y1] around the True cells of each image, x1 and y1 exclusive; every image needs at least one."""
    rows, columns = masks.any(2), masks.any(1)
    assert rows.any(1).all(), "a mask is empty"
    return np.stack(
        [
            columns.argmax(1),
            rows.argmax(1),
            columns.shape[1] - columns[:, ::-1].argmax(1),
            rows.shape[1] - rows[:, ::-1].argmax(1),
        ],
        axis=1,
    )


@dataclass(frozen=True)
class Predicted:
    """One box an image from every setting, in pixels.

    Attributes:
        lost: one row a setting.
        isolated: True where the seed was isolated.
        heads: from the last block's CLS attention, one row a head; no rows where they were not asked for.
    """

    lost: Float[np.ndarray, "s b 4"]
    isolated: Bool[np.ndarray, "s b"]
    heads: Float[np.ndarray, "h b 4"]


def discover(
    model: nn.Module,
    images: Float[Tensor, "b 3 y x"],
    chosen: Sequence[Setting],
    k_patches: int = K_PATCHES,
    heads: bool = False,
    valid: Bool[Tensor, "b p"] | None = None,
    rows: Sequence[Row] | None = None,
) -> Predicted:
    """Boxes of one batch for every setting, from one forward, in pixels of the model's input.

    Args:
        model: a timm vision transformer, with or without registers; CLS and registers take no part.
        images: normalised, on the model's device.
        chosen: settings; those of one feature and normalisation share a similarity matrix where they follow one another.
        heads: whether boxes are drawn from the CLS attention too.
        valid: as in `lost`.
        rows: of the images in their data set, for errors; None where they are in none.
    Raises:
        ValueError: a feature or the CLS attention cannot be read, or the patches do not make up the grid of the images.
        BadFeatures: a feature of an image or its attention is NaN or infinite.
    """
    patch = patch_size(model)
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    layout = TokenLayout.of(model)
    if heads and not layout.cls:
        raise ValueError("this model has no CLS token, so there is no CLS attention to draw boxes from; heads=False")
    features = list(dict.fromkeys(setting.feature for setting in chosen))
    last = len(blocks(model)) - 1
    with (
        torch.inference_mode(),
        watch_prefix_attention(model, [last]) if heads else nullcontext() as attention,
        watch_patch_features(model, features) as seen,
    ):
        model.forward_features(images)
        looked_at = {f"{kind} of block {layer}": seen[Feature(kind, layer)] for kind, layer in features}
        if heads:
            looked_at["attention"] = attention[last]
    check_finite(model, images, looked_at, rows)
    with torch.inference_mode():
        found, key, matrix = [], None, None
        for setting in chosen:
            if (setting.feature, setting.normalised) != key:
                key = (setting.feature, setting.normalised)
                matrix = similarity(seen[setting.feature], setting.normalised)
            found.append(lost(matrix, grid, setting.bias, k_patches, valid))
        maps = layout.patches(attention[last][:, :, 0].mT).unbind(2) if heads else ()  # CLS is query 0; (b, p) a head
        per_head = [attention_boxes(one, grid, valid=valid) for one in maps]
    b = len(images)
    return Predicted(
        np.reshape([one.boxes * float(patch) for one in found], (-1, b, 4)),
        np.reshape([one.isolated for one in found], (-1, b)).astype(bool),
        np.reshape([one.boxes * float(patch) for one in per_head], (-1, b, 4)),
    )


def discover_all(
    model: nn.Module,
    batches: Batches,
    chosen: Sequence[Setting],
    k_patches: int = K_PATCHES,
    heads: bool = False,
) -> Predicted:
    """Boxes of a whole data set, in pixels of its images; besides them, only a batch is held in memory.

    Args:
        model: on the device of the batches.
        batches: with a `WholeTransform`, so that nothing of an image is cut off.
    Raises:
        ValueError: the transform crops, there are no images, or as `discover`.
        BadFeatures: as `discover`.
    """
    if not isinstance(batches.transform, WholeTransform):
        raise ValueError("the batches' transform crops, so boxes would not fit; give WholeTransform.of(transform)")
    if not len(batches.dataset):
        raise ValueError(f"data set {batches.dataset.name} has no images to look for objects in")
    patch, start, parts = patch_size(model), 0, []
    for images in batches:
        rows = range(start, start + len(images))
        frames = [batches.transform.frame(*original_size(batches.dataset.image_path(i))) for i in rows]
        start = rows.stop
        valid = valid_patches(frames, patch)
        valid = None if valid is None else valid.to(images.device)
        part = discover(model, images, chosen, k_patches, heads, valid, batches.dataset.rows[rows.start : rows.stop])
        parts.append(
            Predicted(
                np.stack([frame.to_original(part.lost[:, i]) for i, frame in enumerate(frames)], axis=1),
                part.isolated,
                np.stack([frame.to_original(part.heads[:, i]) for i, frame in enumerate(frames)], axis=1),
            )
        )
    return Predicted(
        *(np.concatenate([getattr(part, field.name) for part in parts], axis=1) for field in fields(Predicted))
    )


@dataclass(frozen=True)
class Measured:
    """How well every setting finds objects in the same images.

    Attributes:
        settings: as tried, in their order.
        boxes: in pixels of the images.
        overlaps: intersection over union of each box with its image's best true box.
        isolated: True where the seed was isolated.
        head_overlaps: of the boxes from the last block's CLS attention, one row a head; no rows if not asked for.
    """

    settings: tuple[Setting, ...]
    boxes: Float[np.ndarray, "s b 4"]
    overlaps: Float[np.ndarray, "s b"]
    isolated: Bool[np.ndarray, "s b"]
    head_overlaps: Float[np.ndarray, "h b"]

    def best(self, kind: str | None = None) -> Setting:
        """The setting chosen by `choose`, of all or of one kind of feature."""
        return self._best([i for i, one in enumerate(self.settings) if kind in (None, one.feature.kind)])

    def best_of_each(self) -> tuple[Setting, ...]:
        """The setting chosen by `choose` for each feature, in the order of the features."""
        features = dict.fromkeys(one.feature for one in self.settings)
        return tuple(
            self._best([i for i, one in enumerate(self.settings) if one.feature == feature]) for feature in features
        )

    def hits(self, setting: Setting) -> Bool[np.ndarray, " b"]:
        """Whether a setting finds an object, per image; CorLoc is the mean."""
        return self.overlaps[self.settings.index(setting)] >= HIT

    def _best(self, among: list[int]) -> Setting:
        return self.settings[among[choose(self.overlaps[among])]]


def measure(
    model: nn.Module, batches: Batches, tried: Sequence[Setting], k_patches: int = K_PATCHES, heads: bool = False
) -> Measured:
    """Looks for objects in a data set with boxes, and holds what is found against them. Arguments as `discover_all`."""
    found, truth = discover_all(model, batches, tried, k_patches, heads), true_boxes(batches.dataset)
    overlaps, head_overlaps = (
        np.reshape([best_iou(boxes, truth) for boxes in every], (len(every), len(truth)))
        for every in (found.lost, found.heads)
    )
    return Measured(tuple(tried), found.lost, overlaps, found.isolated, head_overlaps)


def choose(overlaps: Float[np.ndarray, "s b"]) -> int:
    """The row that finds most objects; of equal ones that with the larger mean overlap, then the first.

    Args:
        overlaps: of each box with its image's best true box, from `boxes.best_iou`.
    Raises:
        ValueError: there is nothing to choose from, or nothing to choose on.
    """
    if not overlaps.size:
        raise ValueError(f"nothing can be chosen from {overlaps.shape[0]} settings on {overlaps.shape[1]} images")
    # Whole numbers and rounded means, so that the last bit of a sum does not decide.
    return int(np.lexsort((-np.round(overlaps.mean(1), 9), -(overlaps >= HIT).sum(1)))[0])


def patch_size(model: nn.Module) -> int:
    """Side of the model's square patches in pixels.

    Raises:
        ValueError: it is not known, or patches are not square.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch or ())
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(
            f"{type(model).__name__} has patches of {patch}; expected square ones at patch_embed.patch_size"
        )
    return sides[0]


def _component_of(masks: Bool[np.ndarray, "b i j"], seeds: Int[np.ndarray, " b"]) -> Bool[np.ndarray, "b i j"]:
    """The connected component that holds each image's seed, which must be True."""
    labels, _ = ndimage.label(masks, structure=IN_PLANE)
    own = labels.reshape(len(labels), -1)[np.arange(len(labels)), seeds]
    assert (own > 0).all(), "a seed is outside of its mask"
    return labels == own[:, None, None]
