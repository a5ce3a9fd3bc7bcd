"""segment@<run>-<dataset>: classes of pixels from patch tokens, by a linear layer; metrics/runs/<run>/segment/<dataset>/."""

from pathlib import Path

import numpy as np

from regvit.data.dense_labels import zero_is_ignored
from regvit.features.dense_set import DenseSet
from regvit.measures.dense import segmentation
from regvit.measures.dense.dense_heads import DenseTraining, PatchTokens
from regvit.measures.tables import write_results
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.stats.figures import write_csv


def main(run: str, name: str) -> None:
    params, device = load_params(), Runtime.load().device
    knobs, seed, out = (
        params.segment.model_dump(exclude={"datasets"}),
        params.seed,
        Path("metrics/runs") / run / "segment" / name,
    )
    data = Path("data") / name
    dense = DenseSet.open(data, Path("features/dense") / run / f"{name}.zarr")
    rows = {split: dense.rows(split, having="mask") for split in ("train", "val", "test")}
    tokens = {split: PatchTokens(dense.store, own) for split, own in rows.items()}
    names, ignored = ("background", *dense.dataset.classes), zero_is_ignored(data)

    def mask(row: int) -> np.ndarray:
        return segmentation.read_classes(dense.dataset.root / dense.dataset.rows[row].mask, len(names), ignored)

    training = DenseTraining(**knobs, seed=seed, device=device, label=f"segment {run}/{name}")
    segmenter = segmentation.train(tokens["train"], tokens["val"], mask, len(names), training)
    counts = segmentation.count(segmenter.layer.to(device), tokens["test"], mask, len(names), device)
    outliers, ids = dense.outliers(rows["test"]), dense.image_ids(rows["test"])
    found = segmentation.figures(segmenter, counts, outliers, seed)
    write_results(out, run, name, found, ids, segmentation.image_columns(counts, outliers))
    write_csv(out / "classes.csv", segmentation.class_table(counts, names, seed))
    write_csv(out / "pixels.csv", segmentation.pixel_table(counts, names, ids))
    print(f"{run}/{name}: " + ", ".join(f"{one.metric} {one.value}" for one in found))


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/segment/{1} is not finished")
