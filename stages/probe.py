"""probe@<run>: linear probes on the run's in-distribution features; features/<run>/probes.safetensors."""

import csv
import json
import sys
from pathlib import Path

import numpy as np

from params import load_params
from regvit.manifest import InvalidManifest, read_dataset
from regvit.metrics import accuracy
from regvit.probes import Training, save_probes, train_probes
from regvit.progress import progress
from regvit.readouts import available, read_all
from regvit.store import FeatureStore, InvalidStore
from runtime import Runtime


def main(run: str) -> None:
    params, runtime = load_params(), Runtime.load()
    training = train(run, params, runtime)
    save_probes(f"features/{run}/probes.safetensors", training.probes)
    out = Path("metrics/probe") / run
    out.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(metrics(training), indent=1) + "\n")
    with open(out / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["readout", "learning_rate", "step", "train_loss", "val_top1"])
        for p in training.curves:
            writer.writerow([p.readout, p.learning_rate, p.step, round(p.train_loss, 6), round(p.val_top1, 6)])
    for name, probe in training.probes.probes.items():
        end = " (an end of the grid: widen learning_rates)" if probe.learning_rate in grid_ends(training) else ""
        top1 = probe.val_correct / training.probes.val_images
        print(f"{run}: {name} {top1:.4f} on validation, learning rate {probe.learning_rate:g}{end}")


def train(run: str, params: dict, runtime: Runtime) -> Training:
    """Trains on the train split and chooses on the val split; readouts that the run cannot give are named and left."""
    dataset, settings = read_dataset(Path("data") / params["in_distribution"]), params["probe"]
    store = FeatureStore.open(Path("features") / run / f"{params['in_distribution']}.zarr", dataset.digest)
    readouts = available(store.arrays, settings["readouts"])
    for name, reason in readouts.left_out.items():
        print(f"{run}: readout {name} is left out: {reason}")
    features, labels = read_all(store, readouts.names), dataset.labels()
    rows = {split: np.flatnonzero([row.split == split for row in dataset.rows]) for split in ("train", "val")}
    with progress(settings["steps"], f"probe {run}", "steps") as bar:
        return train_probes(
            {name: values[rows["train"]] for name, values in features.items()},
            labels[rows["train"]],
            {name: values[rows["val"]] for name, values in features.items()},
            labels[rows["val"]],
            dataset.classes,
            settings["learning_rates"],
            steps=settings["steps"],
            batch_size=settings["batch_size"],
            weight_decay=settings["weight_decay"],
            seed=params["seed"],
            device=runtime.device,
            on_step=bar.advance,
        )


def metrics(training: Training) -> dict:
    """Validation accuracy and winning learning rate by readout."""
    n = training.probes.val_images
    table = {}
    for name, probe in training.probes.probes.items():
        top1 = accuracy(np.arange(n) < probe.val_correct).named("val_top1")
        table[name] = {key: round(value, 6) for key, value in top1.items()} | {
            "n": n,
            "n_train": training.probes.train_images,
            "learning_rate": probe.learning_rate,
        }
    return table


def grid_ends(training: Training) -> set[float]:
    rates = training.probes.learning_rates
    return {min(rates), max(rates)} if len(rates) > 1 else set()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python stages/probe.py <run>")
    try:
        main(sys.argv[1])
    except (FileNotFoundError, InvalidManifest, InvalidStore) as error:
        sys.exit(f"probe: {error}")
