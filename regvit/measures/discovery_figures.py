"""The figures and tables of object discovery: what settings were chosen, and what they find on other images.

`tried` holds every setting on the images that it is chosen on, `final` the chosen ones on the test images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool

from regvit.data.manifest import Dataset
from regvit.measures.discovery import Measured, Setting, choose
from regvit.stats.accuracy import accuracy
from regvit.stats.bootstrap import mean_with_interval
from regvit.stats.boxes import HIT


def summary(tried: Measured, final: Measured, published: Setting | None, seed: int) -> dict:
    """CorLoc of the chosen setting and what stands beside it, each with its interval; the seed is of the bootstrap.

    `features`: of each kind, its own best setting; `mean_over_features`: over every kind and layer, each with its own
    best setting, so that it does not hang on one choice; `published`: the setting of the published code;
    `dino_seg`: the box from the CLS attention of the last block's best head.
    """
    winner = tried.best()
    kinds = dict.fromkeys(one.feature.kind for one in tried.settings)
    every = np.mean([final.hits(one) for one in tried.best_of_each()], axis=0)
    head = choose(tried.head_overlaps) if len(tried.head_overlaps) else None
    return {
        **corloc(final.hits(winner)),
        "n": len(every),
        "chosen": named(winner),
        "chosen_on": {**corloc(tried.hits(winner)), "n": tried.overlaps.shape[1]},
        "isolated": round(float(final.isolated[final.settings.index(winner)].mean()), 6),
        "features": {kind: {**named(tried.best(kind)), **corloc(final.hits(tried.best(kind)))} for kind in kinds},
        "mean_over_features": mean_with_interval("corloc", every, seed),
        "published": {**named(published), **corloc(final.hits(published))} if published else None,
        "dino_seg": None if head is None else {"head": head, **corloc(final.head_overlaps[head] >= HIT)},
    }


def named(setting: Setting) -> dict:
    """A setting as plain values."""
    return {**setting.feature._asdict(), "normalised": setting.normalised, "bias": setting.bias}


def corloc(hits: Bool[np.ndarray, " b"]) -> dict:
    """CorLoc, the share of images whose box meets an object, with its interval."""
    return {key: round(value, 6) for key, value in accuracy(hits).named("corloc").items()}


def sweep_rows(tried: Measured) -> Iterator[dict]:
    """Every setting on the images that it is chosen on."""
    for one, overlaps, isolated in zip(tried.settings, tried.overlaps, tried.isolated, strict=True):
        means = {"corloc": tried.hits(one).mean(), "iou": overlaps.mean(), "isolated": isolated.mean()}
        yield {**named(one), **{key: round(float(value), 6) for key, value in means.items()}}


def feature_rows(tried: Measured, final: Measured) -> Iterator[dict]:
    """Every feature with its chosen setting, on the test images."""
    for one in tried.best_of_each():
        yield {"name": str(one.feature), **named(one), **corloc(final.hits(one))}


def image_rows(tried: Measured, final: Measured, test: Dataset) -> Iterator[dict]:
    """Box and overlap of the chosen setting on every test image, and the hits of all that CorLoc is given for."""
    winner, best = final.settings.index(tried.best()), tried.best_of_each()
    columns = {f"hit_{kind}": final.hits(tried.best(kind)) for kind in dict.fromkeys(one.feature.kind for one in best)}
    columns["mean_over_features"] = np.mean([final.hits(one) for one in best], axis=0)
    if len(tried.head_overlaps):
        columns["hit_dino_seg"] = final.head_overlaps[choose(tried.head_overlaps)] >= HIT
    for i, row in enumerate(test.rows):
        box = dict(zip(("x0", "y0", "x1", "y1"), final.boxes[winner, i].round(2).tolist(), strict=True))
        hits = {
            name: round(float(values[i]), 6) if name.startswith("mean") else int(values[i])
            for name, values in columns.items()
        }
        overlap = float(final.overlaps[winner, i])
        yield {"image_id": row.image_id, **box, "iou": round(overlap, 6), "hit": int(overlap >= HIT), **hits}
