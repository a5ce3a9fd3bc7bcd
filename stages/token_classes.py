"""token_classes@<run>-<dataset>: the class of an image from one of its tokens; metrics/runs/<run>/token_classes/<dataset>/."""

from pathlib import Path

from regvit.features.dense_set import DenseSet
from regvit.measures.tables import mean_figures, write_results
from regvit.measures.token_classes import class_columns, drawn_tokens, learned_classes
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.probing.training import Settings


def main(run: str, name: str) -> None:
    params, device = load_params(), Runtime.load().device
    chosen, seed = params.token_classes, params.seed
    dense = DenseSet.open(Path("data") / name, Path("features/dense") / run / f"{name}.zarr", device)
    train, val, test = (dense.rows(split, having="label") for split in ("train", "val", "test"))
    settings = Settings(chosen.learning_rates, chosen.steps, chosen.batch_size, seeds=(seed,))
    probes = learned_classes(
        drawn_tokens(dense, train, seed), drawn_tokens(dense, val, seed), dense.dataset.classes, settings, device
    )
    columns = class_columns(dense, test, probes)
    found, out = mean_figures(columns, seed), Path("metrics/runs") / run / "token_classes" / name
    write_results(out, run, name, found, dense.image_ids(test), columns)
    shown = [one for one in found if one.value is not None]
    print(f"{run}/{name}: " + ", ".join(f"{one.metric} {one.value:.4g}" for one in shown))


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/token_classes/{1} is not finished")
