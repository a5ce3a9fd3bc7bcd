"""discover@<run>-<dataset>: objects found without labels (LOST), CorLoc; metrics/discover/<run>/<dataset>.json, tables, picture.

The setting (feature, layer, normalisation, bias) is chosen on images that are not in the test split, and CorLoc reported
on those that are. Nothing is trained here, so train and val images serve alike for choosing.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from params import load_params
from regvit.backbones import Backbone, resized
from regvit.batches import Batches
from regvit.boxes import HIT, draw_boxes, true_boxes
from regvit.discovery import Measured, Setting, choose, measure, settings
from regvit.images import read_rgb
from regvit.intervals import mean_with_interval
from regvit.manifest import Dataset, read_dataset
from regvit.metrics import accuracy
from regvit.runs import open_run
from regvit.token_features import Feature, last_layers
from regvit.tokens import TokenLayout
from regvit.whole_images import WholeTransform
from runtime import Runtime

PICTURES = 8


def main(run: str, dataset: str) -> None:
    params, runtime = load_params(), Runtime.load()
    chosen, seed = params["discover"], params["seed"]
    torch.set_float32_matmul_precision("medium")  # half of the time; features differ by some 1e-4 of themselves
    backbone = resized(open_run(Path("features") / run / "run.json", Path("data/backbones")), chosen["img_size"])
    backbone.model.to(runtime.device)
    whole, out = read_dataset(Path("data") / dataset), Path("metrics/discover") / run / dataset
    out.mkdir(parents=True, exist_ok=True)
    learn = drawn(with_boxes(whole, "train", "val"), chosen["choose_images"], seed)
    test = with_boxes(whole, "test")
    features = last_layers(backbone.model, chosen["layers"], chosen["features"])
    tried = look(backbone, learn, settings(features, chosen["normalised"], chosen["biases"]), chosen, runtime)
    published = Setting(Feature("k", features[-1].layer), False, 0.0) if "k" in chosen["features"] else None
    kept = dict.fromkeys((*tried.best_of_each(), *([published] if published else [])))
    final = look(backbone, test, tuple(kept), chosen, runtime)
    metrics = summary(tried, final, published, seed) | {"without_boxes": sum(not row.boxes for row in whole.rows)}
    out.with_suffix(".json").write_text(json.dumps(metrics, indent=1) + "\n")
    write_table(out / "sweep.csv", sweep_rows(tried))
    write_table(out / "features.csv", feature_rows(tried, final))
    write_table(out / "images.csv", image_rows(tried, final, test))
    pictured, winner = range(min(PICTURES, len(test))), final.settings.index(tried.best())
    draw_boxes(
        out / "boxes.png",
        [read_rgb(test.image_path(i)) for i in pictured],
        true_boxes(test)[:PICTURES],
        [final.boxes[winner, i : i + 1] for i in pictured],
    )
    print(f"{run}/{dataset}: CorLoc {metrics['corloc']:.4f} of {metrics['n']} images, {metrics['chosen']}")


def with_boxes(dataset: Dataset, *splits: str) -> Dataset:
    """The images of some splits that have a box: without one there is nothing to find."""
    rows = tuple(row for row in dataset.rows if row.split in splits and row.boxes)
    if not rows:
        raise ValueError(
            f"data set {dataset.name} has no {' or '.join(splits)} images with boxes; discovery needs some"
        )
    return dataclasses.replace(dataset, rows=rows)


def drawn(dataset: Dataset, count: int, seed: int) -> Dataset:
    """At most `count` of the images, drawn by the seed, in their order."""
    order = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count])
    return dataclasses.replace(dataset, rows=tuple(dataset.rows[i] for i in order))


def look(backbone: Backbone, dataset: Dataset, tried: tuple[Setting, ...], chosen: dict, runtime: Runtime) -> Measured:
    """What every setting finds in the images, and every head of the CLS attention where there is a CLS token."""
    transform = WholeTransform.of(backbone.transform, chosen["fit"])
    label = f"discover, {len(tried)} settings"
    batches = Batches(dataset, transform, runtime.batch_size, runtime.workers, runtime.device, label)
    return measure(backbone.model, batches, tried, chosen["k_patches"], heads=bool(TokenLayout.of(backbone.model).cls))


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
    return {**setting.feature._asdict(), "normalised": setting.normalised, "bias": setting.bias}


def corloc(hits: np.ndarray) -> dict:
    return {key: round(value, 6) for key, value in accuracy(hits).named("corloc").items()}


def sweep_rows(tried: Measured) -> Iterable[dict]:
    """Every setting on the images that it is chosen on."""
    for one, overlaps, isolated in zip(tried.settings, tried.overlaps, tried.isolated, strict=True):
        means = {"corloc": tried.hits(one).mean(), "iou": overlaps.mean(), "isolated": isolated.mean()}
        yield {**named(one), **{key: round(float(value), 6) for key, value in means.items()}}


def feature_rows(tried: Measured, final: Measured) -> Iterable[dict]:
    """Every feature with its chosen setting, on the test images."""
    for one in tried.best_of_each():
        yield {"name": str(one.feature), **named(one), **corloc(final.hits(one))}


def image_rows(tried: Measured, final: Measured, test: Dataset) -> Iterable[dict]:
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


def write_table(path: Path, rows: Iterable[dict]) -> None:
    rows = list(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
