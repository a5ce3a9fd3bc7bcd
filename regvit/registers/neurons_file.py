"""Register neurons in files, read without torch: those that a search scored and selected
(`features/neurons/<backbone>.json`), and tables as others publish them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

MIN_SHARE = 1e-3  # a neuron that writes less than a thousandth of the excess is one of the many that write noise
MOST_TAKEN = 1000  # neurons of a table that a run takes without being told how many; tables of all neurons have 100,000


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
        ranks: `{(layer, neuron): place}` of the best ones, from 1.
        explained: share of the outliers' excess that the selected ones write.
    """

    selected: dict[int, tuple[int, ...]]
    detection: dict | None = None
    candidates: tuple[Neuron, ...] = ()
    ranks: dict[tuple[int, int], int] = field(default_factory=dict)
    explained: float = 0.0


@dataclass(frozen=True)
class Overlap:
    """Neurons of a run held against those of a search.

    Attributes:
        shared: those that the search selected, too.
        others: those that it did not select.
        missing: those that it selected and the run does not take.
    """

    shared: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, int], ...]
    missing: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, neurons: Mapping[int, Iterable[int]], searched: NeuronsFile) -> "Overlap":
        taken, found = set(_pairs(neurons)), set(_pairs(searched.selected))
        return cls(*(tuple(sorted(pairs)) for pairs in (taken & found, taken - found, found - taken)))

    def sentence(self, ranks: Mapping[tuple[int, int], int]) -> str:
        """Each neuron as layer.neuron with its rank in the search."""

        def named(pairs: Iterable[tuple[int, int]]) -> str:
            ranked = sorted(pairs, key=lambda pair: (ranks.get(pair, len(ranks) + 1), pair))
            words = [
                f"{layer}.{unit} (rank {ranks.get((layer, unit), f'over {len(ranks)}')})" for layer, unit in ranked
            ]
            return ": " + ", ".join(words) if words else ""

        return (
            f"{len(self.shared)} of its {len(self.shared) + len(self.others)} neurons are among those of the search here"
            f"{named(self.shared)}; {len(self.others)} are not{named(self.others)}; "
            f"{len(self.missing)} of the search are missing{named(self.missing)}"
        )


def read_neurons(text: str) -> NeuronsFile:
    """The neurons from the text that `RegisterNeurons.to_json` made.

    Raises:
        ValueError: a key is missing.
    """
    document = json.loads(text)
    if missing := {"threshold", "detect_layer", "selected"} - document.keys():
        raise ValueError(f"the neurons file lacks {', '.join(sorted(missing))}; run the identify stage again")
    layer, best = document["detect_layer"], document.get("neurons", [])
    scored = {(entry["layer"], entry["neuron"]): Neuron(**entry) for entry in [*best, *document.get("active", [])]}
    return NeuronsFile(
        selected=_layers(_pairs(document["selected"])),
        detection=None if layer is None else {"layer": layer, "threshold": document["threshold"]},
        candidates=tuple(scored.values()),
        ranks={(entry["layer"], entry["neuron"]): place for place, entry in enumerate(best, 1)},
        explained=document.get("explained", 0.0),
    )


def table_path(source: str) -> Path:
    """The file that a run's `neurons: file:…` names."""
    return Path(source.partition(":")[2].partition("?")[0]).expanduser()


def read_table(source: str) -> dict[int, tuple[int, ...]]:
    """Register neurons from a file of ours or a table as others publish it.

    Args:
        source: `file:<path>[?top_k=<number>&max_layer=<layer>]`. The file is JSON: what a search wrote,
            `{layer: [neuron, …]}`, or `[[layer, neuron, score], …]`, best first. `top_k` takes so many of the best ones up to
            `max_layer`, which is any unless told otherwise.
    Returns: `{layer: (neuron, …)}`.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no neurons, or more than can be meant; or an option is not known.
    """
    path, options = table_path(source), dict(parse_qsl(source.partition("?")[2]))
    if strange := {key for key, value in options.items() if key not in ("top_k", "max_layer") or not value.isdigit()}:
        raise ValueError(
            f"neurons {source!r} has the option {min(strange)}; expected top_k=<number> or max_layer=<layer>"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}, the file of neurons, does not exist; put it there, or mend the path")
    try:
        document = json.loads(path.read_bytes())
        ranked = isinstance(document, list) or ("selected" in document and "top_k" in options)
        if not ranked:
            pairs = _pairs(document.get("selected", document))
        elif isinstance(document, list):
            pairs = [(int(row[0]), int(row[1])) for row in document]
        else:
            pairs = [(row["layer"], row["neuron"]) for row in document["neurons"]]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no neurons ({error}); expected what `regvit neurons` writes, {{layer: [neuron, …]}}, or "
            "[[layer, neuron, score], …]"
        ) from error
    if "top_k" in options and not ranked:
        raise ValueError(f"{path} ranks no neurons, so top_k cannot be taken of it: leave it out")
    pairs = [pair for pair in pairs if pair[0] <= int(options.get("max_layer", pair[0]))]
    pairs = pairs[: int(options.get("top_k", len(pairs)))]
    if not 0 < len(pairs) <= MOST_TAKEN:
        raise ValueError(
            f"{path} gives {len(pairs)} neurons, expected 1 to {MOST_TAKEN}; say how many: file:{path}?top_k=50&max_layer=17"
        )
    return _layers(pairs)


def _pairs(neurons: Mapping[int | str, Iterable[int]]) -> list[tuple[int, int]]:
    return [(int(layer), int(unit)) for layer, units in neurons.items() for unit in units]


def _layers(pairs: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    found: dict[int, list[int]] = {}
    for layer, unit in pairs:
        found.setdefault(layer, []).append(unit)
    return {layer: tuple(sorted(set(units))) for layer, units in sorted(found.items())}
