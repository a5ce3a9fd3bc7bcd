"""Nearest neighbours: the search, and weighted votes of the k nearest, as DINOv2 evaluates features (arXiv:2304.07193).

For an image with unit feature x and its k most similar training images, of unit features xᵢ and classes yᵢ:

    wᵢ = exp(x · xᵢ / T) / Σⱼ exp(x · xⱼ / T),    p(c) = Σ wᵢ [yᵢ = c],    logit(c) = log max(p(c), floor)

The softmax of the logits is p (up to the floor), so that detectors which take logits work on neighbours as well. The search
is also that of the detector `knn`.

Similarities are computed block by block and only the k best are kept: of some thousand images at a time, over all the
training images in blocks, which are read as often as that where they lie in a store. Memory grows with neither set.

Shape letters: b image, n training image, d channel, c class, k neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regvit.features.stored_readouts import blocks
from regvit.probing.probes import Neighbours

K = (10, 20, 100, 200)  # and the temperature: DINOv2's protocol
TEMPERATURE = 0.07
FLOOR = 1e-30  # of a vote share: a class without a neighbour gets the logit −69, and not −∞
TEST_ROWS, TRAIN_ROWS = 256, 1 << 12  # similarities held at once: 4 MiB of float32
VOTES_AT_ONCE = 1 << 24  # images × neighbours × classes: 192 MiB
TEST_ROWS_A_PASS = 1 << 14  # images whose neighbours are looked for in one pass over the training images


def nearest(
    train: Float[np.ndarray, "n d"], test: Float[np.ndarray, "b d"], k: int, device: str | torch.device = "cpu"
) -> Iterator[tuple[slice, Float[Tensor, "b k"], Int[Tensor, "b k"]]]:
    """The k most similar training images of each image, best first: rows of `test`, cosines, and rows of `train`.

    Args:
        train, test: features, arrays or `StoredReadout`; made of unit length here. One of zeros is similar to nothing.
        device: where to compute; the training features are copied there block by block.
    """
    for part in blocks(len(test), TEST_ROWS_A_PASS):
        places = [
            slice(part.start + rows.start, part.start + rows.stop) for rows in blocks(part.stop - part.start, TEST_ROWS)
        ]
        queries = [_unit(test[rows], device) for rows in places]
        best = [
            (query.new_empty(len(query), 0), query.new_empty(len(query), 0, dtype=torch.int64)) for query in queries
        ]
        for block in blocks(len(train), TRAIN_ROWS):
            some = _unit(train[block], device)
            for i, query in enumerate(queries):
                new, columns = (query @ some.T).topk(min(k, len(some)), dim=1)
                similarity, rows = (
                    torch.cat(pair, 1) for pair in zip(best[i], (new, columns + block.start), strict=True)
                )
                similarity, kept = similarity.topk(min(k, similarity.shape[1]), dim=1)
                best[i] = similarity, rows.gather(1, kept)
        yield from ((rows, *found) for rows, found in zip(places, best, strict=True))


@dataclass(frozen=True)
class Labelled:
    """Images whose classes are known: features, arrays or `StoredReadout`, and the class index of each."""

    features: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]


def knn_logit_blocks(
    train: Labelled,
    test: Float[np.ndarray, "b d"],
    neighbours: Neighbours,
    n_classes: int,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[slice, Float[np.ndarray, "b c"]]]:
    """Logarithm of the weighted share of votes of each class, float32, finite: rows of `test`, and their logits.

    Raises:
        ValueError: shapes, labels, k or temperature do not fit; the message gives value and cure. It comes when the first
            block is asked for.
    """
    _check(train, test, neighbours, n_classes)
    for rows, votes in _votes(train, test, (neighbours.k,), neighbours.temperature, n_classes, device):
        yield rows, votes[0].clamp_min(FLOOR).log().cpu().numpy()


def choose_neighbours(
    train: Labelled,
    val: Labelled,
    n_classes: int,
    ks: Sequence[int] = K,
    temperature: float = TEMPERATURE,
    device: str | torch.device = "cpu",
) -> Neighbours:
    """The k with the best validation accuracy; of equals the smallest.

    Numbers above that of the training images are left out; where that leaves none, all training images vote.

    Raises:
        ValueError: as `knn_logit_blocks`, or there is no validation image.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks are {list(ks)}; expected at least one number of neighbours, each 1 or more")
    if not len(val.labels):
        raise ValueError("there are no validation images to choose k on; give some images split = val")
    n = len(train.features)
    allowed = tuple(sorted({k for k in ks if k <= n})) or (n,)
    _check(train, val.features, Neighbours(allowed[-1], temperature), n_classes)
    if len(val.labels) != len(val.features):
        raise ValueError(f"val has {len(val.features)} rows and {len(val.labels)} labels; expected one label a row")
    correct = np.zeros(len(allowed), dtype=np.int64)
    for rows, votes in _votes(train, val.features, allowed, temperature, n_classes, device):  # (ks, b, c)
        correct += (votes.argmax(-1).cpu().numpy() == val.labels[rows]).sum(1)
    best = int(correct.argmax())  # the first of equals
    return Neighbours(allowed[best], float(temperature), int(correct[best]))


def _votes(
    train: Labelled,
    test: np.ndarray,
    ks: tuple[int, ...],
    temperature: float,
    n_classes: int,
    device: str | torch.device,
) -> Iterator[tuple[slice, Float[Tensor, "ks b c"]]]:
    """Vote shares of the first k neighbours for each k (ascending), block by block of the test images."""
    labels = torch.from_numpy(np.asarray(train.labels, dtype=np.int64)).to(device)
    for part, similarity, rows in nearest(train.features, test, ks[-1], device):
        for some in blocks(len(rows), max(1, VOTES_AT_ONCE // (ks[-1] * n_classes))):
            one_hot = torch.nn.functional.one_hot(labels[rows[some]], n_classes).float()  # (b, k, c)
            # no scatter: its sum has no order on a GPU
            shares = [
                torch.einsum("bk,bkc->bc", (similarity[some, :k] / temperature).softmax(1), one_hot[:, :k]) for k in ks
            ]
            yield slice(part.start + some.start, part.start + some.stop), torch.stack(shares)


def _unit(values: np.ndarray, device: str | torch.device) -> Float[Tensor, "b d"]:
    values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)
    return torch.nn.functional.normalize(values, dim=1)


def _check(train: Labelled, test: np.ndarray, neighbours: Neighbours, n_classes: int) -> None:
    features, labels, n = train.features, train.labels, len(train.features)
    if features.ndim != 2 or test.ndim != 2 or features.shape[1] != test.shape[1] or not n:
        raise ValueError(
            f"train features {features.shape} and test features {test.shape} do not fit; expected (n, d) with n of at "
            "least 1, and (b, d)"
        )
    if np.shape(labels) != (n,):
        raise ValueError(f"train has {n} rows and labels of shape {np.shape(labels)}; expected one a row")
    if np.min(labels) < 0 or np.max(labels) >= n_classes:
        raise ValueError(f"labels span {np.min(labels)} to {np.max(labels)}; expected class indices 0 to "
                         f"{n_classes - 1}: leave out images without a label")  # fmt: skip
    if not 1 <= neighbours.k <= n:
        raise ValueError(f"k is {neighbours.k}; expected 1 to {n}, the number of training images")
    if not (np.isfinite(neighbours.temperature) and neighbours.temperature > 0):
        raise ValueError(f"temperature is {neighbours.temperature}; expected a number above 0")
    for name, values in (("train", features), ("test", test)):
        if bad := sum(int((~np.isfinite(values[rows])).any(1).sum()) for rows in blocks(len(values))):
            raise ValueError(f"{bad} of {len(values)} {name} rows are not finite; extract them again")
