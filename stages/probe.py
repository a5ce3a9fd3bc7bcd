"""probe@<run>: linear probes on the run's in-distribution features; their curves grow while they train.

Training that takes long keeps a checkpoint in work/, outside DVC's outputs; interrupted, it is resumed by running it again.
"""

import os
import shutil
from pathlib import Path

from dvclive import Live
from tqdm.auto import tqdm

from regvit.data.manifest import read_dataset
from regvit.features.readouts import available
from regvit.features.store import FeatureStore, fingerprint
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.probing.checkpoints import Checkpoint
from regvit.probing.probes import at_end_of_grid, save_probes, validation_figures
from regvit.probing.splits import open_splits
from regvit.probing.training import Settings, train_probes
from regvit.stats.figures import figures_table, write_figures


def main(run: str) -> None:
    params, runtime = load_params(), Runtime.load()
    dataset = read_dataset(Path("data") / params.in_distribution)
    store = FeatureStore.open(f"features/{run}/{params.in_distribution}.zarr", dataset.digest)
    readouts = available(store.arrays, params.probe.readouts)
    for name, reason in readouts.left_out.items():
        print(f"{run}: readout {name} is left out: {reason}")
    chosen = params.probe.model_dump(exclude={"readouts", "seeds"})
    settings = Settings(**chosen, seeds=tuple(params.seed + s for s in range(params.probe.seeds)))
    # Named by all that decides the probes, in the main repository, as the working folders of `extract` are.
    made = fingerprint({"settings": params.probe.model_dump(), "seed": params.seed, "features": store.attributes})
    work = Path(os.environ.get("DVC_ROOT", ".")) / "work" / f"probe-{run}-{made[:12]}.partial"
    out = Path("metrics/runs") / run / "probe"
    with (
        Live(dir=str(out / "curves"), save_dvc_exp=False, dvcyaml=None, report=None) as live,
        tqdm(total=settings.steps, desc=f"probe {run}", unit="step") as bar,
    ):

        def on_point(step: int, accuracies: dict[str, float]) -> None:
            live.step = step
            for name, value in accuracies.items():
                live.log_metric(f"{name}/val_top1", value)
            live.make_summary()
            bar.update(step - bar.n)

        train, val = open_splits(dataset, store, readouts.names)
        probes = train_probes(
            train, val, dataset.classes, settings, runtime.device, Checkpoint(work, tell=bar.write), on_point
        )
    (out / "curves/metrics.json").unlink()  # its last values: no table that DVC could plot
    Path("features/probes").mkdir(parents=True, exist_ok=True)
    save_probes(f"features/probes/{run}.safetensors", probes)
    figures = figures_table(validation_figures(probes), run, params.in_distribution)
    write_figures(out / "figures.csv", figures)
    shutil.rmtree(work, ignore_errors=True)
    print(figures[["readout", "metric", "value", "lo", "hi"]].to_string(index=False))
    for name in at_end_of_grid(probes):
        print(f"{run}: the learning rate of {name} is an end of the grid: widen probe.learning_rates")


if __name__ == "__main__":
    command(
        main, "run", interrupted="features/probes/{0}.safetensors is not finished, and training goes on where it was"
    )
