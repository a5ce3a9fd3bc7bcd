"""identify@<backbone>: finds the register neurons; features/neurons/<backbone>.json and what the search saw."""

import csv
import json
import sys
from pathlib import Path

import numpy as np

from params import load_params
from regvit.backbones import Backbone, load_backbone
from regvit.batches import Batches, sample
from regvit.intervals import mean_with_interval
from regvit.manifest import read_dataset
from regvit.neurons import RegisterNeurons, ablated, find_register_neurons
from regvit.outliers import patch_norms
from regvit.registers import add_test_time_registers
from runtime import Runtime

BINS = 60


def main(name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    options = dict(params["identify"])
    backbone = load_backbone(Path("data/backbones") / name)
    backbone.model.to(runtime.device)
    images = sample(
        read_dataset(Path("data") / params["in_distribution"]), "train", options.pop("images"), params["seed"]
    )
    batches = Batches(
        images, backbone.transform, runtime.batch_size, runtime.workers, runtime.device, f"identify {name}"
    )

    found = find_register_neurons(backbone.model, batches, **options)
    norms = found.norms
    cured = norms_after(backbone, batches, found)

    about = {"backbone": name, "weights_sha256": backbone.weights_sha256, "images": len(images), "seed": params["seed"]}
    neurons = Path(f"features/neurons/{name}.json")
    neurons.parent.mkdir(parents=True, exist_ok=True)
    neurons.write_text(found.to_json(**about))
    metrics = summary(found, norms, cured, backbone.planted, params["seed"])
    folder = Path("metrics/identify") / name
    folder.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".json").write_text(json.dumps({"images": len(images), **metrics}, indent=1) + "\n")
    write_plots(folder, found, norms, cured, backbone.planted)
    print(say(name, found, metrics))


def norms_after(backbone: Backbone, batches: Batches, found: RegisterNeurons) -> dict[str, np.ndarray]:
    """Norms in the detection layer with the neurons silenced, and with one test-time register; (b, p) each."""
    if not found.num_selected:
        return {}
    layer = [found.detection.layer]
    with ablated(backbone.model, found.selected):
        silenced = patch_norms(backbone.model, batches, layer)[0]
    with add_test_time_registers(backbone.model, found):
        moved = patch_norms(backbone.model, batches, layer)[0]
    return {"ablated": silenced, "after": moved}


def summary(found, norms, cured, planted, seed) -> dict:
    """What goes into metrics/identify/<backbone>.json."""
    layer = -2 if found.detection is None else found.detection.layer
    metrics = {
        "outliers_found": found.detection is not None,
        "detect_layer": None if found.detection is None else layer,
        "threshold": None if found.detection is None else round(found.detection.threshold, 4),
        **mean_with_interval("outlier_fraction", found.outlier_fraction, seed),
        **{
            f"outlier_fraction_{kind}": round(float((values > found.detection.threshold).mean()), 6)
            for kind, values in cured.items()
        },
        "largest_norm": round(float(norms[layer].max()), 4),
        "median_norm": round(float(np.median(norms[layer])), 4),
        "num_neurons": found.num_selected,
        "explained": round(found.explained, 6),
    }
    if planted:
        truth = {(layer, unit) for layer, units in planted.items() for unit in units}
        chosen = {(layer, unit) for layer, units in found.selected.items() for unit in units}
        metrics["precision"] = len(truth & chosen) / len(chosen) if chosen else 0.0
        metrics["recall"] = len(truth & chosen) / len(truth)
    return metrics


def write_plots(folder: Path, found, norms, cured, planted) -> None:
    """norms.csv (by layer), histogram.csv (before and after, in the detection layer) and scores.csv (by rank)."""

    def table(name: str, header: list[str], rows) -> None:
        with open(folder / name, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)

    table(
        "norms.csv",
        ["layer", "median", "p99", "max"],
        ([i, *(f"{v:.4f}" for v in (np.median(n), np.quantile(n, 0.99), n.max()))] for i, n in enumerate(norms)),
    )
    before = norms[-2 if found.detection is None else found.detection.layer]
    after = cured.get("after", before)
    logs = [np.log10(values.ravel()) for values in (before, after)]
    edges = np.linspace(min(v.min() for v in logs), max(v.max() for v in logs) + 1e-6, BINS + 1)
    counts = [np.histogram(values, edges)[0] for values in logs]
    centres = (edges[:-1] + edges[1:]) / 2
    table(
        "histogram.csv",
        ["log10_norm", "before", "after"],
        ([f"{c:.4f}", *n] for c, *n in zip(centres, *counts, strict=True)),
    )
    truth = {(layer, unit) for layer, units in (planted or {}).items() for unit in units}
    table(
        "scores.csv",
        ["rank", "layer", "neuron", "attribution", "activation", "selected", "planted"],
        (
            [i + 1, n.layer, n.neuron, n.attribution, n.activation,
             int(n.neuron in found.selected.get(n.layer, ())), int((n.layer, n.neuron) in truth)]
            for i, n in enumerate(found.neurons)
        ),
    )  # fmt: skip


def say(name: str, found: RegisterNeurons, metrics: dict) -> str:
    """One line for the terminal."""
    if found.detection is None:
        return f"{name}: no outliers (largest patch norm {metrics['largest_norm']:.3g}, median {metrics['median_norm']:.3g})"
    planted = (
        f"; planted: precision {metrics['precision']:g}, recall {metrics['recall']:g}" if "recall" in metrics else ""
    )
    return (
        f"{name}: {metrics['outlier_fraction']:.2%} of patches are outliers (norm over {metrics['threshold']:.3g} in block "
        f"{metrics['detect_layer']}); {found.num_selected} register neurons write {found.explained:.1%} of their excess"
        f"{planted}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
