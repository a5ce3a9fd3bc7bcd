"""hummingbird@<run>-<dataset>: classes of pixels from the nearest patches of a memory, nothing trained;
metrics/runs/<run>/hummingbird/<dataset>/."""

from pathlib import Path

import numpy as np

from regvit.data.decoding import read_rgb
from regvit.data.dense_labels import zero_is_ignored
from regvit.features.dense_set import DenseSet
from regvit.measures.dense import segmentation
from regvit.measures.dense.dense_heads import PatchTokens
from regvit.measures.tables import write_results
from regvit.measures.training_free.hummingbird import InContext, remember
from regvit.measures.training_free.pictures import draw_masks
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.stats.figures import write_csv

PICTURES = 8


def main(run: str, name: str) -> None:
    params, device = load_params(), Runtime.load().device
    knobs, seed, out = params.hummingbird, params.seed, Path("metrics/runs") / run / "hummingbird" / name
    data = Path("data") / name
    dense = DenseSet.open(data, Path("features/dense") / run / f"{name}.zarr")
    learn, test = (dense.rows(split, having="mask") for split in ("train", "test"))
    if knobs.images is not None:
        test = test[: knobs.images]
    tokens = PatchTokens(dense.store, test)
    names, ignored = ("background", *dense.dataset.classes), zero_is_ignored(data)

    def mask(row: int) -> np.ndarray:
        return segmentation.read_classes(dense.dataset.root / dense.dataset.rows[row].mask, len(names), ignored)

    how = InContext(knobs.memory, knobs.neighbours, knobs.temperature, seed)
    memory = remember(PatchTokens(dense.store, learn), mask, len(names), how, device)
    counts = segmentation.count(memory, tokens, mask, len(names), device)
    outliers, ids = dense.outliers(test), dense.image_ids(test)
    found = segmentation.count_figures(counts, outliers, seed)
    write_results(out, run, name, found, ids, segmentation.image_columns(counts, outliers))
    write_csv(out / "classes.csv", segmentation.class_table(counts, names, seed))
    write_csv(out / "pixels.csv", segmentation.pixel_table(counts, names, ids))
    first = PatchTokens(dense.store, test[:PICTURES])
    guesses = [guess for _, patches in first.in_order() for guess in memory(patches).argmax(1).cpu().numpy()]
    pictures = [read_rgb(dense.dataset.image_path(row)) for row in first.rows]
    draw_masks(out / "masks.png", pictures, [mask(row) for row in first.rows], guesses)
    print(f"{run}/{name}, memory of {len(memory.labels)}: " + ", ".join(f"{one.metric} {one.value}" for one in found))


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/hummingbird/{1} is not finished")
