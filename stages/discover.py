"""discover@<run>-<dataset>: objects found without labels (LOST), CorLoc; metrics/discover/<run>/<dataset>.json, tables, picture.

The setting (feature, layer, normalisation, bias) is chosen on images that are not in the test split, and CorLoc reported
on those that are. Nothing is trained here, so train and val images serve alike for choosing.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from regvit.data.batches import Batches
from regvit.data.decoding import read_rgb
from regvit.data.manifest import Dataset, read_dataset
from regvit.data.whole_images import WholeTransform
from regvit.files import write_json, write_table
from regvit.measures.discovery import Measured, Setting, measure, settings
from regvit.measures.discovery_figures import feature_rows, image_rows, summary, sweep_rows
from regvit.models.backbones import Backbone, resized
from regvit.models.token_features import Feature, last_layers
from regvit.models.tokens import TokenLayout
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.runs import open_run
from regvit.stats.boxes import draw_boxes, true_boxes

PICTURES = 8


def main(run: str, dataset: str) -> None:
    params, runtime = load_params(), Runtime.load()
    chosen, seed = params["discover"], params["seed"]
    torch.set_float32_matmul_precision("medium")  # half of the time; features differ by some 1e-4 of themselves
    backbone = resized(open_run(Path(f"features/runs/{run}.json"), Path("data/backbones")), chosen["img_size"])
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
    write_json(out.with_suffix(".json"), metrics)
    write_rows(out / "sweep.csv", sweep_rows(tried))
    write_rows(out / "features.csv", feature_rows(tried, final))
    write_rows(out / "images.csv", image_rows(tried, final, test))
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


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    rows = list(rows)
    write_table(path, list(rows[0]), [row.values() for row in rows])


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/discover/{0}/{1}.json is not finished")
