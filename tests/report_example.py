"""A small report made of figures written by hand, for the tests of its parts and in a browser."""

from pathlib import Path

import numpy as np
from PIL import Image

from regvit.report.compare import Check, Measured, Table
from regvit.report.comparisons import Measurements
from regvit.report.sections import Material, Search
from regvit.report.sweeps import Kept
from regvit.report.sweeps import Value as Swept

NAME = '<script>alert("a")</script> & $x_1$'  # of a run: shown, never obeyed
ATTENTION = ("entropy", "largest", "on_outliers", "on_registers", "on_cls", "morans_i", "object_mass", "object_auroc")


def estimate(name: str, value: float | None, half: float = 0.05) -> dict:
    """A figure as it stands in a metrics file."""
    low, high = (None, None) if value is None else (round(value - half, 6), round(value + half, 6))
    return {name: value, f"{name}_lo": low, f"{name}_hi": high}


def measured(
    name: str, registers: str = "none", reference: str | None = None, outliers: bool = True, shift: float = 0.0
) -> Measurements:
    """A run with every measurement on the set `scenes`; `shift` is added to each figure.

    Args:
        outliers: whether its backbone has some; what needs them is null where it has none.
    """

    def at(value: float) -> float | None:
        return value + shift if outliers else None

    top1 = estimate("top1", 0.6 + shift) | {"n": 100}
    evaluate = {
        readout: {"id": top1, "ood": {"lines": top1}, "anomaly": {"flags": {"msp": {"n": 50}}}}
        for readout in ("cls", "patch_mean")
    }
    found = {"outliers_found": outliers, "images": 64, "num_neurons": 6 if outliers else 0}
    found |= estimate("outlier_fraction", 0.02, 0.001) | {"outlier_fraction_after": 0.0}
    verify = {"planted": outliers, "images": 80, "images_with_outliers": 40}
    verify |= estimate("outlier_fraction", 0.02 if registers == "none" else 0.0, 0.0) if outliers else {}
    verify |= estimate("cls_cosine", at(0.9))
    heads = {key: value for metric in ATTENTION for key, value in estimate(metric, 0.4 + shift).items()}
    heads |= estimate("on_outliers", at(0.3))
    attention = {"heads": heads, "n": 4, "n_with_outliers": 2 if outliers else 0}
    place = {"normal": estimate("top1", 0.3) | {"n": 20}, "outlier": estimate("top1", at(0.1)) | {"n": 12}}
    pixels = {"normal": estimate("l2", 13.5) | {"n": 20}, "outlier": estimate("l2", at(23.0)) | {"n": 12}}
    classes = {kind: estimate("top1", 0.5) | {"n": 30} for kind in ("cls", "normal")}
    anatomy = {"threshold": 20.0 if outliers else None, "n": 20}
    for key in ("over_threshold", "outlier_fraction", "outlier_on_border", "neighbour_cosine_outlier"):
        anatomy |= estimate(key, 0.1)
    corloc = estimate("corloc", 0.7 + shift)
    setting = {"kind": "k", "layer": 3, "normalised": True, "bias": -0.2}
    discover = corloc | {"n": 4, "chosen": setting, "features": {"k": setting | corloc}, "mean_over_features": corloc}
    dense = {"n": 4, "n_with_outliers": 2 if outliers else 0}
    segment = (
        dense | estimate("miou", 0.5 + shift) | estimate("accuracy", 0.8) | estimate("accuracy_at_outliers", at(0.7))
    )
    depth = dense | estimate("rmse", 0.6 + shift) | estimate("rmse_at_outliers", at(0.9))
    blocks = [str(i) for i in range(3)]
    layers = {"layer": blocks}
    for metric in ATTENTION:
        layers |= {f"{metric}{end}": ["0.1", "0.2", "0.3"] for end in ("", "_lo", "_hi")}
    ids = ["a", "b", "c", "d"]
    empty = [""] * 4
    cosines = ["0.95", "0.93", "", ""] if registers == "test_time" else ["0.9", "0.9", "", ""]
    shares = ["0"] * 4 if registers == "test_time" else ["0.04", "0.02", "0", "0"]
    verified = {"image_id": ids, "outlier_fraction": shares, "cls_cosine": cosines} if outliers else {}
    right = ["0.5", "0.7"] if registers == "test_time" else ["0.1", "0.1"]
    read = {"image_id": ids} | {f"{key}_normal": ["0.3"] * 4 for key in ("top1", "l2")}
    read |= {f"{key}_outlier": [*right, "", ""] if outliers else empty for key in ("top1", "l2")}
    attended = ["0.1", "0.3", "0.1", "0.3"] if registers == "test_time" else ["0.4"] * 4
    attentions = {"image_id": ids} | dict.fromkeys(ATTENTION, attended)
    attentions["on_outliers"] = [*attended[:2], "", ""] if outliers else empty
    tables = {
        ("verify", "home", "images"): verified,
        ("tokens", "scenes", "norms"): {"layer": blocks, "q99": ["1", "2", "40"]},
        ("tokens", "scenes", "images"): read,
        ("tokens", "scenes", "positions"): {"share": ["0.5", "0", "0", "0.1"] if outliers else ["0"] * 4},
        ("attention", "scenes", "layers"): layers,
        ("attention", "scenes", "images"): attentions,
        ("discover", "scenes", "images"): {"image_id": ids, "hit": ["1", "0", "1", "1"], "mean_over_features": ["0.5"] * 4},
        ("segment", "scenes", "images"): {
            "image_id": ids, "miou": ["0.5", "0.6", "0.4", ""], "right": ["8", "9", "7", "8"], "pixels": ["10"] * 4,
            "right_at_outliers": ["1", "2", "0", "0"], "at_outliers": ["2", "2", "0", "0"] if outliers else ["0"] * 4,
        },
        ("segment", "scenes", "pixels"): {
            "image_id": ids, "mask_value": ["0", "1", "0", "1"], "right": ["8", "9", "7", "8"] if shift else ["9"] * 4,
            "predicted": ["10"] * 4, "actual": ["10"] * 4,
        },
        ("depth", "scenes", "images"): {
            "image_id": ids, "rmse": ["0.5", "0.6", "0.7", "0.6"],
            "rmse_at_outliers": ["0.9", "1.1", "", ""] if outliers else empty,
        },
    }  # fmt: skip
    stages = {
        "tokens": {"scenes": {"anatomy": anatomy, "position": place, "pixels": pixels, "class": classes}},
        "attention": {"scenes": attention},
        "discover": {"scenes": discover},
        "segment": {"scenes": segment},
        "depth": {"scenes": depth},
    }
    against = {"cls-cls": {"id": estimate("top1", 0.02, 0.03)}} if reference else {}
    run = Measured(
        name, registers, int(registers != "none"), evaluate, found, verify, reference=reference, against=against
    )
    return Measurements(run, "planted" if outliers else "plain", stages, tables)


def draw_strips(folder: Path, models: list[str], rng: np.random.Generator) -> None:
    """What `verify` leaves of two images: 4 x 4 patches, each 6 pixels wide."""
    folder.mkdir(parents=True)
    photos = rng.integers(0, 255, (24, 48, 3), dtype=np.uint8)
    Image.fromarray(photos).save(folder / "images.jpg")
    for model in models:
        for what in ("norms", "attention", "features"):
            patches = rng.integers(0, 255, (4, 8, 3), dtype=np.uint8)
            file = folder / f"{what}-{model}.png"
            file.parent.mkdir(parents=True, exist_ok=True)  # a name may hold a slash here
            Image.fromarray(patches.repeat(6, 0).repeat(6, 1)).save(file)


def search(outliers: bool = True) -> Search:
    norms = {"layer": [0, 1, 2], "median": [1.0, 2.0, 3.0], "max": [2.0, 30.0, 60.0 if outliers else 5.0]}
    histogram = {"log10_norm": [0.0, 1.0, 2.0], "before": [5, 0, 2], "after": [7, 0, 0]}
    scores = {"rank": [1, 2, 3], "attribution": [0.6, 0.3, 0.01], "selected": [1, 1, 0]}
    return Search(20.0, norms, histogram, scores if outliers else {key: [] for key in scores})


def material(folder: Path, extra: int = 0) -> Material:
    """Three runs, the second and third on a planted backbone, with pictures in `folder`.

    Args:
        extra: further runs.
    """
    runs = [
        measured("intact", outliers=False),
        measured("original", reference="intact", shift=-0.1),
        measured(NAME, "test_time", reference="original", shift=0.02),
        *(measured(f"run_{i}", "test_time", reference="original") for i in range(extra)),
    ]
    rng = np.random.default_rng(0)
    for run in runs:
        for path in ("attention/{}/scenes/maps.png", "discover/{}/scenes/boxes.png"):
            file = folder / path.format(run.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            spots = rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(spots).resize((720, 480)).save(file)
        models = {"intact": ["intact"], "original": ["intact", "original"]}.get(
            run.name, ["intact", "original", run.name]
        )
        draw_strips(folder / "verify" / run.name, models, rng)
    table = Table("Accuracy", ("run", "top-1", NAME), (("intact", "62.2 [57.5–66.6] ▲", "1"),), "▲ better; `dvc repro`")
    return Material(
        runs,
        {"plain": {"source": "timm:a"}, "planted": {"source": "timm:a", "img_size": 112, "plant": {}}},
        {"home": {"source": "digits", "role": "id"}, "lines": {"source": NAME, "role": "ood"}, "flags": {"source": "x", "role": "anomaly"}},
        {"scenes": {"source": "scenes"}},
        "home",
        0,
        [table],
        [Check("original", NAME, 0.5, 0.9, 1)],
        {"plain": search(False), "planted": search()},
        folder,
        [Kept("sizes", f"Sizes of {NAME}.", ("1", "2"), {"cls_cosine (verify)": (Swept(0.9, 0.8, 1.0), Swept(0.7))})],
    )  # fmt: skip
