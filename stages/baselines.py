"""baselines@<run>: logistic regression and nearest neighbours on the run's in-distribution features."""

from pathlib import Path

from tqdm.auto import tqdm

from regvit.data.manifest import read_dataset
from regvit.features.readouts import available
from regvit.features.store import FeatureStore
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.probing.logistic import fit_logistic
from regvit.probing.neighbours import Labelled, choose_neighbours
from regvit.probing.probes import Baselines, save_baselines
from regvit.probing.splits import open_splits


def main(run: str) -> None:
    params, runtime = load_params(), Runtime.load()
    dataset, settings = read_dataset(Path("data") / params.in_distribution), params.baselines
    store = FeatureStore.open(f"features/{run}/{params.in_distribution}.zarr", dataset.digest)
    train, val = open_splits(dataset, store, available(store.arrays, params.probe.readouts).names)
    found, n = Baselines({}, {}, dataset.classes, len(train.labels), len(val.labels)), len(dataset.classes)
    for name in tqdm(train.features, desc=f"baselines {run}", unit="readout"):
        if settings.neighbours:
            learn, choose = (Labelled(part.features[name], part.labels) for part in (train, val))
            found.knn[name] = choose_neighbours(
                learn, choose, n, settings.neighbours, settings.temperature, runtime.device
            )
        if settings.logistic:
            found.logistic[name] = fit_logistic(name, train, val, dataset.classes, settings.logistic)
    Path("features/baselines").mkdir(parents=True, exist_ok=True)
    save_baselines(f"features/baselines/{run}.safetensors", found)


if __name__ == "__main__":
    command(main, "run", interrupted="features/baselines/{0}.safetensors is not finished")
