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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from regvit.data.decoding import original_size
from regvit.features.dense_set import DenseSet
from regvit.models.token_features import Feature
from regvit.stats.accuracy import accuracy
from regvit.stats.bootstrap import mean_over_images
from regvit.stats.boxes import HIT, best_iou, true_boxes
from regvit.stats.figures import Figure

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
    stable: bool = True,
) -> Found:
    """LOST on a batch of images, on the device of the similarities; only the masks are labelled on the CPU.

    Args:
        similarities: from `similarity`.
        grid: rows and columns of patches.
        bias: added to every similarity.
        k_patches: how many patches of lowest degree may join the seed; all where there are fewer.
        stable: whether equal degrees come in reading order; False: in the order of the published code, which is torch's.
    Raises:
        ValueError: the similarities do not fit the grid, or k_patches is below 1.
    """
    b, p, _ = similarities.shape
    if p != grid[0] * grid[1]:
        raise ValueError(f"similarities of {p} patches do not fit a grid of {grid[0]} x {grid[1]}")
    if k_patches < 1:
        raise ValueError(f"k_patches is {k_patches}; expected 1 or more")
    positive = similarities > -bias  # (b, p, p)
    own = positive.diagonal(dim1=1, dim2=2).int()
    degree = positive.sum(2, dtype=torch.int32) - own  # (b, p); int32: 5 times as fast
    order = degree.argsort(dim=1, stable=True) if stable else (-degree.float()).argsort(dim=1, descending=True)
    image, seed = torch.arange(b, device=order.device), order[:, 0]
    chosen = torch.zeros_like(positive[:, 0]).scatter_(1, order[:, :k_patches], True) & positive[image, seed]
    chosen[image, seed] = True
    weights = chosen.to(similarities.dtype)  # (b, p)
    summed = torch.einsum("bp,bpq->bq", weights, similarities) + bias * weights.sum(1, keepdim=True)
    mask = summed > 0
    mask[image, seed] = True
    isolated = degree[image, seed] == 0
    seeds = seed.cpu().numpy()
    masks = component_of(mask.reshape(b, *grid).cpu().numpy(), seeds)
    return Found(boxes_around(masks), masks, seeds, isolated.cpu().numpy())


def attention_boxes(
    attention: Float[Tensor, "b p"],
    grid: tuple[int, int],
    mass: float = MASS,
) -> Found:
    """Boxes from the CLS attention of one head, the baseline "DINO-seg" of the LOST paper.

    The smallest set of patches that holds more than `mass` of the attention on patches is kept, and the box drawn
    around its largest connected component (four neighbours; of equal ones the first in reading order). The published
    code leaves the last component out of the comparison, and takes the background where there is just one.

    Args:
        attention: of the CLS token to every patch; any positive scale.
    Raises:
        ValueError: the attention does not fit the grid, or the mass is not in (0, 1].
    """
    b, p = attention.shape
    if p != grid[0] * grid[1]:
        raise ValueError(f"attention to {p} patches does not fit a grid of {grid[0]} x {grid[1]}")
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}; expected a share in (0, 1]")
    weights = attention.double()
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
class Discovered:
    """How well every setting finds objects in the same images.

    Attributes:
        settings: as tried, in their order.
        boxes: in pixels of the images.
        overlaps: intersection over union of each box with its image's best true box.
        isolated: True where the seed was isolated.
        head_overlaps: of the boxes from the last block's CLS attention, one row a head; no rows where it was not kept.
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


def kept_features(dense: DenseSet, kinds: Iterable[str]) -> tuple[Feature, ...]:
    """The features of some kinds that a store has, kind by kind, layers ascending."""
    return tuple(Feature(kind, layer) for kind in kinds for layer in dense.store.attributes["inside_layers"])


def discover(dense: DenseSet, rows: Sequence[int], tried: Sequence[Setting], k_patches: int = K_PATCHES) -> Discovered:
    """Looks for objects in images with boxes, and holds what is found against them.

    Besides what is found, only a unit of the store is held in memory.

    Args:
        rows: of `dense`, ascending.
        tried: settings; those of one feature and normalisation share a similarity matrix where they follow one another.
    Raises:
        KeyError: a feature was not kept.
    """
    kinds, layers = dict.fromkeys(one.feature.kind for one in tried), dense.store.attributes["inside_layers"]
    heads = bool(dense.layout.cls) and "attention" in dense.store.arrays
    parts = []
    for own, arrays in dense.batches(rows, *kinds, *(["attention"] if heads else [])):
        features = {Feature(kind, layer): arrays[kind][:, m] for kind in kinds for m, layer in enumerate(layers)}
        maps = arrays["attention"][:, -1, :, 0, dense.layout.prefix :] if heads else None  # CLS is query 0; (b, h, p)
        sizes = np.array([original_size(dense.dataset.image_path(row)) for row in own])
        scale = np.tile(sizes, 2) / dense.side  # pixels of the image a patch, as images are squashed
        boxes, isolated, per_head = find_boxes(features, maps, dense.side, tried, k_patches)
        parts.append((boxes * scale, isolated, per_head * scale))
    boxes, isolated, per_head = (np.concatenate(every, axis=1) for every in zip(*parts, strict=True))
    truth = true_boxes(dense.dataset)
    truth = [truth[row] for row in rows]
    overlaps, head_overlaps = (
        np.reshape([best_iou(one, truth) for one in every], (len(every), len(truth))) for every in (boxes, per_head)
    )
    return Discovered(tuple(tried), boxes, overlaps, isolated, head_overlaps)


def find_boxes(
    features: Mapping[Feature, Float[Tensor, "b p d"]],
    attention: Float[Tensor, "b h p"] | None,
    side: int,
    tried: Sequence[Setting],
    k_patches: int = K_PATCHES,
) -> tuple[Float[np.ndarray, "s b 4"], Bool[np.ndarray, "s b"], Float[np.ndarray, "h b 4"]]:
    """Boxes of one batch from every setting, in patches; where seeds were isolated; and boxes from every head."""
    found, key, matrix = [], None, None
    for setting in tried:
        if (setting.feature, setting.normalised) != key:
            key = (setting.feature, setting.normalised)
            matrix = similarity(features[setting.feature], setting.normalised)
        found.append(lost(matrix, (side, side), setting.bias, k_patches))
    heads = [] if attention is None else [attention_boxes(one, (side, side)).boxes for one in attention.unbind(1)]
    b = len(next(iter(features.values())))
    return (
        np.reshape([one.boxes for one in found], (-1, b, 4)).astype(float),
        np.reshape([one.isolated for one in found], (-1, b)).astype(bool),
        np.reshape(heads, (-1, b, 4)).astype(float),
    )


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


def figures(tried: Discovered, final: Discovered, published: Setting | None, seed: int) -> list[Figure]:
    """CorLoc of the chosen setting and what stands beside it, each with its interval; the seed is of the bootstrap.

    `corloc_mean` is over every kind and layer, each with its own best setting, so that it does not hang on one choice;
    `corloc_<kind>` of each kind's own best setting; `corloc_published` of the setting of the published code;
    `corloc_dino_seg` of the box from the CLS attention of the last block's best head.

    Args:
        tried: every setting on the images that it is chosen on.
        final: the chosen ones on the test images.
    """
    found = [Figure.of("corloc_mean", mean_over_images(mean_hits(tried, final), seed))]
    for metric, values in {**_hits(tried, final, published), "corloc_chosen_on": tried.hits(tried.best())}.items():
        found.append(Figure.of(metric, accuracy(values)))
    isolated = final.isolated[final.settings.index(tried.best())]
    return [*found, Figure("isolated", float(isolated.mean()), n=len(isolated))]


def mean_hits(tried: Discovered, final: Discovered) -> Float[np.ndarray, " b"]:
    """Share of the features whose own best setting finds an object, per image."""
    return np.mean([final.hits(one) for one in tried.best_of_each()], axis=0)


def _hits(tried: Discovered, final: Discovered, published: Setting | None) -> dict[str, Bool[np.ndarray, " b"]]:
    kinds = dict.fromkeys(one.feature.kind for one in tried.settings)
    hits = {"corloc": final.hits(tried.best())} | {f"corloc_{kind}": final.hits(tried.best(kind)) for kind in kinds}
    if published is not None:
        hits["corloc_published"] = final.hits(published)
    if len(tried.head_overlaps):
        hits["corloc_dino_seg"] = final.head_overlaps[choose(tried.head_overlaps)] >= HIT
    return hits


def image_columns(tried: Discovered, final: Discovered, published: Setting | None) -> dict[str, np.ndarray]:
    """Of every test image: whether each of `figures` finds an object, and box and overlap of the chosen setting."""
    winner = final.settings.index(tried.best())
    columns = {name: hits.astype(int) for name, hits in _hits(tried, final, published).items()}
    columns |= {"corloc_mean": mean_hits(tried, final), "iou": final.overlaps[winner]}
    return columns | dict(zip(("x0", "y0", "x1", "y1"), final.boxes[winner].T.round(2), strict=True))


def sweep_table(tried: Discovered) -> pd.DataFrame:
    """Every setting on the images that it is chosen on."""
    table = _named(tried.settings)
    return table.assign(
        corloc=(tried.overlaps >= HIT).mean(1), iou=tried.overlaps.mean(1), isolated=tried.isolated.mean(1)
    )


def feature_table(tried: Discovered, final: Discovered) -> pd.DataFrame:
    """Every feature with its chosen setting, on the test images; `chosen` marks that of all."""
    best = tried.best_of_each()
    estimates = [accuracy(final.hits(one)) for one in best]
    table = _named(best).assign(**{f"corloc{end}": [getattr(one, end[1:] or "value") for one in estimates]
                                   for end in ("", "_lo", "_hi")})  # fmt: skip
    return table.assign(chosen=[int(one == tried.best()) for one in best])


def _named(settings: Sequence[Setting]) -> pd.DataFrame:
    rows = [{**one.feature._asdict(), "normalised": one.normalised, "bias": one.bias} for one in settings]
    return pd.DataFrame(rows)


def component_of(masks: Bool[np.ndarray, "b i j"], seeds: Int[np.ndarray, " b"]) -> Bool[np.ndarray, "b i j"]:
    """The connected component that holds each image's seed, which must be True."""
    labels, _ = ndimage.label(masks, structure=IN_PLANE)
    own = labels.reshape(len(labels), -1)[np.arange(len(labels)), seeds]
    assert (own > 0).all(), "a seed is outside of its mask"
    return labels == own[:, None, None]
