"""Our LOST against the published one, on the same features of real images: `python -m benchmarks.discovery`.

The published algorithm (Siméoni et al. 2021, arXiv:2109.14279, and its code) is written down here step by step, with bias
0 and k = 100, on features as they are. For F (p, d) of one image's patches:

    A      = F Fᵀ
    degree = number of other patches with A > 0
    order  = torch.argsort of −degree, descending: equal degrees come in no fixed order
    seed   = the first of the order
    S      = those of the first k of the order with A[seed] > 0
    box    = around the connected component of Σ_{s in S} A[s] > 0 that holds the seed

It leaves open which of equal degrees comes first. That matters where two patches share the lowest degree (either can be
the seed), or the k-th and the next patch have equal degrees (either can join the seed); nowhere else does the order within
equal degrees change the set S. So it is given for each run: boxes equal to the published code as it is; boxes equal to it
with a stable sort; how many of those that differ come from images where such a tie decides; and the published code's own
freedom: boxes that it gives alike whether equal degrees come in reading order or in the reverse.

Beside them, the published setting (keys of the last block): the share of pairs of patches that are positively correlated,
and of boxes that are the whole image.

It takes what `extract_dense` kept for the stage `discover`, so the pipeline must be built.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import ndimage
from torch import Tensor

from benchmarks.machine import describe
from regvit.features.dense_set import DenseSet
from regvit.measures.dense.discovery import K_PATCHES, kept_features, lost, similarity
from regvit.models.token_features import KINDS, Feature


@dataclass(frozen=True)
class Published:
    """What the published algorithm finds in one image, on the grid of its patches.

    Attributes:
        box: [x0, y0, x1, y1] in patches, x1 and y1 exclusive.
        tie_decides: whether another order of equal degrees can give another seed or another set S.
        positive: share of pairs of different patches that are positively correlated.
        whole: whether the box is the whole image.
    """

    box: tuple[int, int, int, int]
    tie_decides: bool
    positive: float
    whole: bool


def published_lost(
    features: Float[Tensor, "p d"], grid: tuple[int, int], k_patches: int = K_PATCHES, equal: str = "open"
) -> Published:
    """The published algorithm on one image.

    Args:
        grid: rows and columns of patches.
        equal: in which order patches of equal degree come: "open" (as torch sorts them, the published code), "reading",
            or "reverse".
    Raises:
        ValueError: `equal` is another word, or the seed is not in its own mask, where the published code raises, too.
    """
    a = features @ features.T
    others = a.clone().fill_diagonal_(0)
    degree = (others > 0).sum(1)
    order = _ranked(-degree.float(), equal)
    seed, potential = order[0], order[:k_patches]
    joined = potential[a[seed, potential] > 0]
    components, _ = ndimage.label((a[joined].sum(0) > 0).reshape(grid).numpy())
    own = components.ravel()[seed]
    if own == 0:
        raise ValueError(f"the seed, patch {seed.item()}, is in the background component; its degree is {degree[seed]}")
    rows, columns = np.where(components == own)
    box = tuple(int(side) for side in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    pairs = len(degree) * (len(degree) - 1)
    whole = box == (0, 0, grid[1], grid[0])
    return Published(box, tie_decides(degree, k_patches), degree.sum().item() / pairs, whole)


def _ranked(centrality: Float[Tensor, " p"], equal: str) -> Int[Tensor, " p"]:
    """Places from the largest value to the smallest; `equal` as in `published_lost`."""
    if equal == "open":
        return torch.argsort(centrality, descending=True)
    if equal == "reading":
        return torch.argsort(centrality, descending=True, stable=True)
    if equal == "reverse":
        return len(centrality) - 1 - torch.argsort(centrality.flip(0), descending=True, stable=True)
    raise ValueError(f"equal is {equal!r}; expected open, reading or reverse")


def tie_decides(degree: Int[Tensor, " p"], k_patches: int) -> bool:
    """Whether equal degrees stand at the first place, or on both sides of the k-th."""
    ranked = degree.sort().values.tolist()
    first = len(ranked) > 1 and ranked[0] == ranked[1]
    return first or (k_patches < len(ranked) and ranked[k_patches - 1] == ranked[k_patches])


@dataclass(frozen=True)
class Agreement:
    """Boxes of ours held against the published ones.

    Attributes:
        boxes: how many, one an image and feature.
        same: equal to those of the published code as it is.
        same_stably: equal to those of the published code with a stable sort.
        same_either_way: published boxes that are the same with equal degrees in reading order and in the reverse.
        ties: images and features where a tie decides.
        different_with_ties: boxes that differ from the published code as it is, and a tie decides.
    """

    boxes: int = 0
    same: int = 0
    same_stably: int = 0
    same_either_way: int = 0
    ties: int = 0
    different_with_ties: int = 0

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def sentence(self) -> str:
        return (
            f"{self.same / self.boxes:.2%} of {self.boxes} boxes equal the published ones, with a stable sort there "
            f"{self.same_stably / self.boxes:.2%}; {self.different_with_ties} of the {self.boxes - self.same} different ones "
            f"come from ties (a tie decides in {self.ties} cases); the published code agrees with itself, its ties "
            f"reversed, on {self.same_either_way / self.boxes:.2%}"
        )


def compare(
    features: Float[Tensor, "b p d"],
    grid: tuple[int, int],
    k_patches: int = K_PATCHES,
) -> tuple[Agreement, list[Published]]:
    """Our boxes of a batch held against the published ones, and these."""
    ours = lost(similarity(features, normalised=False), grid, 0.0, k_patches).boxes
    total, found = Agreement(), []
    for one, box in zip(features, ours.tolist(), strict=True):
        theirs, reading, reverse = (
            published_lost(one, grid, k_patches, equal) for equal in ("open", "reading", "reverse")
        )
        same = tuple(box) == theirs.box
        total += Agreement(
            boxes=1,
            same=same,
            same_stably=tuple(box) == reading.box,
            same_either_way=reading.box == reverse.box,
            ties=theirs.tie_decides,
            different_with_ties=theirs.tie_decides and not same,
        )
        found.append(theirs)
    return total, found


def measure_run(dense: DenseSet, rows: Sequence[int]) -> dict:
    """The agreement over all features and for each, and what the published setting finds."""
    features, side = kept_features(dense, KINDS), dense.side
    last = Feature("k", max(feature.layer for feature in features))
    agreement, published = dict.fromkeys(features, Agreement()), []
    for _, arrays in dense.batches(rows, *KINDS):
        for feature in features:
            values = arrays[feature.kind][:, dense.store.attributes["inside_layers"].index(feature.layer)]
            one, found = compare(values, (side, side))
            agreement[feature] += one
            if feature == last:
                published += found
    return {
        "all": asdict(sum(agreement.values(), Agreement())),
        "by_feature": {str(feature): asdict(one) for feature, one in agreement.items()},
        "published_setting": {
            "feature": str(last),
            "images": len(published),
            "positive_pairs": float(np.mean([one.positive for one in published])),
            "positive_pairs_least": float(np.min([one.positive for one in published])),
            "whole_image": float(np.mean([one.whole for one in published])),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="scenes", help="name of a data set with a test split")
    parser.add_argument("--images", type=int, help="at most so many of the test split, the first; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given, results = parser.parse_args(), {}
    stores = sorted(Path("features/dense").glob(f"*/{given.dataset}.zarr"))
    if not stores:
        raise SystemExit(f"no run in features/dense has {given.dataset}: run `dvc repro extract_dense` first")
    for store in stores:
        dense = DenseSet.open(Path("data") / given.dataset, store)
        run = store.parent.name
        results[run] = found = measure_run(dense, dense.rows("test")[: given.images])
        print(f"{run}: {Agreement(**found['all']).sentence()}")
        setting = found["published_setting"]
        print(
            f"  published setting, {setting['feature']}: {setting['positive_pairs']:.2%} of the pairs of patches are "
            f"positively correlated, {setting['whole_image']:.2%} of the boxes are the whole image"
        )
    given.out.write_text(json.dumps({"machine": describe(), "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
