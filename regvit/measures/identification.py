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

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn

from regvit.measures.tables import mean_figures
from regvit.models.arithmetic import arithmetic
from regvit.registers.control_neurons import control_neurons
from regvit.registers.controls import ablated, mlp_widths
from regvit.registers.neurons import RegisterNeurons
from regvit.registers.neurons_file import NeuronsFile, Overlap
from regvit.registers.norms import LayerNorms
from regvit.registers.outliers import patch_norms
from regvit.registers.search import SETTLE_ON, Batches, picked
from regvit.registers.test_time import add_test_time_registers
from regvit.stats.figures import Figure

BINS = 60
CONTROL_IMAGES = 512  # the first ones of the search; a fraction of 1 % is then known to about 0.1 %


def norms_under_treatments(
    model: nn.Module, batches: Batches, search: RegisterNeurons, seed: int
) -> dict[str, Float[np.ndarray, "b p"]]:
    """Patch norms in the detection layer under each treatment of the table above; empty where nothing was found.

    Args:
        batches: the images of the search, of which the first `CONTROL_IMAGES` are used.
        seed: of the random neurons.
    """
    if not search.num_selected:
        return {}
    first = np.arange(min(len(search.outlier_fraction), CONTROL_IMAGES))

    def seen() -> Float[np.ndarray, "b p"]:
        images = (batch for _, batch in picked(batches, first))
        with arithmetic(search.precision, next(model.parameters()).device):
            return patch_norms(model, images, [search.detection.layer])[0]

    with ablated(model, search.selected):
        norms = {"ablated": seen()}
    others = control_neurons("random", search.selected, mlp_widths(model, search.selected), seed=seed)
    for name, neurons in (("after", search.selected), ("empty", {}), ("random", others)):
        with add_test_time_registers(model, neurons):
            norms[name] = seen()
    return norms


def figures(
    search: RegisterNeurons,
    treated: Mapping[str, Float[np.ndarray, "b p"]],
    planted: Mapping[int, Iterable[int]] | None,
    seed: int,
) -> list[Figure]:
    """Figures of the search, with intervals of the outlier fractions; precision and recall where the truth is known.

    Args:
        treated: of `norms_under_treatments`.
        planted: `{layer: [neuron, …]}` of a planted backbone.
        seed: of the bootstrap.
    """
    detection = search.detection
    norms = search.norms[-2 if detection is None else detection.layer]
    whole = {
        "outliers_found": detection is not None,
        "layer": detection and detection.layer,
        "threshold": detection and detection.threshold,
        "largest_norm": norms.max(),
        "median_norm": norms.median(),
        "register_neurons": search.num_selected,
        "explained": search.explained,
    }
    if planted:
        truth, chosen = _pairs(planted), _pairs(search.selected)
        whole["precision"] = len(truth & chosen) / len(chosen) if chosen else None
        whole["recall"] = len(truth & chosen) / len(truth)
    fractions = {"outlier_fraction": search.outlier_fraction}
    fractions |= {f"outlier_fraction_{name}": (v > detection.threshold).mean(1) for name, v in treated.items()}
    n = len(search.outlier_fraction) or None
    plain = [Figure(name, None if value is None else float(value), n=n) for name, value in whole.items()]
    return plain + mean_figures(fractions, seed)


def norm_table(search: RegisterNeurons) -> pd.DataFrame:
    """Quantiles of the patch norms, a row a block."""
    quantiles = {"median": 0.5, "q99": 0.99, "max": 1.0}
    rows = [{name: values.quantile(q) for name, q in quantiles.items()} for values in search.norms]
    return pd.DataFrame(rows).assign(max=[values.max() for values in search.norms]).rename_axis("layer").reset_index()


def histogram_table(search: RegisterNeurons, treated: Mapping[str, Float[np.ndarray, "b p"]]) -> pd.DataFrame:
    """Patches by norm in the detection layer, before and after one test-time register.

    It counts as many patches before as after: where fewer images were treated, counts before are scaled down.
    """
    before = search.norms[-2 if search.detection is None else search.detection.layer]
    after = LayerNorms.of(treated["after"]) if "after" in treated else before
    logs = [np.log10(cells.middles) for cells in (before, after)]
    edges = np.linspace(min(v.min() for v in logs), max(v.max() for v in logs) + 1e-6, BINS + 1)
    counts = [np.histogram(v, edges, weights=c.counts)[0] for v, c in zip(logs, (before, after), strict=True)]
    counts[0] = np.rint(counts[0] * (after.size / before.size)).astype(int)
    return pd.DataFrame({"log10_norm": (edges[:-1] + edges[1:]) / 2, "before": counts[0], "after": counts[1]})


def score_table(search: RegisterNeurons, planted: Mapping[int, Iterable[int]] | None) -> pd.DataFrame:
    """The best scored neurons by rank, which of them were selected, and which planted."""
    truth, chosen = _pairs(planted or {}), _pairs(search.selected)
    table = pd.DataFrame(
        [vars(neuron) for neuron in search.neurons], columns=["layer", "neuron", "attribution", "activation"]
    )
    places = list(zip(table["layer"], table["neuron"], strict=True))
    table.insert(0, "rank", range(1, len(table) + 1))
    table["selected"] = [int(place in chosen) for place in places]
    table["planted"] = [int(place in truth) for place in places]
    return table


def moved_figures(run: Mapping, searched: NeuronsFile) -> list[Figure]:
    """`found_neurons`: the share of the found neurons that the run takes; none where it takes no neurons, or none were found.

    Args:
        run: its description, `features/runs/<run>.json`.
        searched: of the run's backbone.
    """
    overlap = Overlap.of(run["neurons"] or {}, searched)
    found = len(overlap.shared) + len(overlap.missing)
    if run["neurons"] is None or not found:
        return []
    return [Figure("found_neurons", len(overlap.shared) / found, n=found)]


def moved_table(run: Mapping, searched: NeuronsFile) -> pd.DataFrame:
    """A row a neuron of the run or of the search: whether each has it, and its rank in the search, if it is among the best."""
    overlap = Overlap.of(run["neurons"] or {}, searched)
    rows = [
        {"layer": layer, "neuron": unit, "in_run": in_run, "found": found, "rank": searched.ranks.get((layer, unit))}
        for pairs, in_run, found in ((overlap.shared, 1, 1), (overlap.others, 1, 0), (overlap.missing, 0, 1))
        for layer, unit in pairs
    ]
    columns = ["layer", "neuron", "in_run", "found", "rank"]
    return pd.DataFrame(rows, columns=columns).sort_values(["rank", "layer", "neuron"]).astype({"rank": "Int64"})


def sentence(name: str, search: RegisterNeurons, shown: Iterable[Figure]) -> str:
    """What was found, in one or two lines for a terminal.

    Args:
        shown: of `figures`.
    """
    value = {figure.metric: figure.value for figure in shown}
    if search.detection is None:
        return (
            f"{name}: no outliers (largest patch norm {value['largest_norm']:.3g}, median {value['median_norm']:.3g})"
        )
    text = (
        f"{name}: {value['outlier_fraction']:.2%} of patches are outliers (norm over {value['threshold']:.3g} in "
        f"block {value['layer']:.0f}); {search.num_selected} register neurons"
    )
    text += "" if search.explained is None else f" write {search.explained:.1%} of their excess"
    if SETTLE_ON < search.again == len(search.outlier_fraction):
        text += f"; all images were gone through twice, as they contradict the first {SETTLE_ON}"
    if "recall" in value:
        precision = "–" if value["precision"] is None else f"{value['precision']:g}"  # where nothing was selected
        text += f"; planted: precision {precision}, recall {value['recall']:g}"
    if search.num_selected:
        left = {key: f"{value[f'outlier_fraction_{key}']:.2%}" for key in ("after", "ablated", "empty", "random")}
        text += (
            f"\n  outliers left: {left['after']} with one test-time register, {left['ablated']} with the neurons silenced, "
            f"{left['empty']} with an empty register, {left['random']} with random neurons moved"
        )
    return text


def _pairs(neurons: Mapping[int, Iterable[int]]) -> set[tuple[int, int]]:
    return {(layer, unit) for layer, units in neurons.items() for unit in units}
