"""depth@<run>-<dataset>: depth of pixels from patch tokens, by a linear layer; metrics/runs/<run>/depth/<dataset>/."""

from pathlib import Path

import numpy as np

from regvit.data.dense_labels import read_depth
from regvit.features.dense_set import DenseSet
from regvit.measures.dense import depth
from regvit.measures.dense.dense_heads import DenseTraining, PatchTokens
from regvit.measures.tables import write_results
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime

OF_BINS = ("min_depth", "max_depth", "crop", "bins", "upsample")


def main(run: str, name: str) -> None:
    params, device = load_params(), Runtime.load().device
    knobs, seed, out = (
        params.depth.model_dump(exclude={"datasets"}),
        params.seed,
        Path("metrics/runs") / run / "depth" / name,
    )
    bins = depth.DepthBins(**{key: knobs.pop(key) for key in OF_BINS})
    dense = DenseSet.open(Path("data") / name, Path("features/dense") / run / f"{name}.zarr")
    rows = {split: dense.rows(split, having="depth") for split in ("train", "val", "test")}
    tokens = {split: PatchTokens(dense.store, own) for split, own in rows.items()}

    def truth(row: int) -> np.ndarray:
        return read_depth(dense.dataset.root / dense.dataset.rows[row].depth)

    training = DenseTraining(**knobs, seed=seed, device=device, label=f"depth {run}/{name}")
    model = depth.train(tokens["train"], tokens["val"], truth, bins, training)
    measured = depth.measure(model, tokens["test"], truth, device)
    outliers = dense.outliers(rows["test"])
    found = depth.figures(model, measured, outliers, seed)
    write_results(out, run, name, found, dense.image_ids(rows["test"]), depth.image_columns(measured, outliers))
    print(f"{run}/{name}: " + ", ".join(f"{one.metric} {one.value}" for one in found))


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/depth/{1} is not finished")
