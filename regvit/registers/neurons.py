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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.arithmetic import arithmetic, check_precision
from regvit.models.hooks import blocks, output_projection, watch_inputs
from regvit.models.tokens import TokenLayout
from regvit.registers.neurons_file import MIN_SHARE, Neuron, read_neurons
from regvit.registers.norms import LayerNorms
from regvit.registers.outliers import Detection, check_layer
from regvit.registers.scores import Scores
from regvit.registers.search import Batches, search


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
        explained: share of the outliers' excess residual that the selected neurons write.
        outlier_fraction: share of outlier patches, of each image; zero where the model has none.
        again: images that were gone through twice.
        precision: of the forward passes, see `regvit.models.arithmetic`.
    """

    detection: Detection | None
    norms: tuple[LayerNorms, ...] = field(repr=False)
    neurons: tuple[Neuron, ...] = ()
    active: tuple[Neuron, ...] = ()
    selected: dict[int, tuple[int, ...]] = field(default_factory=dict)
    explained: float = 0.0
    outlier_fraction: Float[np.ndarray, " b"] = field(default_factory=lambda: np.zeros(0), repr=False)
    again: int = 0
    precision: str = "float32"

    @property
    def num_selected(self) -> int:
        """How many neurons were selected, over all layers."""
        return sum(len(units) for units in self.selected.values())

    def to_json(self, **about: object) -> str:
        """Readable, diffable text; `about` stands first (backbone, weights digest, seed, …)."""
        document = {
            **about,
            **({} if self.precision == "float32" else {"precision": self.precision}),
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
    images: Float[Tensor, "b 3 h w"] | Batches,
    *,
    threshold: float | None = None,
    layer: int | None = None,
    top_k: int | None = None,
    max_layer: int | None = None,
    explained: float = 0.99,
    score: str = "attribution",
    keep: int = 200,
    precision: str = "float32",
) -> RegisterNeurons:
    """Finds the register neurons of a timm vision transformer.

    Args:
        model: a timm ViT without test-time registers, in evaluation mode.
        images: normalised; one tensor, or batches that can be iterated more than once. A hundred varied images do; they
            should come in random order (`regvit.data.batches.sample`), as the first ones settle the layer.
        threshold, layer: norm and block that make a patch an outlier; found from the data when None. Published:
            30 at the last layer (CLIP B/16), 150 at -2 (DINOv2-L).
        top_k: number of neurons to select; when None, the smallest set that writes `explained` of what all neurons
            with a share of at least `MIN_SHARE` write of the outliers' excess.
        max_layer: last block whose neurons may be selected; the detection layer when None.
        explained: share, over 0 and up to 1.
        score: `attribution`, or `activation` (the published one, which needs `top_k`).
        keep: how many of the best scored neurons to report.
        precision: of the forward passes: `float32`, `float32_medium`, `bfloat16` or `float16`, see `regvit.models.arithmetic`.
    Returns: with nothing selected where the model has no outliers.
    Raises:
        ValueError: an option is out of range, or the images can be iterated only once.
    Source: Jiang et al. 2025, arXiv:2506.08010, section 3; attribution is ours.
    """
    _check_options(top_k, explained, score)
    check_precision(precision)
    batches = _again(images)
    if getattr(model, "test_time_registers", None) is not None:
        raise ValueError(
            "the model has test-time registers, which take its outliers away; remove them before the search"
        )
    _check_layers(len(blocks(model)), threshold, layer, max_layer)  # before the long work
    with arithmetic(precision, next(model.parameters()).device):
        found = search(model, batches, threshold, layer, attribution=score == "attribution")
    seen = {"outlier_fraction": found.outlier_fraction, "again": found.again, "precision": precision}
    if found.scores is None:
        return RegisterNeurons(None, found.norms, **seen)
    return RegisterNeurons(
        found.detection, found.norms, **_select(found.scores, top_k, max_layer, explained, keep), **seen
    )


def _select(scores: Scores, top_k: int | None, max_layer: int | None, explained: float, keep: int) -> dict[str, object]:
    """Ranks the neurons up to `max_layer` and takes the smallest set that explains the excess, or the first `top_k`.

    Returns: `neurons`, `active`, `selected` and `explained` of `RegisterNeurons`.
    """
    ranked = scores.activation if scores.attribution is None else scores.attribution
    allowed = ranked[: None if max_layer is None else max_layer + 1].flatten()
    order = torch.argsort(allowed, descending=True, stable=True)
    shares = None if scores.attribution is None else allowed[order].cumsum(0)
    if top_k is not None:
        count = min(top_k, len(order))
    else:
        notable = int((allowed >= MIN_SHARE).sum())
        count = 0 if notable == 0 else int((shares >= explained * shares[notable - 1]).nonzero()[0, 0]) + 1
    width = ranked.shape[1]
    chosen: dict[int, list[int]] = {}
    for flat in order[:count].tolist():
        chosen.setdefault(flat // width, []).append(flat % width)
    busiest = torch.argsort(
        scores.activation[: None if max_layer is None else max_layer + 1].flatten(), descending=True, stable=True
    )

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
        "explained": 0.0 if shares is None or count == 0 else round(float(shares[count - 1]), 8),
    }


@contextmanager
def ablated(model: nn.Module, selected: dict[int, tuple[int, ...]]) -> Iterator[None]:
    """Silences the given neurons at all patches, inside the `with` block only."""
    all_blocks, layout = blocks(model), TokenLayout.of(model)

    def silence(layer: int, a: Float[Tensor, "b n k"]) -> Tensor:
        a = a.clone()
        layout.patches(a)[..., list(selected[layer])] = 0
        return a

    with watch_inputs({layer: output_projection(all_blocks[layer]) for layer in selected}, silence):
        yield


def _check_options(top_k: int | None, explained: float, score: str) -> None:
    if score not in ("attribution", "activation"):
        raise ValueError(f"score is {score!r}; expected 'attribution' or 'activation'")
    if score == "activation" and top_k is None:
        raise ValueError("score='activation' needs top_k: activations do not add up to a share (published: 10 to 50)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected 1 or more, or None to let the data decide")
    if not 0 < explained <= 1:
        raise ValueError(f"explained is {explained}; expected a share over 0 and up to 1")


def _check_layers(depth: int, threshold: float | None, layer: int | None, max_layer: int | None) -> None:
    check_layer(depth, threshold, layer)
    if max_layer is not None and not 0 <= max_layer < depth:
        raise ValueError(f"max_layer {max_layer} is out of range: the model has {depth} blocks (0 to {depth - 1})")


def _again(images: Tensor | Batches) -> Batches:
    """Batches that can be gone through more than once."""
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (images, 3, height, width)")
        return images.split(32)
    if iter(images) is images:
        raise ValueError(
            "the images can be gone through only once, and the search goes back to some; give a list or a DataLoader"
        )
    return images
