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

It takes the runs and the scenes of the pipeline, which must be built; the features are the discover stage's sixteen.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import ndimage
from torch import Tensor

from benchmarks.machine import describe
from regvit.data.batches import Batches
from regvit.data.manifest import Dataset, read_dataset
from regvit.data.whole_images import WholeTransform
from regvit.features.dense_set import grid_side
from regvit.measures.discovery import K_PATCHES, lost, similarity
from regvit.models.backbones import Backbone, resized
from regvit.models.token_features import Feature, last_layers, patch_features
from regvit.registers.runs import open_run

RUNS, BACKBONES, DATASET = Path("features"), Path("data/backbones"), Path("data/scenes")
SIZE, LAYERS, BATCH = 224, 4, 8  # as the discover stage's defaults


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


def measure_run(backbone: Backbone, dataset: Dataset, features: tuple[Feature, ...]) -> dict:
    """The agreement over all features and for each, and what the published setting finds."""
    last = Feature("k", max(feature.layer for feature in features))
    agreement, published = dict.fromkeys(features, Agreement()), []
    for images in Batches(dataset, WholeTransform.of(backbone.transform), BATCH, label=None):
        for feature, values in patch_features(backbone.model, images, features).items():
            side = grid_side(values.shape[1])
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


def built_runs(folder: Path, dataset: Path) -> list[Path]:
    """Descriptions of the runs of a project whose stages have run.

    Raises:
        FileNotFoundError: there are none, or the data set is missing.
    """
    runs = sorted(folder.glob("runs/*.json"))
    if not runs or not dataset.is_dir():
        missing = dataset if runs else folder / "runs/<run>.json"
        raise FileNotFoundError(
            f"there is no {missing} in {Path.cwd()}: run `dvc repro compose download_scenes` in the root of the "
            "repository first, or run this where the pipeline is built"
        )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=DATASET, help="folder of a data set with a test split")
    parser.add_argument("--images", type=int, help="at most so many of the test split, the first; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    try:
        runs = built_runs(RUNS, given.dataset)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    dataset = read_dataset(given.dataset).subset("test")
    dataset = replace(dataset, rows=dataset.rows[: given.images])
    results = {}
    for run in runs:
        backbone = resized(open_run(run, BACKBONES), SIZE)
        results[run.stem] = found = measure_run(backbone, dataset, last_layers(backbone.model, LAYERS))
        print(f"{run.stem}: {Agreement(**found['all']).sentence()}")
        setting = found["published_setting"]
        print(
            f"  published setting, {setting['feature']}: {setting['positive_pairs']:.2%} of the pairs of patches are "
            f"positively correlated, {setting['whole_image']:.2%} of the boxes are the whole image"
        )
    given.out.write_text(json.dumps({"machine": describe(), "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
