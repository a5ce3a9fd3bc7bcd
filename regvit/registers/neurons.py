"""Finding register neurons: the MLP units that write the excess norm of outlier tokens.

Two scores, both over outlier patches found by norm (CLS and registers never count):

    activation_u  = mean over images of the mean |a_u| at the image's outliers        (Jiang et al. 2025)
    attribution_u = (E_out[a_u] - E_rest[a_u]) * (s * W[:, u]) . e / |e|^2,    e = E_out[x] - E_rest[x]

a is the input of the MLP's output projection W, s its LayerScale, x the residual stream at the detection layer.
Attribution is the share of the outliers' excess residual that the neuron writes; a block's neurons after the
detection layer cannot be causes and are left out. One pass over the images gives both (`regvit.registers.search`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.arithmetic import arithmetic, check_precision
from regvit.models.hooks import blocks
from regvit.models.sources import transform_of
from regvit.registers.images import Batches, Loading, batches_of
from regvit.registers.neurons_file import MIN_SHARE, Neuron, read_neurons
from regvit.registers.norms import LayerNorms
from regvit.registers.outliers import Detection, check_layer
from regvit.registers.scores import Scores
from regvit.registers.search import SearchOptions, search
from regvit.registers.treatable import check_treatable, uncompiled

PUBLISHED = {  # of Jiang et al.'s code and paper; without the notebook's sparsity filter
    "openai_clip_base": SearchOptions(30.0, -1, top_k=10, max_layer=5, score="activation", cls_counts=True),
    "openclip_base": SearchOptions(30.0, -1, top_k=10, max_layer=5, score="activation", cls_counts=True),
    "openclip_large": SearchOptions(150.0, -2, top_k=10, max_layer=14, score="activation", cls_counts=True),
    "dinov2_large": SearchOptions(150.0, -2, top_k=50, max_layer=17, score="activation", cls_counts=True),
}


@dataclass(frozen=True)
class RegisterNeurons:
    """The outcome of a search.

    Args:
        detection: layer and norm above which patches are outliers; None where the model has none.
        norms: of the patches at each block's output; after the detection layer, of the first images only
            (`regvit.registers.search`).
        neurons: the best scored ones, best first.
        active: those of largest activation, whatever they write: what a control may move instead.
        selected: `{layer: (neuron, …)}`, empty where the model has no outliers.
        explained: share of the outliers' excess residual that the selected neurons write; None where that is not defined
            (blocks that normalise after the MLP; outliers everywhere).
        outlier_fraction: share of outlier patches, of each image; zero where the model has none.
        again: images that were gone through twice.
        precision: of the forward passes, see `regvit.models.arithmetic`.
        options: of the search.
    """

    detection: Detection | None
    norms: tuple[LayerNorms, ...] = field(repr=False)
    neurons: tuple[Neuron, ...] = ()
    active: tuple[Neuron, ...] = ()
    selected: dict[int, tuple[int, ...]] = field(default_factory=dict)
    explained: float | None = 0.0
    outlier_fraction: Float[np.ndarray, " b"] = field(default_factory=lambda: np.zeros(0), repr=False)
    again: int = 0
    precision: str = "float32"
    options: SearchOptions = field(default_factory=SearchOptions, repr=False)

    @property
    def num_selected(self) -> int:
        """How many neurons were selected, over all layers."""
        return sum(len(units) for units in self.selected.values())

    def to_json(self, **about: object) -> str:
        """Readable, diffable text; `about` stands first (backbone, weights digest, seed, …), then what is not as by default."""
        document = {
            **about,
            **({} if self.precision == "float32" else {"precision": self.precision}),
            **({"search": self.options.changed()} if self.options.changed() else {}),
            "threshold": self.detection and self.detection.threshold,
            "detect_layer": self.detection and self.detection.layer,
            "explained": self.explained,
            "selected": {str(layer): list(units) for layer, units in self.selected.items()},
            "neurons": [vars(neuron) for neuron in self.neurons],
            "active": [vars(neuron) for neuron in self.active],
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"


def read_selected(text: str) -> tuple[Detection | None, dict[int, tuple[int, ...]]]:
    """Detection and selected neurons from the text that `to_json` made.

    Raises:
        ValueError: a key is missing.
    """
    read = read_neurons(text)
    return read.detection and Detection(**read.detection, separation=float("nan")), read.selected


@torch.inference_mode()
def find_register_neurons(
    model: nn.Module,
    images: object,
    options: SearchOptions | None = None,
    *,
    transform: Loading | None = None,
    keep: int = 200,
    precision: str = "float32",
    **changes: object,
) -> RegisterNeurons:
    """Finds the register neurons of a timm vision transformer.

    Args:
        model: a timm ViT without test-time registers, in evaluation mode, compiled or not.
        images: a tensor (images, 3, height, width), normalised; a list of such images, of batches, of PIL images or of
            paths; a folder; or a DataLoader that yields tensors, `(images, labels)` or dicts. A hundred varied images
            do; they should come in random order, as the first ones settle the layer.
        options: `SearchOptions`; `PUBLISHED` has those of the published searches. Each may be given by its name too:
            `find_register_neurons(model, images, layer=-2, threshold=150)`.
        transform: of PIL images and files; when None, the one that timm names for the model's weights.
        keep: how many of the best scored neurons to report.
        precision: of the forward passes: `float32`, `float32_medium`, `bfloat16` or `float16`, see `regvit.models.arithmetic`.
    Returns: with nothing selected where the model has no outliers.
    Raises:
        ValueError: an option is out of range, the model cannot be treated, or the images are none, not normalised, or
            others when they are gone through again.
    Source: Jiang et al. 2025, arXiv:2506.08010, section 3; attribution is ours.
    """
    options = replace(options or SearchOptions(), **changes)
    check_precision(precision)
    model = uncompiled(model)
    if getattr(model, "test_time_registers", None) is not None:
        raise ValueError(
            "the model has test-time registers, which take its outliers away; remove them before the search"
        )
    depth = len(blocks(model))
    check_layer(depth, options.threshold, options.layer, options.sigma)  # before the long work
    if options.max_layer is not None and not 0 <= options.max_layer < depth:
        raise ValueError(
            f"max_layer {options.max_layer} is out of range: the model has {depth} blocks (0 to {depth - 1})"
        )
    check_treatable(model)
    batches = batches_of(images, transform or (lambda image: transform_of(model)(image)))
    return search_model(model, batches, options, keep, precision)


def search_model(
    model: nn.Module,
    batches: Batches,
    options: SearchOptions,
    keep: int,
    precision: str,
    moved: Mapping[int, Sequence[int]] | None = None,
) -> RegisterNeurons:
    """The search itself, on a model that may have test-time registers.

    Args:
        moved: neurons that these have taken over: they write nothing at patches, whatever goes into their block's output
            projection.
    """
    with arithmetic(precision, next(model.parameters()).device):
        found = search(model, batches, options)
    seen = {
        "outlier_fraction": found.outlier_fraction,
        "again": found.again,
        "precision": precision,
        "options": options,
    }
    if found.scores is None:
        return RegisterNeurons(None, found.norms, **seen)
    for table in (found.scores.activation, found.scores.attribution):
        for layer, units in (moved or {}).items():
            if table is not None and layer < len(table):
                table[layer, list(units)] = 0
    return RegisterNeurons(found.detection, found.norms, **_select(found.scores, options, keep), **seen)


def _select(scores: Scores, options: SearchOptions, keep: int) -> dict[str, object]:
    """Ranks the neurons up to `max_layer` and takes the smallest set that explains the excess, the first `top_k`, or those
    above a percentile.

    Returns: `neurons`, `active`, `selected` and `explained` of `RegisterNeurons`.
    """
    last = None if options.max_layer is None else options.max_layer + 1
    attribution = None if scores.attribution is None else scores.attribution[:last].flatten()
    activation = scores.activation[:last].flatten()
    ranked = attribution if options.score == "attribution" else activation
    order = torch.argsort(ranked, descending=True, stable=True)
    written = None if attribution is None else attribution[order].cumsum(0)
    count = _count(ranked[order], options)
    width = scores.activation.shape[1]
    chosen: dict[int, list[int]] = {}
    for flat in order[:count].tolist():
        chosen.setdefault(flat // width, []).append(flat % width)
    busiest = torch.argsort(activation, descending=True, stable=True)

    def described(flat: int) -> Neuron:
        return Neuron(
            layer=flat // width,
            neuron=flat % width,
            activation=round(float(scores.activation.flatten()[flat]), 6),
            attribution=None if scores.attribution is None else round(float(scores.attribution.flatten()[flat]), 8),
        )

    return {
        "neurons": tuple(described(flat) for flat in order[: max(keep, count)].tolist()),
        "active": tuple(described(flat) for flat in busiest[:keep].tolist()),
        "selected": {layer: tuple(sorted(chosen[layer])) for layer in sorted(chosen)},
        "explained": None if written is None else round(float(written[count - 1]), 8) if count else 0.0,
    }


def _count(ranked: Float[Tensor, " k"], options: SearchOptions) -> int:
    """How many of the neurons are selected, by their scores, best first."""
    if options.top_k is not None:
        return min(options.top_k, len(ranked))
    if options.percentile is not None:
        share = round(len(ranked) * (100 - options.percentile) / 100, 6)  # of 1,000 above 99.9, one and not two
        return math.ceil(share)  # counted, as equal scores have no percentile between them
    notable, shares = int((ranked >= MIN_SHARE).sum()), ranked.cumsum(0)
    return int((shares >= options.explained * shares[notable - 1]).nonzero()[0, 0]) + 1 if notable else 0
