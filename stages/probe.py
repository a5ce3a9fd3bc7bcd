"""probe@<run>: linear probes, logistic regression and neighbours on the run's in-distribution features.

Leaves features/<run>/probes.safetensors. Training that takes long keeps a checkpoint in work/, outside DVC's outputs;
interrupted, it is resumed by running it again.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from regvit.data.manifest import read_dataset
from regvit.data.progress import progress
from regvit.features.readouts import available
from regvit.features.store import FeatureStore, fingerprint
from regvit.features.stored_readouts import stored_readouts
from regvit.files import write_json, write_table
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.probing.logistic import fit_logistic
from regvit.probing.neighbours import choose_neighbours
from regvit.probing.probes import ProbeSet, Training, save_probes, train_probes
from regvit.stats.accuracy import accuracy


def main(run: str) -> None:
    params, runtime = load_params(), Runtime.load()
    dataset = read_dataset(Path("data") / params["in_distribution"])
    settings = params.probe.model_dump() | params.baselines.model_dump()
    store = FeatureStore.open(Path("features") / run / f"{params['in_distribution']}.zarr", dataset.digest)
    readouts = available(store.arrays, settings["readouts"])
    for name, reason in readouts.left_out.items():
        print(f"{run}: readout {name} is left out: {reason}")
    labels = dataset.labels()
    rows = {split: dataset.split_rows(split) for split in ("train", "val")}
    train, val = (stored_readouts(store, readouts.names, rows[split]) for split in ("train", "val"))
    data = (train, labels[rows["train"]], val, labels[rows["val"]])

    seeds = [params["seed"] + s for s in range(settings["seeds"])]
    # Named by all that decides the probes, in the main repository, as the working folders of `extract` are.
    made = fingerprint({"settings": settings, "seeds": seeds, "features": store.attributes})
    work = Path(os.environ.get("DVC_ROOT", ".")) / "work" / f"probe-{run}-{made[:12]}.partial"
    with progress(settings["steps"], f"probe {run}", "steps") as bar:
        for other in sorted(set(work.parent.glob(f"probe-{run}-*.partial")) - {work}):
            bar.line(f"{other} is unfinished and was made with other settings; delete it if it is not wanted any more")
        training = train_probes(
            *data,
            dataset.classes,
            settings["learning_rates"],
            settings["steps"],
            settings["batch_size"],
            settings["weight_decay"],
            seeds,
            momentum=settings["momentum"],
            schedule=settings["schedule"],
            standardise=settings["standardise"],
            channels=store.arrays["cls"][-1] if "cls" in store.arrays else None,
            device=runtime.device,
            work=work,
            progress=bar,
        )
    probes = replace(add_others(training.probes, data, settings, runtime.device), origin=store.attributes)
    save_probes(f"features/{run}/probes.safetensors", probes)
    out = Path("metrics/probe") / run
    out.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), metrics(probes))
    write_curves(out / "curves.csv", training)
    shutil.rmtree(work)
    for name, of_seeds in probes.probes.items():
        rates = sorted({probe.learning_rate for probe in of_seeds})
        end = " (an end of the grid: widen learning_rates)" if set(rates) & grid_ends(probes.learning_rates) else ""
        top1 = np.mean([probe.val_correct for probe in of_seeds]) / probes.val_images
        print(f"{run}: {name} {top1:.4f} on validation, learning rate {', '.join(f'{rate:g}' for rate in rates)}{end}")


def add_others(probes: ProbeSet, data: tuple, settings: dict, device: str) -> ProbeSet:
    """The same with logistic regression and neighbours (null in the params: none), for each readout."""
    train, labels, val, val_labels = data
    classes, grid, neighbours = probes.classes, settings["logistic"], settings["neighbours"]
    logistic, knn = {}, {}
    with progress(len(train), "neighbours and logistic regression", "readouts") as bar:
        for name, x in train.items():
            if neighbours:
                knn[name] = choose_neighbours(x, labels, val[name], val_labels, len(classes), neighbours,
                                              settings["temperature"], device)  # fmt: skip
            if grid:
                logistic[name] = fit_logistic(name, x, labels, val[name], val_labels, classes, grid)
            bar.advance()
    return replace(probes, logistic=logistic, knn=knn)


def metrics(probes: ProbeSet) -> dict:
    """Validation accuracy of each classifier by readout, and the settings that won.

    `val_top1` and its interval are means over the seeds: all are right or wrong on the same images, so that more seeds do
    not make the interval narrower.
    """
    table = {}
    for name, of_seeds in probes.probes.items():
        estimates = [top1(probe.val_correct, probes) for probe in of_seeds]
        table[name] = {
            **{key: round(float(np.mean([e[key] for e in estimates])), 6) for key in estimates[0] if key != "n"},
            "n": probes.val_images,
            "n_train": probes.train_images,
            "seeds": [probe.seed for probe in of_seeds],
            "learning_rates": [probe.learning_rate for probe in of_seeds],
            "val_top1_of_seeds": [e["val_top1"] for e in estimates],
        }
        if name in probes.knn:
            table[name]["knn"] = top1(probes.knn[name].val_correct, probes) | {"k": probes.knn[name].k}
        if name in probes.logistic:
            table[name]["logistic"] = top1(probes.logistic[name].val_correct, probes) | {"C": probes.logistic[name].C}
    return table


def top1(correct: int, probes: ProbeSet) -> dict:
    estimate = accuracy(np.arange(probes.val_images) < correct).named("val_top1")
    return {key: round(value, 6) for key, value in estimate.items()} | {"n": probes.val_images}


def write_curves(path: Path, training: Training) -> None:
    """Every second point of the curves, the last one among them: half the rows show as much."""
    shown = set(sorted({point.step for point in training.curves})[::-2])
    rows = [
        (p.readout, p.learning_rate, p.step, round(p.train_loss, 6), round(p.val_top1, 6))
        for p in training.curves
        if p.step in shown
    ]
    write_table(path, ["readout", "learning_rate", "step", "train_loss", "val_top1"], rows)


def grid_ends(rates: tuple[float, ...]) -> set[float]:
    return {min(rates), max(rates)} if len(rates) > 1 else set()


if __name__ == "__main__":
    command(
        main, "run", interrupted="features/{0}/probes.safetensors is not finished, and training goes on where it was"
    )
