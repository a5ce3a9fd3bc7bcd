"""The class of an image from one of its tokens: CLS, a register, a normal patch, an outlier.

Darcet et al. 2024 (arXiv:2309.16588, section 2.2 and table 1): a linear classifier on one token an image, drawn at random; on
ImageNet, DINOv2-g, 86.0 from CLS, 65.8 from a normal patch, 69.0 from an outlier. Here it is the linear probe of the stage
`probe` (`regvit.probing.training`), trained on one token of each train image, its learning rate chosen on one of each val
image, and tested on *every* token of the kind of the test images: the mean over them is what one drawn at random scores.

`normal` are the patches that are no outliers; `normal_beside` those of images that have outliers, so that `outlier` can be
compared with the same images; `register` any register, `register_<i>` that one, where there are several.

Shape letters: b image, t token of a kind, r register, d channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regvit.features.dense_set import DenseSet
from regvit.measures.tables import image_means
from regvit.probing.probes import Probe
from regvit.probing.splits import Split
from regvit.probing.training import Settings, train_probes

LEAST = 2  # images of a class: with fewer of every class but one, a kind is too rare to learn from


def kinds_of_tokens(
    arrays: Mapping[str, Tensor],
) -> dict[str, tuple[Float[np.ndarray, "b t d"], Bool[np.ndarray, "b t"]]]:
    """By kind, tokens of some images, and which of them belong to it.

    Args:
        arrays: `patches`, `outliers` and, where there are some, `cls` and `registers`, of `DenseSet.batches`.
    """
    held = {name: values.cpu().numpy() for name, values in arrays.items()}
    patches, outliers = held["patches"], held["outliers"] > 0
    beside = ~outliers & outliers.any(1, keepdims=True)
    kinds = {"normal": (patches, ~outliers), "normal_beside": (patches, beside), "outlier": (patches, outliers)}
    tokens = {"cls": held["cls"][:, None]} if "cls" in held else {}
    if "registers" in held:
        registers = held["registers"]
        tokens["register"] = registers
        if registers.shape[1] > 1:
            tokens |= {f"register_{i}": registers[:, i : i + 1] for i in range(registers.shape[1])}
    return kinds | {kind: (each, np.ones(each.shape[:2], dtype=bool)) for kind, each in tokens.items()}


def drawn_tokens(dense: DenseSet, rows: Sequence[int], seed: int = 0) -> dict[str, Split]:
    """One token of each image that has one, at random, by kind, with the images' classes.

    Args:
        rows: of `dense`, ascending, with a label each.
        seed: of the draw.
    """
    rng, labels = np.random.default_rng(seed), dense.dataset.labels()
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for own, arrays in dense.batches(rows, *_arrays(dense)):
        for kind, (tokens, belongs) in kinds_of_tokens(arrays).items():
            chosen = np.where(belongs, rng.random(belongs.shape), -1).argmax(1)
            has = belongs.any(1)
            parts.setdefault(kind, []).append((tokens[has, chosen[has]], labels[own][has]))
    joined = {kind: [np.concatenate(each) for each in zip(*of_kind, strict=True)] for kind, of_kind in parts.items()}
    return {kind: Split({kind: tokens}, of_tokens) for kind, (tokens, of_tokens) in joined.items()}


def learned_classes(
    train: Mapping[str, Split],
    val: Mapping[str, Split],
    classes: Sequence[str],
    settings: Settings,
    device: str = "cpu",
) -> dict[str, Probe]:
    """A linear probe by kind; a kind of which train images of two classes, or val images, have too few tokens is left out.

    Args:
        train, val: of `drawn_tokens`.
        settings: with one seed.
    """
    found = {}
    for kind, split in train.items():
        enough = (np.bincount(split.labels, minlength=1) >= LEAST).sum() > 1
        if enough and len(val[kind].labels):
            (found[kind],) = train_probes(split, val[kind], classes, settings, device).probes[kind]
    return found


def class_columns(
    dense: DenseSet, rows: Sequence[int], probes: Mapping[str, Probe]
) -> dict[str, Float[np.ndarray, " b"]]:
    """`class_top1_<kind>`, one value a test image: share of its tokens of that kind which give the right class, nan where it has
    none, or nothing was learned; `class_top1_difference`: outlier − normal within an image; `register_cosine`: mean cosine
    between two registers of an image, where there are several.
    """
    labels, parts = dense.dataset.labels(), []
    for own, arrays in dense.batches(rows, *_arrays(dense)):
        columns = {}
        for kind, (tokens, belongs) in kinds_of_tokens(arrays).items():
            right = np.full(belongs.shape, np.nan)
            if kind in probes:
                right[belongs] = _right(probes[kind], tokens[belongs], np.repeat(labels[own], belongs.sum(1)))
            columns[f"class_top1_{kind}"] = image_means(right, belongs)
        columns["class_top1_difference"] = columns["class_top1_outlier"] - columns["class_top1_normal_beside"]
        if "registers" in arrays and arrays["registers"].shape[1] > 1:
            columns["register_cosine"] = register_cosine(arrays["registers"]).cpu().numpy()
        parts.append(columns)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def register_cosine(registers: Float[Tensor, "b r d"]) -> Float[Tensor, " b"]:
    """Mean cosine between two different registers of an image."""
    unit, r = torch.nn.functional.normalize(registers, dim=-1), registers.shape[1]
    return ((unit.sum(1) ** 2).sum(-1) - r) / (r * (r - 1))


def _right(probe: Probe, tokens: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    return probe.logits(tokens).argmax(1) == labels


def _arrays(dense: DenseSet) -> list[str]:
    return ["patches", "outliers", *(name for name in ("cls", "registers") if name in dense.store.arrays)]
