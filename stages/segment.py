"""segment@<run>-<dataset>: classes of pixels from patch tokens, by a linear layer; metrics/segment/<run>/<dataset>.json.

Beside it tables, IoU by class and one row an image, and features/<run>/segment/<dataset>.safetensors: counts of each
image, with which runs are compared in pairs.
"""

from pathlib import Path

import numpy as np

from regvit.data.dense_labels import zero_is_ignored
from regvit.data.progress import progress
from regvit.files import write_json
from regvit.measures.dense import ImageValues, save_image_values
from regvit.measures.segmentation import Segmenter, count, read_classes, summary, train
from regvit.pipeline.command import command
from regvit.pipeline.dense_stage import DenseSet, about, open_set, untreated_outliers, write_table
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.stats.miou import Counts, class_ious_with_interval, image_miou


def main(run: str, name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    of = open_set(run, name, "mask", "segment")
    segmenter, counts = measure(run, of, params["segment"], params["seed"], runtime)
    outliers = untreated_outliers(run, of, params["patches"]["img_size"], runtime)
    out = Path("metrics/segment") / run / name
    out.mkdir(parents=True, exist_ok=True)
    metrics = summary(segmenter, counts, outliers, params["seed"])
    write_json(out.with_suffix(".json"), metrics)
    write_tables(out, of, counts, outliers, params["seed"])
    values = {key: array.astype(np.int32) for key, array in vars(counts).items()}
    path = Path("features") / run / "segment" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image_values(path, "segmentation", ImageValues(values, outliers, about(run, of)))
    shown = ("miou", "accuracy", "accuracy_at_outliers", "accuracy_elsewhere")
    print(f"{run}/{name}: " + ", ".join(f"{key} {metrics[key]}" for key in shown))


def measure(run: str, of: DenseSet, knobs: dict, seed: int, runtime: Runtime) -> tuple[Segmenter, Counts]:
    """Trains on train, chooses on val, counts on test."""
    n_classes = 1 + len(of.dataset.classes)  # background

    unannotated = zero_is_ignored(Path("data") / of.dataset.name)

    def mask(row: int) -> np.ndarray:
        return read_classes(of.dataset.root / of.dataset.rows[row].mask, n_classes, unannotated)

    with progress(knobs["steps"], f"segment {run}/{of.dataset.name}", "steps") as bar:
        segmenter = train(
            of.tokens["train"],
            of.tokens["val"],
            mask,
            n_classes,
            knobs["learning_rates"],
            knobs["weight_decays"],
            knobs["steps"],
            knobs["batch_size"],
            seed,
            runtime.device,
            bar.advance,
        )
    return segmenter, count(segmenter.layer, of.tokens["test"], mask, n_classes, runtime.device)


def write_tables(out: Path, of: DenseSet, counts: Counts, outliers: np.ndarray | None, seed: int) -> None:
    """classes.csv; images.csv: right and counted pixels, all and at outliers; pixels.csv: those of each class in each image."""
    names = ("background", *of.dataset.classes)
    found = zip(names, class_ious_with_interval(counts, seed), strict=True)
    rows = [(name, one.value, one.lo, one.hi, one.n) for name, one in found if one is not None]
    write_table(out / "classes.csv", ("class", "iou", "iou_lo", "iou_hi", "images"), rows)
    at = np.zeros_like(counts.counted) if outliers is None else outliers
    right, counted = counts.right.sum(1), counts.counted.sum(1)
    columns = (image_miou(counts), right, counted, (counts.right * at).sum(1), (counts.counted * at).sum(1))
    rows = [(row.image_id, *values) for row, *values in zip(of.tested, *columns, strict=True)]
    write_table(out / "images.csv", ("image_id", "miou", "right", "pixels", "right_at_outliers", "at_outliers"), rows)
    by_class = np.stack([counts.intersection, counts.predicted, counts.actual], axis=2)  # (b, c, 3)
    rows = [(of.tested[b].image_id, names[c], c, *by_class[b, c]) for b, c in np.argwhere(by_class.any(2))]
    write_table(out / "pixels.csv", ("image_id", "class", "mask_value", "right", "predicted", "actual"), rows)


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/segment/{0}/{1}.json is not finished")
