"""A dozen figures of a run with short names: its row in `dvc metrics show`, and its columns in `dvc exp show`."""

from __future__ import annotations

from regvit.report.results import Place, Results
from regvit.report.study import ANOMALIES, OOD, Value

DIGITS = 4
PAIR_READOUTS = ("cls_reg", "cls_patch")  # the best known of a run with registers, and of one without
MEASURED = {  # name: stage, metric
    "on_outliers": ("attention", "on_outliers"),
    "morans_i": ("attention", "morans_i"),
    "corloc": ("discover", "corloc_mean"),
    "miou": ("segment", "miou"),
    "rmse": ("depth", "rmse"),
    "zeroshot": ("zeroshot", "top1"),
}


def summary(results: Results, run: str) -> dict[str, float]:
    """`{name: figure}`; what was not measured is left out, and where a measure has several data sets, the mean is taken.

    outliers: share of patches over the threshold. cls_cosine: to the model before planting. on_outliers, morans_i: share
    and coherence of CLS attention. corloc: mean over features. miou, rmse: of linear layers on patch tokens. zeroshot: top-1. top1:
    of the CLS probe on ID; ood_top1: on the images of all OOD sets; ood_pair: the same of [CLS; mean of registers], or of [CLS;
    mean of patches] where there are none. auroc, fpr95: mean over the anomaly sets, first detector.
    """
    found = headlines(results, run)
    return {name: round(float(value.value), DIGITS) for name, value in found.items() if value is not None}


def headlines(results: Results, run: str) -> dict[str, Value | None]:
    """The same with intervals, where a figure is of one data set; None where it was not measured."""
    study = results.study
    home = study.in_distribution
    found = {
        "outliers": results.outliers(run),
        "cls_cosine": results.verified(run, "cls_cosine"),
    }
    for name, (stage, metric) in MEASURED.items():
        places = (Place(stage, metric, dataset) for dataset in study.measured[stage])
        values = [value for place in places if (value := results.value(run, place))]
        mean = Value(sum(value.value for value in values) / len(values)) if values else None
        found[name] = values[0] if len(values) == 1 else mean
    pair = next((readout for readout in PAIR_READOUTS if readout in results.readouts(run)), "")
    found["top1"] = results.value(run, results.top1("cls", home))
    found["ood_top1"] = results.value(run, results.top1("cls", OOD))
    found["ood_pair"] = results.value(run, results.top1(pair, OOD))
    for name in ("auroc", "fpr95"):
        found[name] = results.value(run, results.anomaly(name, ANOMALIES))
    return found
