"""evaluate@<run>: the run's probes and detectors on the test images of every data set; metrics/evaluate/<run>.json."""

import csv
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from params import load_params
from regvit.evaluation import (
    Plan,
    TestSet,
    confusion_rows,
    differences_within,
    draw,
    evaluate,
    predict,
    roc_rows,
    rounded,
)
from regvit.manifest import InvalidManifest, read_dataset
from regvit.predictions import save_predictions
from regvit.probes import InvalidProbes, load_probes
from regvit.progress import progress
from regvit.store import FeatureStore, InvalidStore


def main(run: str) -> None:
    params = load_params()
    plan, sets = plan_of(params), open_sets(run, params)
    probes = load_probes(f"features/{run}/probes.safetensors")
    with progress(len(probes.probes), f"evaluate {run}", "readouts") as bar:
        predictions = predict(probes, sets, plan.detectors, bar.advance)
    kept = Path(f"features/{run}/predictions.safetensors")
    save_predictions(kept, predictions)

    drawn = draw(predictions, plan)
    metrics, differences = evaluate(drawn, plan), differences_within(drawn, plan)
    out = Path("metrics/evaluate") / run
    out.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), metrics)
    # With the digest, whatever depends on this folder sees that there are new predictions.
    write_json(out / "differences.json", {"predictions_sha256": sha256(kept), "differences": differences})
    write_table(out / "roc.csv", ["dataset", "detector", "fpr", "tpr"], roc_rows(predictions, plan))
    write_table(out / "confusion.csv", ["actual", "predicted"], confusion_rows(predictions, plan))
    for readout, values in metrics.items():
        ood = ", ".join(f"{dataset} {value['top1']:.4f}" for dataset, value in values["ood"].items())
        print(f"{run}: {readout} ID {values['id']['top1']:.4f}" + (f", OOD {ood}" if ood else ""))


def plan_of(params: dict) -> Plan:
    """What is measured, as params.yaml has it."""
    named = {role: tuple(n for n, d in params["datasets"].items() if d["role"] == role) for role in ("ood", "anomaly")}
    detectors, bootstrap = tuple(params["evaluate"]["detectors"]), params["evaluate"]["bootstrap"]
    return Plan(params["in_distribution"], named["ood"], named["anomaly"], detectors, bootstrap, params["seed"])


def open_sets(run: str, params: dict) -> dict[str, TestSet]:
    """Every data set with the run's features of it, in the order of params.yaml."""
    sets = {}
    for name, entry in params["datasets"].items():
        dataset = read_dataset(Path("data") / name)
        store = FeatureStore.open(Path("features") / run / f"{name}.zarr", dataset.digest)
        sets[name] = TestSet(dataset, entry["role"], store)
    return sets


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(rounded(values), indent=1) + "\n")


def write_table(path: Path, header: list[str], rows: Iterable[tuple]) -> None:
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
