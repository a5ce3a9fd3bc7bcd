"""Retrieval: whether what is sought stands first among the images of a gallery, sorted by cosine to a query.

For a query with positives P (images that show what is sought) and junk J (neither right nor wrong, taken out of the
ranking), and r₁ < r₂ < … the ranks of P, from 1:

    recall@k = 1 if r₁ ≤ k else 0,    AP = 1/|P| Σᵢ i / rᵢ,    mAP = mean over queries

Published AP of Oxford and Paris is the area by trapezoids, 1/|P| Σᵢ (i / rᵢ + (i − 1) / (rᵢ − 1)) / 2, where the second
term is 1 at rᵢ = 1; lists of these sets are measured so.

Who is sought: of a data set with `relevant.csv` (rows `query, image_id, relation`, the relation `positive` or `junk`), what
it says, within that set; of others the image of the same name in the gallery, such as an emoji in another drawing style.

Sources: Philbin et al. 2007, CVPR (Oxford buildings); Radenović et al. 2018, arXiv:1803.11285. Shape letters: q query,
n image of the gallery, d channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from regvit.features.stored_readouts import blocks
from regvit.stats.bootstrap import mean_over_images
from regvit.stats.figures import Figure

FILE = "relevant.csv"
QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Sought:
    """One query: what is sought, as rows of the gallery.

    Attributes:
        query: row of the queries.
        junk: taken out of the ranking; the query itself, where it lies in the gallery.
    """

    query: int
    positives: Int[np.ndarray, " n"]
    junk: Int[np.ndarray, " n"]


def same_name(queries: Sequence[str], gallery: Sequence[str]) -> list[Sought]:
    """Each query that the gallery has an image of the same name of.

    Raises:
        ValueError: there are none.
    """
    place = {name: i for i, name in enumerate(gallery)}
    none = np.array([], dtype=int)
    found = [Sought(i, np.array([place[name]]), none) for i, name in enumerate(queries) if name in place]
    if not found:
        raise ValueError("no query has an image of the same name in the gallery; take sets of the same identities")
    return found


def listed(path: Path, images: Sequence[str]) -> list[Sought]:
    """The queries of a `relevant.csv`; no query is part of the gallery.

    Raises:
        ValueError: an image is not there, a relation is unknown, or a query has no positive.
    """
    table = pd.read_csv(path, dtype=str)
    place = {name: i for i, name in enumerate(images)}
    if strange := sorted({*table["query"], *table["image_id"]} - place.keys()):
        raise ValueError(f"{path} names {strange[0]!r}, which is no image of the data set")
    if strange := sorted(set(table["relation"]) - {"positive", "junk"}):
        raise ValueError(f"{path} has the relation {strange[0]!r}; expected positive or junk")
    queries, found = sorted({place[name] for name in table["query"]}), []
    for name, own in table.groupby("query", sort=False):
        rows = {relation: each["image_id"].map(place).to_numpy(int) for relation, each in own.groupby("relation")}
        if "positive" not in rows:
            raise ValueError(f"{path}: query {name!r} has no positive; take it out of the list")
        junk = np.unique([*rows.get("junk", ()), *queries]).astype(int)
        found.append(Sought(place[name], rows["positive"], np.setdiff1d(junk, rows["positive"])))
    return found


def positive_ranks(
    queries: Float[np.ndarray, "q d"], gallery: Float[np.ndarray, "n d"], sought: Sequence[Sought]
) -> Iterator[Int[np.ndarray, " p"]]:
    """Of each query the ranks of its positives, from 1, ascending; of equal cosines the first row comes first."""
    unit = _unit(gallery)
    for part in blocks(len(sought), QUERIES_AT_ONCE):
        cosines = _unit(queries[[one.query for one in sought[part]]]) @ unit.T
        for one, row in zip(sought[part], cosines, strict=True):
            row[one.junk] = -np.inf
            order = np.argsort(-row, kind="stable")
            yield np.sort(np.argsort(order, kind="stable")[one.positives]) + 1


def average_precision(ranks: Int[np.ndarray, " p"], trapezoids: bool = False) -> float:
    """Of the ranks of all positives, ascending.

    Args:
        trapezoids: as the published code of Oxford and Paris.
    """
    i = np.arange(1, len(ranks) + 1)
    precision = i / ranks
    if trapezoids:
        before = np.where(ranks > 1, (i - 1) / np.maximum(ranks - 1, 1), 1.0)
        precision = (precision + before) / 2
    return float(precision.mean())


def columns(ranks: Sequence[Int[np.ndarray, " p"]], ks: Sequence[int], trapezoids: bool) -> dict[str, np.ndarray]:
    """`map` and `recall<k>` of every query."""
    found = {"map": np.array([average_precision(each, trapezoids) for each in ranks])}
    return found | {f"recall{k}": np.array([float(each[0] <= k) for each in ranks]) for k in ks}


def figures(by_readout: dict[str, dict[str, np.ndarray]], seed: int = 0) -> list[Figure]:
    """Each as `<metric>_<readout>`, its interval over queries."""
    return [Figure.of(name, mean_over_images(values, seed)) for name, values in image_columns(by_readout).items()]


def image_columns(by_readout: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The same by query."""
    return {f"{name}_{readout}": values for readout, own in by_readout.items() for name, values in own.items()}


def _unit(values: np.ndarray) -> Float[np.ndarray, "n d"]:
    values = np.asarray(values, dtype=np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
