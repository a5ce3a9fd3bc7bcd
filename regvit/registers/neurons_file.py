"""`features/neurons/<backbone>.json`: the neurons that a search scored and selected, read without torch."""

import json
from dataclasses import dataclass

MIN_SHARE = 1e-3  # a neuron that writes less than a thousandth of the excess is one of the many that write noise


@dataclass(frozen=True)
class Neuron:
    """One MLP unit: block index, unit index, and its two scores (attribution is None where it was not computed)."""

    layer: int
    neuron: int
    activation: float
    attribution: float | None


@dataclass(frozen=True)
class NeuronsFile:
    """What the file says.

    Attributes:
        selected: `{layer: (neuron, …)}`, the register neurons.
        detection: `{"layer": block, "threshold": norm}` above which patches are outliers; None where there are none.
        candidates: all neurons with scores: the best by attribution, and the most active.
    """

    selected: dict[int, tuple[int, ...]]
    detection: dict | None = None
    candidates: tuple[Neuron, ...] = ()


def read_neurons(text: str) -> NeuronsFile:
    """The neurons from the text that `RegisterNeurons.to_json` made.

    Raises:
        ValueError: a key is missing.
    """
    document = json.loads(text)
    if missing := {"threshold", "detect_layer", "selected"} - document.keys():
        raise ValueError(f"the neurons file lacks {', '.join(sorted(missing))}; run the identify stage again")
    layer = document["detect_layer"]
    scored = [*document.get("neurons", []), *document.get("active", [])]
    return NeuronsFile(
        selected={int(layer): tuple(units) for layer, units in document["selected"].items()},
        detection=None if layer is None else {"layer": layer, "threshold": document["threshold"]},
        candidates=tuple({(entry["layer"], entry["neuron"]): Neuron(**entry) for entry in scored}.values()),
    )
