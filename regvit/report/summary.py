"""A dozen figures a run, with short names: what `dvc metrics show metrics/summary.json` and `dvc exp show` put in columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from regvit.report.comparisons import Measurements, datasets_of
from regvit.report.measurements import outliers

DIGITS = 4


def summary(runs: Sequence[Measurements], ood: Sequence[str], detector: str) -> dict[str, dict[str, float]]:
    """`{run: {name: figure}}`; what was not measured is left out, and where a measure has several data sets, its names
    end with theirs.

    outliers: share of patches over the threshold. cls_cosine: to the model before planting. attention_on_outliers,
    coherence: of CLS attention. corloc: mean over features. miou, rmse: of linear layers on patch tokens. top1: of the
    CLS probe; ood_top1: mean over the OOD sets. auroc, fpr95: mean over the anomaly sets.

    Args:
        ood: names of the OOD sets.
        detector: of anomalies.
    """
    return {run.name: _rounded(_figures(run, runs, ood, detector)) for run in runs}


def _figures(run: Measurements, runs: Sequence[Measurements], ood: Sequence[str], detector: str) -> dict:
    fraction = outliers(run)
    found = {
        "outliers": None if fraction is None else fraction.value,
        "cls_cosine": run.run.verify.get("cls_cosine"),
    }
    for name, stage, path, key in (
        ("attention_on_outliers", "attention", ("heads",), "on_outliers"),
        ("coherence", "attention", ("heads",), "morans_i"),
        ("corloc", "discover", ("mean_over_features",), "corloc"),
        ("miou", "segment", (), "miou"),
        ("rmse", "depth", (), "rmse"),
        ("zeroshot_top1", "zeroshot", (), "top1"),
    ):
        datasets = datasets_of(runs, stage)
        for dataset in datasets:
            found[f"{name}_{dataset}" if len(datasets) > 1 else name] = run.of(stage, dataset, *path).get(key)
    readout = run.run.evaluate.get("cls", {})
    if readout:
        found["top1"] = readout["id"]["top1"]
        accuracies = [readout["ood"][name]["top1"] for name in ood]
        found["ood_top1"] = sum(accuracies) / len(accuracies) if accuracies else None
        anomalies = readout.get("anomaly_mean", {}).get(detector, {})
        found |= {key: anomalies.get(key) for key in ("auroc", "fpr95")}
    return found


def _rounded(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in figures.items() if value is not None}
