"""A small study made of figures written by hand: the tree of tables and pictures that the stages leave, for the tests of
the comparison, the report and its page in a browser."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from regvit.probing.predictions import Index, SetWriter, TestSet, image_keys, making_predictions
from regvit.report.study import ANOMALIES, OOD, Study
from regvit.stats.figures import Figure, figures_table, write_figures

NAME = '<script>alert("a")</script> & $x_1$'  # of a source: shown, never obeyed
IMAGES = [f"{i:05d}" for i in range(40)]  # names that look like numbers
SPOILT = {"outlier_fraction": 0.02, "cls_cosine": 0.9, "patch_cosine": 0.95, "outlier_patch_cosine": 0.1}
CURED = {"outlier_fraction": 0.0, "cls_cosine": 0.96, "patch_cosine": 0.99, "outlier_patch_cosine": 0.98}
SHIFT = {"intact": 0.02, "original": 0.0, "cured": 0.03}  # of every figure of a run


def params(extra: int = 0) -> dict:
    """The parameters, as params.yaml holds them; `extra` further runs."""
    plain = {"source": NAME, "architecture": "vit", "img_size": 112}
    treated = {"backbone": "planted", "registers": "test_time", "num_registers": 1}
    sets = {stage: {"datasets": ["scenes"]} for stage in MEASURED}
    return {
        "seed": 0,
        "in_distribution": "home",
        "datasets": {
            "home": {"source": "digits", "role": "id"},
            "lines": {"source": NAME, "role": "ood"},
            "flags": {"source": "x", "role": "anomaly"},
        },
        "scenes": {"scenes": {"source": "scenes"}},
        "backbones": {"plain": plain, "planted": {**plain, "plant": {"seed_layer": 4}}},
        "runs": {
            "intact": {"backbone": "plain", "registers": "none", "num_registers": 0},
            "original": {"backbone": "planted", "registers": "none", "num_registers": 0},
            "cured": treated,
            **{f"run_{i}": treated for i in range(extra)},
        },
        "evaluate": {"detectors": ["msp", "knn"], "bootstrap": 100},
        "compare": {"references": {}, "bases": ["cls", "patch_mean"]},
        "zeroshot": {"runs": [], "datasets": []},
        "discover_published": {"datasets": []},
        "zeroshot_segment": {"datasets": []},
        **sets,
    }  # fmt: skip


def write_study(folder: Path, extra: int = 0, of: dict | None = None) -> Study:
    """Writes the tables of every stage of the study into `folder` (its metrics/), and says what they are of.

    Args:
        of: other parameters than those above.
    """
    study = Study.of(of or params(extra), folder)
    for backbone in study.backbones:
        _write_search(study, backbone)
    for i, run in enumerate(study.runs):
        _write_evaluation(study, run)
        _write_verification(study, run, np.random.default_rng(i))
        for stage, columns in MEASURED.items():
            for dataset in study.measured[stage]:
                _write_measurement(study, run, (stage, dataset), columns, np.random.default_rng(i))
    return study


def write_predictions(path: Path, study: Study, run: str, right: float) -> None:
    """What `evaluate` predicts: linear probes on two readouts, of three classes; `right` decides how sure they are."""
    rng, classes = np.random.default_rng(0), ("a", "b", "c")
    allowed = {"id": (0, 1, 2), "ood": (0, 1, 2), "anomaly": ()}
    sets = {name: TestSet(entry["role"], "digest", allowed[entry["role"]]) for name, entry in study.datasets.items()}
    keys = [(readout, "linear", 0) for readout in ("cls", "patch_mean")]
    detectors = [(readout, "msp", 0) for readout in ("cls", "patch_mean")]
    with making_predictions(path, Index(run, classes, sets, tuple(keys), tuple(detectors))) as made:
        for name, each in sets.items():
            labels = np.arange(len(IMAGES)) % 3
            writer = SetWriter(made, name, labels, image_keys(IMAGES))
            for key in keys:
                logits = rng.normal(0, 1, (len(IMAGES), 3)) + right * np.eye(3)[labels]
                writer.write(key, slice(None), logits.astype(np.float32))
            shift = 1.0 if each.role == "anomaly" else 0.0
            writer.finish({key: rng.normal(shift, 1, len(IMAGES)).astype(np.float32) for key in detectors})


MEASURED = {  # columns of images.csv and what they are about
    "attention": {"entropy": 4.0, "on_outliers": 0.3, "on_registers": 0.0, "morans_i": 0.4, "object_auroc": 0.7},
    "tokens": {"position_top1_normal": 0.3, "position_top1_outlier": 0.1, "pixels_l2_normal": 13.5, "pixels_l2_outlier": 23.0},
    "token_classes": {"class_top1_cls": 0.6, "class_top1_normal": 0.4, "class_top1_outlier": 0.5},
    "discover": {"corloc": 0.7, "corloc_mean": 0.5, "corloc_k": 0.7},
    "segment": {"miou_by_image": 0.5, "pixel_accuracy": 0.8, "pixel_accuracy_at_outliers": 0.7},
    "depth": {"rmse": 0.6, "rmse_at_outliers": 0.9},
    "hummingbird": {"miou_by_image": 0.4, "pixel_accuracy": 0.7, "pixel_accuracy_at_outliers": 0.6},
    "correspond": {"pck": 0.3, "pck_at_outliers": 0.1},
    "retrieve": {"map_cls": 0.2, "map_patch_mean": 0.1},
}  # fmt: skip


def estimate(metric: str, value: float | None, half: float = 0.05, **of: object) -> Figure:
    """A figure with an interval of a given half width."""
    return Figure(metric, value, value - half, value + half, 40, **of) if value is not None else Figure(metric, None)


def outliers(study: Study, run: str) -> bool:
    return study.planted(study.runs[run]["backbone"])


def _leave(path: Path, table: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)


def _write_search(study: Study, backbone: str) -> None:
    folder, planted = study.folder / "backbones" / backbone, study.planted(backbone)
    shares = {"": 0.02, "_after": 0.0, "_ablated": 0.0, "_empty": 0.02, "_random": 0.02}
    found = [Figure("outliers_found", float(planted)), Figure("register_neurons", 6 if planted else 0)]
    if planted:
        found += [Figure("threshold", 20.0), Figure("layer", 1), Figure("precision", 1), Figure("recall", 1)]
        found += [estimate(f"outlier_fraction{kind}", share, 0.001) for kind, share in shares.items()]
    write_figures(folder / "figures.csv", figures_table(found, backbone, study.in_distribution))
    _leave(folder / "norms.csv", pd.DataFrame({"layer": [0, 1, 2], "median": [1.0, 2, 3], "max": [2.0, 30, 60]}))
    log_norms = pd.DataFrame({"log10_norm": [0.0, 1, 2], "before": [5, 0, 2], "after": [7, 0, 0]})
    _leave(folder / "histogram.csv", log_norms)
    scores = pd.DataFrame({"rank": [1, 2, 3], "attribution": [0.6, 0.3, 0.01], "selected": [1, 1, 0]})
    _leave(folder / "scores.csv", scores if planted else scores.head(0))


def _write_evaluation(study: Study, run: str) -> None:
    shift, tables = SHIFT.get(run, 0.0), []
    readouts = ("cls", "patch_mean", *(["cls_reg"] if study.runs[run]["num_registers"] else []))
    for dataset in (study.in_distribution, *study.sets("ood"), OOD):
        found = [estimate("top1", 0.6 + shift, readout=readout, classifier="linear") for readout in readouts]
        tables.append(figures_table([*found, estimate("top1", 0.5, readout="cls", classifier="knn")], run, dataset))
    for dataset in (*study.sets("anomaly"), ANOMALIES):
        found = [
            estimate(metric, value, readout=readout, detector=detector)
            for metric, value in (("auroc", 0.7 + shift), ("fpr95", 0.8 - shift))
            for readout in readouts
            for detector in study.detectors
        ]
        tables.append(figures_table(found, run, dataset))
    write_figures(study.path(run, "evaluate", "", "figures.csv"), *tables)
    roc = {"readout": "cls", "detector": "msp", "dataset": "flags", "fpr": [0.0, 0.5, 1.0], "tpr": [0.0, 0.8, 1.0]}
    _leave(study.path(run, "evaluate", "", "roc.csv"), pd.DataFrame(roc))
    probe = figures_table([estimate("val_top1", 0.6, readout="cls", classifier="linear")], run, study.in_distribution)
    write_figures(study.path(run, "probe", "", "figures.csv"), probe)


def _write_verification(study: Study, run: str, rng: np.random.Generator) -> None:
    treated = study.runs[run]["registers"] == "test_time"
    values = (CURED if treated else SPOILT) | {"cls_attention_on_outliers": 0.01 if treated else 0.4}
    values = values if outliers(study, run) else {}
    figures = figures_table(
        [estimate(name, value, 0.001) for name, value in values.items()], run, study.in_distribution
    )
    write_figures(study.path(run, "verify", "", "figures.csv"), figures)
    if values:
        _leave(study.path(run, "verify", "", "images.csv"), _images(values, rng))
        untreated = {"model": "untreated", "cls_attention": 0.4, "sink_norm": 30.0, "value_ratio": 0.7, "effective_rank": 5.0,
                     "channel": 7, "channel_ratio": 12.3, "verdict": "registers can help here"}  # fmt: skip
        own = untreated | {"model": run, "cls_attention": 0.012, "sink_norm": 1.25, "verdict": "the outliers are gone"}
        _leave(study.path(run, "verify", "", "diagnosis.csv"), pd.DataFrame([untreated, *([own] if treated else [])]))
    models = {"intact": ["intact"], "original": ["intact", "original"]}.get(run, ["intact", "original", run])
    write_strips(study.path(run, "verify", "", "images.jpg").parent, models, rng)


def _write_measurement(study: Study, run: str, of: tuple[str, str], columns: dict, rng: np.random.Generator) -> None:
    stage, dataset = of
    known = {name: value for name, value in columns.items() if outliers(study, run) or "outlier" not in name}
    table = _images({name: value + SHIFT.get(run, 0.0) for name, value in known.items()}, rng)
    for name in set(columns) - set(known):
        table[name] = None
    found = [estimate(name, table[name].mean() if name in known else None) for name in columns]
    if stage == "segment":
        found.append(estimate("miou", 0.5 + SHIFT.get(run, 0.0)))
        _leave(study.path(run, stage, dataset, "pixels.csv"), _pixels(0.8 + SHIFT.get(run, 0.0)))
        table["pixel_accuracy_at_outliers_weight"] = 10
    write_figures(study.path(run, stage, dataset, "figures.csv"), figures_table(found, run, dataset))
    _leave(study.path(run, stage, dataset, "images.csv"), table)
    layers = pd.DataFrame({"layer": [0, 1, 2], "q99": [1, 2, 40]})
    for name in columns:
        layers[[name, f"{name}_lo", f"{name}_hi"]] = [[0.1, 0.0, 0.2]] * 3
    others = {
        "attention": {"layers": layers},
        "tokens": {"norms": layers, "positions": pd.DataFrame({"share": [0.5, 0, 0, 0.1]})},
        "discover": {"sweep": pd.DataFrame({"kind": ["k", "k"], "bias": [0.0, -0.1], "corloc": [0.1, 0.7]})},
    }
    for name, other in others.get(stage, {}).items():
        _leave(study.path(run, stage, dataset, f"{name}.csv"), other)
    spots = Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)).resize((720, 480))
    for file in {"attention": ("maps.png", "heads.png"), "discover": ("boxes.png",)}.get(stage, ()):
        spots.save(study.path(run, stage, dataset, file))


def _images(values: dict[str, float], rng: np.random.Generator) -> pd.DataFrame:
    """A table with a value an image for each figure, around its mean."""
    noise = rng.normal(0, 0.01, len(IMAGES))
    return pd.DataFrame({"image_id": IMAGES, **{name: value + noise - noise.mean() for name, value in values.items()}})


def _pixels(right: float) -> pd.DataFrame:
    """Half of each image is of class 1, and a share of each class is predicted right."""
    rows = [(image, value, round(50 * right), 50, 50) for image in IMAGES for value in (0, 1)]
    return pd.DataFrame(rows, columns=["image_id", "mask_value", "right", "predicted", "actual"])


def write_strips(folder: Path, models: list[str], rng: np.random.Generator) -> None:
    """What `verify` leaves of two images: 4 x 4 patches, each 6 pixels wide."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (24, 48, 3), dtype=np.uint8)).save(folder / "images.jpg")
    for model in models:
        for what in ("norms", "attention", "features"):
            patches = rng.integers(0, 255, (4, 8, 3), dtype=np.uint8)
            Image.fromarray(patches.repeat(6, 0).repeat(6, 1)).save(folder / f"{what}-{model}.png")
