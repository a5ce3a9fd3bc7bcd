"""evaluate@<run>: the run's probes and detectors on the test images of every data set; metrics/evaluate/<run>.json."""

import hashlib
from pathlib import Path

from regvit.data.manifest import read_dataset
from regvit.data.progress import progress
from regvit.features.store import FeatureStore
from regvit.files import write_json, write_table
from regvit.measures.evaluation import (
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
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.probing.predictions import save_predictions
from regvit.probing.probes import load_probes


def main(run: str) -> None:
    params, runtime = load_params(), Runtime.load()
    plan, sets = plan_of(params), open_sets(run, params)
    kept = Path(f"features/{run}/predictions.safetensors")
    probes = load_probes(f"features/{run}/probes.safetensors")
    with progress(len(probes.probes), f"evaluate {run}", "readouts") as bar:
        # Logits wait on disk beside the file that they go into.
        predictions = predict(probes, sets, plan.detectors, bar.advance, kept.parent, runtime.device)
    save_predictions(kept, predictions)

    drawn = draw(predictions, plan)
    metrics, differences = evaluate(drawn, plan), differences_within(drawn, plan)
    out = Path("metrics/evaluate") / run
    out.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), rounded(metrics))
    # With the digest, whatever depends on this folder sees that there are new predictions.
    record = {"predictions_sha256": sha256(kept), "differences": differences}
    write_json(out / "differences.json", rounded(record))
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


if __name__ == "__main__":
    command(main, "run", interrupted="metrics/evaluate/{0}.json is not finished")
