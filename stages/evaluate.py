"""evaluate@<run>: the run's probes on the test images of every data set; metrics/evaluate/<run>.json and plots."""

import csv
import json
import sys
from pathlib import Path

import numpy as np

from params import load_params
from regvit.detectors import detector
from regvit.manifest import Dataset, InvalidManifest, read_dataset
from regvit.metrics import accuracy, anomaly_metrics, class_indices, roc_curve
from regvit.predictions import Predictions, save_predictions
from regvit.probes import InvalidProbes, load_probes
from regvit.readouts import read_all
from regvit.store import FeatureStore, InvalidStore


def main(run: str) -> None:
    params = load_params()
    predictions = predict(run, params)
    save_predictions(f"features/{run}/predictions.safetensors", predictions)
    out = Path("metrics/evaluate") / run
    out.mkdir(parents=True, exist_ok=True)
    metrics = evaluate(predictions, params)
    out.with_suffix(".json").write_text(json.dumps(rounded(metrics), indent=1) + "\n")
    shown = "cls" if "cls" in metrics else next(iter(metrics))
    write_table(out / "roc.csv", ["dataset", "detector", "fpr", "tpr"], roc_rows(predictions, params, shown))
    write_table(out / "confusion.csv", ["actual", "predicted"], confusion_rows(predictions, params, shown))
    for readout, values in metrics.items():
        ood = ", ".join(f"{dataset} {value['top1']:.4f}" for dataset, value in values["ood"].items())
        print(f"{run}: {readout} ID {values['id']['top1']:.4f}" + (f", OOD {ood}" if ood else ""))


def predict(run: str, params: dict) -> Predictions:
    """Logits of every probe on the test images of every data set, in the order of params.yaml."""
    probes = load_probes(f"features/{run}/probes.safetensors")
    made = Predictions(logits={}, labels={}, allowed={}, classes=probes.classes, digests={})
    for name, entry in params["datasets"].items():
        dataset = read_dataset(Path("data") / name)
        rows = np.flatnonzero([row.split == "test" for row in dataset.rows])
        if not len(rows):
            raise ValueError(f"data set {name!r} has no images in its test split; give some of them split = test")
        store = FeatureStore.open(Path("features") / run / f"{name}.zarr", dataset.digest)
        for readout, features in read_all(store, probes.probes).items():
            made.logits[readout, name] = probes.probes[readout].logits(features[rows])
        made.digests[name] = dataset.digest
        made.labels[name] = np.full(len(rows), -1, dtype=np.int64)
        if entry["role"] != "anomaly":
            made.labels[name], made.allowed[name] = in_known_classes(name, dataset, rows, probes.classes)
    return made


def in_known_classes(name: str, dataset: Dataset, rows: np.ndarray, known: tuple[str, ...]):
    """Labels as the probe's class indices, matched by name, and the indices of the classes that the data set has."""
    labels = dataset.labels()[rows]
    if (labels < 0).any():
        raise ValueError(
            f"data set {name!r} has {int((labels < 0).sum())} test images without a label, which cannot be right or "
            "wrong; label them, or give the data set the role anomaly"
        )
    try:
        indices = class_indices(dataset.classes, known)
    except ValueError as error:
        raise ValueError(f"data set {name!r}: {error}") from error
    return indices[labels], tuple(indices.tolist())


def evaluate(predictions: Predictions, params: dict) -> dict:
    """`{readout: {id, ood: {dataset}, anomaly: {dataset: {detector}}}}`, each value with its interval and n."""
    roles, detectors, home = by_role(params), params["evaluate"]["detectors"], params["in_distribution"]
    table = {}
    for readout in predictions.readouts:
        logits = {dataset: predictions.logits[readout, dataset] for dataset in params["datasets"]}
        scores = {(name, dataset): detector(name)(logits[dataset])
                  for name in detectors for dataset in (home, *roles["anomaly"])}  # fmt: skip
        table[readout] = {
            "id": top1(predictions, readout, home),
            "ood": {dataset: top1(predictions, readout, dataset) for dataset in roles["ood"]},
            "anomaly": {
                dataset: {
                    name: separation(scores[name, home], scores[name, dataset], params["evaluate"]["bootstrap"],
                                     params["seed"])
                    for name in detectors
                }
                for dataset in roles["anomaly"]
            },
        }  # fmt: skip
    return table


def top1(predictions: Predictions, readout: str, dataset: str) -> dict:
    """Accuracy among the classes that the data set has, as is usual for those with a part of the classes."""
    estimate = accuracy(predictions.correct(readout, dataset))
    return estimate.named("top1") | {"n": estimate.n}


def separation(id_scores: np.ndarray, anomaly_scores: np.ndarray, bootstrap: int, seed: int) -> dict:
    """The five anomaly metrics; n counts anomalies, n_id the ID images against which they stand."""
    estimates = anomaly_metrics(id_scores, anomaly_scores, bootstrap, seed)
    values = {key: value for name, estimate in estimates.items() for key, value in estimate.named(name).items()}
    return values | {"n": len(anomaly_scores), "n_id": len(id_scores)}


def roc_rows(predictions: Predictions, params: dict, readout: str):
    """ROC of each anomaly set and detector, ID positive: tpr is the share of ID accepted, fpr that of anomalies."""
    home = predictions.logits[readout, params["in_distribution"]]
    for dataset in by_role(params)["anomaly"]:
        for name in params["evaluate"]["detectors"]:
            score = detector(name)
            curve = roc_curve(score(home), score(predictions.logits[readout, dataset]))
            for fpr, tpr in zip(curve.fpr, curve.tpr, strict=True):
                yield dataset, name, round(float(fpr), 6), round(float(tpr), 6)


def confusion_rows(predictions: Predictions, params: dict, readout: str):
    """One row an ID test image: the class that it has, and the one predicted."""
    home = params["in_distribution"]
    for actual, predicted in zip(predictions.labels[home], predictions.logits[readout, home].argmax(1), strict=True):
        yield predictions.classes[actual], predictions.classes[predicted]


def by_role(params: dict) -> dict[str, list[str]]:
    """Names of the data sets by role."""
    roles = {"id": [], "ood": [], "anomaly": []}
    for name, entry in params["datasets"].items():
        roles[entry["role"]].append(name)
    return roles


def rounded(values):
    """The same nested dicts with floats of 6 digits: what lies beyond is noise, and would fill the diffs."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    return round(values, 6) if isinstance(values, float) else values


def write_table(path: Path, header: list[str], rows) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python stages/evaluate.py <run>")
    try:
        main(sys.argv[1])
    except (FileNotFoundError, InvalidManifest, InvalidProbes, InvalidStore) as error:
        sys.exit(f"evaluate: {error}")
