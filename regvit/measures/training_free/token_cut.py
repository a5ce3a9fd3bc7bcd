"""TokenCut: the object of an image as one side of a normalised cut through the graph of its patches.

For L2-normalised features F (p, d) of one image's patches:

    A    = 1 where F Fᵀ > τ, else ε             D = diag(Σ_j A_ij)
    v    = eigenvector of the second smallest eigenvalue of (D − A) v = λ D v
    part = v > mean(v); its other side where that one does not hold the seed, the patch of largest |v|
    box  = around the connected component (four neighbours) of the part that holds the seed

Published: keys of the last block, τ = 0.2, ε = 1e-5. Where all pairs of patches are above τ (or none) there is no cut:
all eigenvalues but the first are equal, and the box is that of whatever vector LAPACK gives. So τ is chosen here as LOST's
bias is, on images that are not reported on (`cut_hits`), and the published one stands beside.

Source: Wang et al. 2022, arXiv:2202.11539, and its code. Shape letters: b image, p patch, d channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.linalg import eigh
from torch import Tensor

from regvit.data.decoding import original_size
from regvit.features.dense_set import DenseSet
from regvit.measures.dense.discovery import Found, boxes_around, choose, component_of
from regvit.stats.boxes import HIT, best_iou, true_boxes

TAU, EPSILON = 0.2, 1e-5


def token_cut(features: Float[Tensor, "b p d"], grid: tuple[int, int], tau: float = TAU) -> Found:
    """The published algorithm on each image of a batch; `isolated` is True where the graph has all edges or none.

    Args:
        grid: rows and columns of patches.
        tau: cosine above which two patches are joined.
    Raises:
        ValueError: the features do not fit the grid, or there are fewer than three patches.
    """
    b, p, _ = features.shape
    if p != grid[0] * grid[1] or p < 3:
        raise ValueError(f"features of {p} patches do not fit a grid of {grid[0]} x {grid[1]} with at least 3 patches")
    unit = F.normalize(features.float(), dim=-1)
    joined = ((unit @ unit.mT) > tau).cpu().numpy()
    parts, seeds = np.zeros((b, p), dtype=bool), np.zeros(b, dtype=np.int64)
    for image, edges in enumerate(joined):
        weights = np.where(edges, 1.0, EPSILON)
        degrees = np.diag(weights.sum(1))
        vector = eigh(degrees - weights, degrees, subset_by_index=[1, 2])[1][:, 0]
        seeds[image] = np.abs(vector).argmax()
        part = vector > vector.sum() / p
        parts[image] = part if part[seeds[image]] else ~part
    masks = component_of(parts.reshape(b, *grid), seeds)
    off = ~np.eye(p, dtype=bool)
    uncut = np.array([edges[off].all() or not edges[off].any() for edges in joined], dtype=bool)
    return Found(boxes_around(masks), masks, seeds, uncut)


@dataclass(frozen=True)
class Cuts:
    """Boxes of some images under each τ.

    Attributes:
        taus: as tried.
        boxes: in pixels of the images.
        overlaps: of each box with its image's best true box.
    """

    taus: tuple[float, ...]
    boxes: Float[np.ndarray, "s b 4"]
    overlaps: Float[np.ndarray, "s b"]

    def hits(self, tau: float) -> Bool[np.ndarray, " b"]:
        return self.overlaps[self.taus.index(tau)] >= HIT


def cut(dense: DenseSet, rows: Sequence[int], taus: Sequence[float]) -> Cuts:
    """Boxes of ascending rows from the keys of the last block that were kept."""
    found = [
        np.stack([token_cut(arrays["k"][:, -1], (dense.side,) * 2, tau).boxes for tau in taus])
        for _, arrays in dense.batches(rows, "k")
    ]
    sizes = np.array([original_size(dense.dataset.image_path(row)) * 2 for row in rows])
    boxes, truth = np.concatenate(found, axis=1) * sizes / dense.side, true_boxes(dense.dataset)
    return Cuts(tuple(taus), boxes, np.stack([best_iou(own, [truth[row] for row in rows]) for own in boxes]))


def cut_hits(tried: Cuts, final: Cuts) -> dict[str, Bool[np.ndarray, " b"]]:
    """Whether an object is found, by image: with the τ that finds most among the images tried, and with the published one."""
    hits = {"corloc_token_cut": final.hits(tried.taus[choose(tried.overlaps)])}
    return hits | ({"corloc_token_cut_published": final.hits(TAU)} if TAU in final.taus else {})
