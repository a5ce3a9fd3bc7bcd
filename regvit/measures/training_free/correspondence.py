"""Correspondence: where a patch is in another view, by the nearest of that view's patches.

For a point in patch i of the first image, with unit features x and y of the patches of the two:

    found = middle of patch argmax_j x_i · y_j,    right where |found − truth| ≤ tolerance

The tolerance is that of the pair, in pixels (SPair-71k: 0.1 of the longer side of the second object's box, PCK@0.1), or,
where it has none, the side of a patch. Points are pooled over the pairs; in `pck_by_pair` each pair weighs the same.

Deviation: published evaluations of SPair upsample features, and find a pixel; here a patch is found, so that its middle is
up to half a patch off, and an outlier's features stay those of its own place.

Sources: Min et al. 2019, arXiv:1908.10543 (PCK); Tang et al. 2023, arXiv:2306.03881 (features without training). Shape
letters: m point, p patch, d channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int

from regvit.data.correspondences import Pair
from regvit.data.decoding import original_size
from regvit.features.dense_set import DenseSet
from regvit.measures.dense.segmentation import place_columns, place_figures
from regvit.stats.bootstrap import mean_over_images
from regvit.stats.figures import Figure
from regvit.stats.miou import PatchCounts


@dataclass(frozen=True)
class Matched:
    """Where the points of a pair were found.

    Attributes:
        patches: of the first image, in which its points lie.
        found: x, y in pixels of the second image.
        right: within the tolerance.
    """

    pair: Pair
    patches: Int[np.ndarray, " m"]
    found: Float[np.ndarray, "m 2"]
    right: Bool[np.ndarray, " m"]


def known_pairs(dense: DenseSet, pairs: Sequence[Pair]) -> list[tuple[Pair, int, int]]:
    """The pairs whose images are both in the store, with their rows.

    Raises:
        ValueError: there are none.
    """
    row = {name: i for i, name in enumerate(dense.dataset.rows.column("image_id"))}
    found = [(pair, row[pair.first], row[pair.second]) for pair in pairs if {pair.first, pair.second} <= row.keys()]
    if not found:
        raise ValueError(f"data set {dense.dataset.name} has no pair of whose images patches were kept; raise `images`")
    return found


def match_pairs(dense: DenseSet, pairs: Sequence[tuple[Pair, int, int]]) -> list[Matched]:
    """Every point of every pair; each image is read once, and kept."""
    rows = sorted({row for _, *both in pairs for row in both})
    features = {}
    for own, arrays in dense.batches(rows, "patches"):
        features |= zip(own, arrays["patches"].half(), strict=True)  # as they are stored
    sizes = {row: original_size(dense.dataset.image_path(row)) for row in rows}
    matched = []
    for pair, first, second in pairs:
        patches = patch_of(pair.points[:, :2], sizes[first], dense.side)
        there = nearest_patch(features[first][patches].float(), features[second].float())
        matched.append(judge(pair, patches, there, sizes[second], dense.side))
    return matched


def patch_of(points: Float[np.ndarray, "m 2"], size: tuple[int, int], side: int) -> Int[np.ndarray, " m"]:
    """The patch in which each point lies, in reading order; one on the far edge belongs to the last.

    Args:
        size: width and height of the image, pixels.
        side: patches a side.
    Raises:
        ValueError: a point lies outside of the image.
    """
    cells = points / size * side
    if (cells < 0).any() or (cells > side).any():
        raise ValueError(
            f"point {points[((cells < 0) | (cells > side)).any(1)][0].tolist()} is outside of {size} pixels"
        )
    column, row = np.minimum(cells.astype(int), side - 1).T
    return row * side + column


def nearest_patch(queries: Float[torch.Tensor, "m d"], patches: Float[torch.Tensor, "p d"]) -> Int[np.ndarray, " m"]:
    """Number of the patch of largest cosine to each query; of equal ones the first."""
    return (F.normalize(queries, dim=-1) @ F.normalize(patches, dim=-1).T).argmax(1).cpu().numpy()


def judge(
    pair: Pair, patches: Int[np.ndarray, " m"], there: Int[np.ndarray, " m"], size: tuple[int, int], side: int
) -> Matched:
    """Args: patches, there: of the first image and found in the second. size: of the second image, pixels."""
    middle = (np.stack([there % side, there // side], axis=1) + 0.5) / side
    found = middle * size
    unit, most = (np.array(size) / side, 1) if pair.tolerance is None else (1, pair.tolerance)
    right = np.hypot(*((found - pair.points[:, 2:]) / unit).T) <= most
    return Matched(pair, patches, found, right)


def counts(matched: Sequence[Matched], side: int) -> PatchCounts:
    """Points that were found and points that there are, by patch of each first image."""
    shape = (len(matched), side**2)
    right, counted = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, each in enumerate(matched):
        np.add.at(right[i], each.patches, each.right)
        np.add.at(counted[i], each.patches, 1)
    return PatchCounts(right, counted)


def figures(
    matched: Sequence[Matched], counted: PatchCounts, outliers: Bool[np.ndarray, "b p"], seed: int = 0
) -> list[Figure]:
    """`pck` over all points, at outliers of the first image, and elsewhere in these images; `pck_by_pair`.

    Args:
        outliers: of the untreated model in the first image of each pair.
    """
    by_pair = np.array([each.right.mean() for each in matched])
    return [
        *place_figures("pck", counted, outliers, seed),
        Figure.of("pck_by_pair", mean_over_images(by_pair, seed)),
    ]


def image_columns(
    matched: Sequence[Matched], counted: PatchCounts, outliers: Bool[np.ndarray, "b p"]
) -> dict[str, np.ndarray]:
    """One value a pair."""
    return {"pck_by_pair": np.array([each.right.mean() for each in matched])} | place_columns("pck", counted, outliers)


def category_table(matched: Sequence[Matched]) -> pd.DataFrame:
    """PCK of each category, by point and by pair, as published tables have either."""
    rows = [(each.pair.category, len(each.right), each.right.sum(), each.right.mean()) for each in matched]
    table = pd.DataFrame(rows, columns=["category", "points", "right", "pck_by_pair"])
    found = table.groupby("category", sort=True).agg(
        pairs=("points", "size"), points=("points", "sum"), right=("right", "sum"), pck_by_pair=("pck_by_pair", "mean")
    )
    found.insert(2, "pck", found.pop("right") / found["points"])
    return found.reset_index()
