"""depth@<run>-<dataset>: depth from patch tokens, by a linear layer on bins; metrics/depth/<run>/<dataset>.json.

Beside it a table of one row an image, and features/<run>/depth/<dataset>.safetensors: errors of each image and patch,
with which runs are compared in pairs.
"""

from pathlib import Path

import numpy as np

from regvit.data.dense_labels import read_depth
from regvit.data.progress import progress
from regvit.files import write_json
from regvit.measures.dense import ImageValues, save_image_values
from regvit.measures.depth import DepthModel, Measured, Range, rmse_within, summary, train
from regvit.measures.depth import measure as measure_errors
from regvit.pipeline.command import command
from regvit.pipeline.dense_stage import DenseSet, about, open_set, untreated_outliers, write_table
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime


def main(run: str, name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    of = open_set(run, name, "depth", "depth")
    model, measured = measure(run, of, params["depth"], params["seed"], runtime)
    outliers = untreated_outliers(run, of, params["patches"]["img_size"], runtime)
    out = Path("metrics/depth") / run / name
    out.mkdir(parents=True, exist_ok=True)
    metrics = summary(model, measured, outliers, params["seed"])
    write_json(out.with_suffix(".json"), metrics)
    errors = vars(measured.errors)
    at = np.zeros(measured.counted.shape, dtype=bool) if outliers is None else outliers
    columns = {**errors, "rmse_at_outliers": rmse_within(measured, at)}
    rows = [(row.image_id, *values) for row, *values in zip(of.tested, *columns.values(), strict=True)]
    write_table(out / "images.csv", ("image_id", *columns), rows)
    values = {**errors, "squared": measured.squared, "relative": measured.relative, "counted": measured.counted}
    path = Path("features") / run / "depth" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image_values(path, "depth", ImageValues(values, outliers, about(run, of)))
    shown = ("rmse", "abs_rel", "delta1", "rmse_at_outliers", "rmse_elsewhere")
    print(f"{run}/{name}: " + ", ".join(f"{key} {metrics[key]}" for key in shown))


def measure(run: str, of: DenseSet, knobs: dict, seed: int, runtime: Runtime) -> tuple[DepthModel, Measured]:
    """Trains on train, chooses on val, measures on test."""

    def truth(row: int) -> np.ndarray:
        return read_depth(of.dataset.root / of.dataset.rows[row].depth)

    with progress(knobs["steps"], f"depth {run}/{of.dataset.name}", "steps") as bar:
        model = train(
            of.tokens["train"],
            of.tokens["val"],
            truth,
            Range(knobs["min_depth"], knobs["max_depth"], knobs["crop"]),
            knobs["learning_rates"],
            knobs["weight_decays"],
            knobs["steps"],
            knobs["batch_size"],
            seed,
            knobs["bins"],
            knobs["upsample"],
            runtime.device,
            bar.advance,
        )
    return model, measure_errors(model, of.tokens["test"], truth, runtime.device)


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/depth/{0}/{1}.json is not finished")
