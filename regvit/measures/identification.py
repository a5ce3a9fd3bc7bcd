"""What a search for register neurons found, held against its controls, and the figures and tables about it.

The cure says little until its controls fail, so the search is told at once what becomes of the outliers if

    ablated   the selected neurons are silenced at the patches, without a register: the upper bound
    after     they are moved into one test-time register
    empty     the register is there and nothing is moved into it
    random    as many other neurons of the same layers are moved into it

Each of these is a forward up to the detection layer, on `CONTROL_IMAGES` images at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import nn

from regvit.models.arithmetic import arithmetic
from regvit.registers.control_neurons import control_neurons
from regvit.registers.controls import mlp_widths
from regvit.registers.neurons import RegisterNeurons, ablated
from regvit.registers.norms import LayerNorms
from regvit.registers.outliers import patch_norms
from regvit.registers.search import SETTLE_ON, Batches, picked
from regvit.registers.test_time import add_test_time_registers
from regvit.stats.bootstrap import mean_with_interval

BINS = 60
CONTROL_IMAGES = 512  # the first ones of the search; a fraction of 1 % is then known to about 0.1 %


@dataclass(frozen=True)
class Tables:
    """Rows for plots, header first: norms by layer, histogram before and after, scores by rank."""

    norms: list[list]
    histogram: list[list]
    scores: list[list]


def norms_under_treatments(
    model: nn.Module, batches: Batches, found: RegisterNeurons, seed: int
) -> dict[str, Float[np.ndarray, "b p"]]:
    """Patch norms in the detection layer under each treatment of the table above; empty where nothing was found.

    Args:
        batches: the images of the search, of which the first `CONTROL_IMAGES` are used.
        seed: of the random neurons.
    """
    if not found.num_selected:
        return {}
    first = np.arange(min(len(found.outlier_fraction), CONTROL_IMAGES))

    def seen() -> Float[np.ndarray, "b p"]:
        images = (batch for _, batch in picked(batches, first))
        with arithmetic(found.precision, next(model.parameters()).device):
            return patch_norms(model, images, [found.detection.layer])[0]

    with ablated(model, found.selected):
        norms = {"ablated": seen()}
    others = control_neurons("random", found.selected, mlp_widths(model, found.selected), seed=seed)
    for name, neurons in (("after", found.selected), ("empty", {}), ("random", others)):
        with add_test_time_registers(model, neurons):
            norms[name] = seen()
    return norms


def summary(
    found: RegisterNeurons,
    treated: Mapping[str, Float[np.ndarray, "b p"]],
    planted: Mapping[int, Iterable[int]] | None,
    seed: int,
) -> dict:
    """Figures of the search, with the interval of the outlier fraction; precision and recall where the truth is known.

    Args:
        treated: of `norms_under_treatments`.
        planted: `{layer: [neuron, …]}` of a planted backbone.
        seed: of the bootstrap.
    """
    layer = -2 if found.detection is None else found.detection.layer
    metrics = {
        "outliers_found": found.detection is not None,
        "detect_layer": None if found.detection is None else layer,
        "threshold": None if found.detection is None else round(found.detection.threshold, 4),
        **mean_with_interval("outlier_fraction", found.outlier_fraction, seed),
    }
    for name, norms in treated.items():
        metrics |= mean_with_interval(f"outlier_fraction_{name}", (norms > found.detection.threshold).mean(1), seed)
    metrics |= {
        "largest_norm": round(found.norms[layer].max(), 4),
        "median_norm": round(found.norms[layer].median(), 4),
        "num_neurons": found.num_selected,
        "explained": round(found.explained, 6),
    }
    if planted:
        truth, chosen = _pairs(planted), _pairs(found.selected)
        metrics["precision"] = len(truth & chosen) / len(chosen) if chosen else 0.0
        metrics["recall"] = len(truth & chosen) / len(truth)
    return metrics


def tables(
    found: RegisterNeurons,
    treated: Mapping[str, Float[np.ndarray, "b p"]],
    planted: Mapping[int, Iterable[int]] | None,
) -> Tables:
    """Norms by layer, histogram of the norms in the detection layer before and after, scores by rank.

    The histogram counts as many patches before as after: where fewer images were treated, counts before are scaled down.
    """
    norms = [["layer", "median", "p99", "max"]]
    for layer, values in enumerate(found.norms):
        norms.append([layer, *(f"{v:.4f}" for v in (values.median(), values.quantile(0.99), values.max()))])
    before = found.norms[-2 if found.detection is None else found.detection.layer]
    after = LayerNorms.of(treated["after"]) if "after" in treated else before
    logs = [np.log10(cells.middles) for cells in (before, after)]
    edges = np.linspace(min(v.min() for v in logs), max(v.max() for v in logs) + 1e-6, BINS + 1)
    counts = [np.histogram(v, edges, weights=c.counts)[0] for v, c in zip(logs, (before, after), strict=True)]
    if before.size != after.size:
        counts[0] = np.rint(counts[0] * (after.size / before.size)).astype(int)
    histogram = [["log10_norm", "before", "after"]]
    histogram += [[f"{c:.4f}", *n] for c, *n in zip((edges[:-1] + edges[1:]) / 2, *counts, strict=True)]
    truth, chosen = _pairs(planted or {}), _pairs(found.selected)
    scores = [["rank", "layer", "neuron", "attribution", "activation", "selected", "planted"]]
    for rank, n in enumerate(found.neurons, start=1):
        place = (n.layer, n.neuron)
        scores.append([rank, *place, n.attribution, n.activation, int(place in chosen), int(place in truth)])
    return Tables(norms, histogram, scores)


def sentence(name: str, found: RegisterNeurons, metrics: Mapping) -> str:
    """What was found, in one or two lines for a terminal."""
    if found.detection is None:
        return (
            f"{name}: no outliers (largest patch norm {metrics['largest_norm']:.3g}, "
            f"median {metrics['median_norm']:.3g})"
        )
    text = (
        f"{name}: {metrics['outlier_fraction']:.2%} of patches are outliers (norm over {metrics['threshold']:.3g} in "
        f"block {metrics['detect_layer']}); {found.num_selected} register neurons write {found.explained:.1%} of their "
        "excess"
    )
    if SETTLE_ON < found.again == len(found.outlier_fraction):
        text += f"; all images were gone through twice, as they contradict the first {SETTLE_ON}"
    if "recall" in metrics:
        text += f"; planted: precision {metrics['precision']:g}, recall {metrics['recall']:g}"
    if found.num_selected:
        left = {key: f"{metrics[f'outlier_fraction_{key}']:.2%}" for key in ("after", "ablated", "empty", "random")}
        text += (
            f"\n  outliers left: {left['after']} with one test-time register, {left['ablated']} with the neurons silenced, "
            f"{left['empty']} with an empty register, {left['random']} with random neurons moved"
        )
    return text


def _pairs(neurons: Mapping[int, Iterable[int]]) -> set[tuple[int, int]]:
    return {(layer, unit) for layer, units in neurons.items() for unit in units}
