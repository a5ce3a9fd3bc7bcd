"""Outliers and scores in one go through the images, in memory that does not grow with them (but 24 bytes an image).

What is found is what two passes over all images would find, norms first, then scores. One pass does it so:

1. the first `SETTLE_ON` images go through all blocks; their norms settle the detection layer and a first threshold;
2. the others go as far as that layer. The activations of a batch are kept until its norms there are known, and are then
   added to the sums of the scores, with the outliers by the first threshold;
3. the norms of all images give the threshold that counts. The images that it gives other outliers are gone through again:
   what they added is taken off, and what they add now is put in its place. So are the first ones, which were not scored.

Images, the first ones aside, are gone through twice as a whole only where all of them contradict the first: they show
another layer up to the settled one as the best, or no outliers there; or the first ones show none, and all of them do.
Blocks after the settled layer are judged by the first images alone, and only their norms are known of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regvit.models.hooks import (
    blocks,
    forward_until,
    output_projection,
    residual_scale,
    watch_inputs,
    watch_outputs,
    writes_linearly,
)
from regvit.models.tokens import TokenLayout
from regvit.registers.images import Batches
from regvit.registers.norms import LayerNorms, NormCounter
from regvit.registers.outliers import Detection, detect, settle_detection
from regvit.registers.scores import Scores, Sums

SETTLE_ON = 64  # images; ten showed the right layer wherever it was tried
KEPT_BYTES = 256 * 2**20  # activations kept at a time on a CPU; larger batches are taken in parts
KEPT_SHARE = 0.25  # of a GPU's free memory, likewise
SPARSE_BELOW, SPARSE_SHARE = 0.5, 0.5  # activation, and share of an image's tokens below it, of the published filter


@dataclass(frozen=True)
class SearchOptions:
    """What counts as an outlier, and which neurons are taken for register neurons.

    Args:
        threshold, layer: norm and block that make a patch an outlier, negative layers count from the end; found from the
            data when None.
        sigma: instead of a threshold: outliers lie this many standard deviations above the layer's mean norm.
        top_k: number of neurons to select; when None, the smallest set that writes `explained` of what all neurons with
            a share of at least a thousandth write of the outliers' excess.
        percentile: instead of a number: the neurons above this percentile of the scores of all that may be selected.
        max_layer: last block whose neurons may be selected; the detection layer when None.
        explained: share, over 0 and up to 1.
        score: `attribution`, or `activation` (the published one, which needs `top_k` or `percentile`).
        sparsity_filter: of the published notebook, for `activation`: in each image, a neuron scores 0 unless its
            activation is below `SPARSE_BELOW` in at least half of the tokens.
        cls_counts: whether CLS is an outlier too where its norm is above the threshold, as in the published code; for
            `activation`.
    Raises:
        ValueError: an option is out of range, or needs another one.
    """

    threshold: float | None = None
    layer: int | None = None
    sigma: float | None = None
    top_k: int | None = None
    max_layer: int | None = None
    explained: float = 0.99
    score: str = "attribution"
    sparsity_filter: bool = False
    cls_counts: bool = False
    percentile: float | None = None

    def __post_init__(self):
        if self.score not in ("attribution", "activation"):
            raise ValueError(f"score is {self.score!r}; expected 'attribution' or 'activation'")
        if self.score == "activation" and self.top_k is None and self.percentile is None:
            raise ValueError(
                "score='activation' needs top_k (published: 10 to 50) or percentile: activations do not add up to a share"
            )
        if self.top_k is not None and self.percentile is not None:
            raise ValueError(f"top_k {self.top_k} and percentile {self.percentile} exclude each other; leave one out")
        if self.percentile is not None and not 0 < self.percentile < 100:
            raise ValueError(f"percentile is {self.percentile}; expected between 0 and 100, such as 99.9")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; expected 1 or more, or None to let the data decide")
        if not 0 < self.explained <= 1:
            raise ValueError(f"explained is {self.explained}; expected a share over 0 and up to 1")
        if self.score == "attribution" and (self.sparsity_filter or self.cls_counts):
            raise ValueError("sparsity_filter and cls_counts are of the published search: set score='activation' too")
        if self.cls_counts and self.threshold is None:
            raise ValueError("cls_counts needs a threshold: the one found from the data is that of patches")

    def changed(self) -> dict[str, object]:
        """The options that are not as by default."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}


@dataclass(frozen=True)
class Findings:
    """What the search saw.

    Args:
        detection: layer and norm above which patches are outliers; None where the model has none.
        norms: by layer; after the detection layer, of the first `SETTLE_ON` images only.
        outlier_fraction: share of outlier patches, of each image.
        scores: of the neurons up to the detection layer; None where there are no outliers.
        again: images that were gone through twice.
    """

    detection: Detection | None
    norms: tuple[LayerNorms, ...]
    outlier_fraction: Float[np.ndarray, " b"] = field(repr=False)
    scores: Scores | None
    again: int


def search(model: nn.Module, batches: Batches, options: SearchOptions) -> Findings:
    """Detection and scores of all neurons up to the detection layer.

    Args:
        batches: normalised images, each time the same ones in the same order; those with a method `select(rows)`, which
            gives batches of these images, need not go through all of them again.
    Raises:
        ValueError: there are no images, or not the same ones again; a norm is not finite; no patch lies under the
            threshold; the MLPs differ in width, or attribution is not defined for the blocks.
    """
    layer, given = options.layer, None
    if options.threshold is not None:
        given = Detection(layer % len(blocks(model)), float(options.threshold), float("nan"))
    seen = _Pass(model, options, given)
    for part in _parts(batches):
        if seen.images == SETTLE_ON and given is None:
            seen.settle(settle_detection(seen.result(), None, layer, options.sigma))
        seen.add(part)
    settled, again = seen.settled, 0
    if settled is not None and layer is None:  # up to the settled layer, the norms of all images are known
        detection = detect(seen.result()[: settled.layer + 2])
        if detection is None or detection.layer != settled.layer:
            again, seen = seen.images, _Pass(model, options)
            for images in batches:
                seen.add(images)
            detection = detect(seen.result())
    else:
        detection = settle_detection(seen.result(), options.threshold, layer, options.sigma)
    if detection is None:
        return Findings(None, seen.result(), np.zeros(seen.images), None, again)
    rows = seen.unlike(detection)
    seen.settle(detection)
    for chosen, images in picked(batches, rows):
        seen.correct(chosen, images)
    return Findings(detection, seen.result(), seen.outlier_fraction(), seen.scores(), max(again, len(rows)))


class _Pass:
    """One go through the images: norms by layer, what each image has at the detection layer, and the sums.

    Args:
        settled: the detection to score by; while there is none, the norms of all layers are looked at.
    """

    def __init__(self, model: nn.Module, options: SearchOptions, settled: Detection | None = None):
        self.model, self.options, self.attribution = model, options, True
        self.blocks, self.layout = blocks(model), TokenLayout.of(model)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.budget = _kept_bytes(self.device)
        self.norms = NormCounter(len(self.blocks), self.device)
        self.images, self.patches = 0, 0
        self.records: list[Float[Tensor, "b 4"]] = []
        self.settled: Detection | None = None
        self.unscored = 0  # images that came before the detection was settled
        self.settle(settled)

    def settle(self, detection: Detection | None) -> None:
        """From now on, score by this detection; None goes on as before."""
        if detection is None:
            return
        if self.settled is None:
            self.unscored = self.images
            used = self.blocks[: detection.layer + 1]
            widths = {output_projection(block).in_features for block in used}
            if len(widths) > 1:
                raise ValueError(
                    f"the MLPs differ in width ({sorted(widths)}); neurons are compared across equal ones only"
                )
            self.attribution = self.options.score == "attribution" or all(map(writes_linearly, used))
            if self.attribution:
                for block in used:
                    residual_scale(block)  # raises where no attribution is defined, before the long work
            self.width = widths.pop()
            self.sums = Sums(len(used), self.width, self.device)
        self.settled = detection

    def add(self, images: Float[Tensor, "b 3 h w"]) -> None:
        """New images."""
        for part in self._fitting(images):
            depth = len(self.blocks) if self.settled is None or self.images < SETTLE_ON else self.settled.layer + 1
            look = _Look(self, part, depth)
            self.norms.add(look.norms)
            bad = ~look.norms.isfinite().all(2)  # (l, b)
            first_bad = torch.where(bad.any(0), bad.int().argmax(0), -1)
            record = torch.zeros(len(part), 4, device=self.device)
            record[:, 3] = first_bad
            if self.settled is not None:
                at, outliers = look.at_detection, look.outliers
                self.sums.add(look.activations, look.residual, outliers, sparse=look.sparse)
                record[:, 0] = outliers.sum(1)
                record[:, 1] = at.masked_fill(~outliers, torch.inf).amin(1)  # the smallest outlier
                record[:, 2] = at.masked_fill(outliers, -torch.inf).amax(1)  # the largest other patch
            self.records.append(record)
            self.images += len(part)

    def correct(self, rows: Int[np.ndarray, " b"], images: Float[Tensor, "b 3 h w"]) -> None:
        """Images that came before, by their number: their outliers are now those of the detection in force."""
        start = 0
        for part in self._fitting(images):
            here = rows[start : start + len(part)]
            start += len(part)
            look = _Look(self, part, self.settled.layer + 1)
            numbers = torch.from_numpy(here).to(self.device)
            rank = look.at_detection.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            before = rank < self.counts[numbers, None]  # as many as were counted, whatever their last digits are now
            self.sums.add(look.activations, look.residual, look.outliers, before, numbers < self.unscored, look.sparse)
            self.counts[numbers] = look.outliers.sum(1)

    def unlike(self, detection: Detection) -> Int[np.ndarray, " n"]:
        """The images whose outliers are not yet counted as this detection counts them."""
        records = torch.cat(self.records)
        self.counts = records[:, 0].long()
        above, below = records[:, 1:3].T.cpu().numpy()
        changed = (above <= detection.threshold) | (below > detection.threshold)
        changed[: self.unscored if self.settled is not None else self.images] = True
        return np.flatnonzero(changed)

    def result(self) -> tuple[LayerNorms, ...]:
        """Norms by layer.

        Raises:
            ValueError: there were no images, or a norm is not finite (layer and image are named).
        """
        norms = self.norms.result()
        bad = torch.cat(self.records)[:, 3].cpu().numpy()
        if (bad >= 0).any():
            layer = int(bad[bad >= 0].min())
            image = int(np.flatnonzero(bad == layer)[0])
            raise ValueError(f"patch norms are not finite in layer {layer} for image {image}; check weights and images")
        return norms

    def outlier_fraction(self) -> Float[np.ndarray, " b"]:
        """Of each image; where CLS counts, it is one of the places."""
        return self.counts.cpu().numpy() / (self.patches + (self.layout.cls if self.options.cls_counts else 0))

    def scores(self) -> Scores:
        """Attribution too where it is defined, whichever ranks."""
        defined = self.attribution and (self.options.score == "attribution" or not self.sums.everywhere)
        return self.sums.scores(self.blocks[: self.settled.layer + 1], defined)

    def _fitting(self, images: Float[Tensor, "b 3 h w"]) -> Iterator[Float[Tensor, "b 3 h w"]]:
        """Parts of a batch whose activations may be kept; of one image where nothing is known of their size yet."""
        start = 0
        while start < len(images):
            count = len(images)
            if self.settled is not None:
                size = (self.settled.layer + 1) * self.patches * self.width * self.dtype.itemsize
                count = max(1, self.budget // size) if size else 1
            yield images[start : start + count].to(self.device, self.dtype)
            start += count


class _Look:
    """What one forward shows: norms of the first `depth` blocks, and where a detection is settled, what is scored.

    Scored are the places at which an outlier may be: the patches, and CLS before them where it counts.
    """

    def __init__(self, go: _Pass, images: Float[Tensor, "b 3 h w"], depth: int):
        self.activations: list[Float[Tensor, "b p k"]] = []
        self.sparse: list[Bool[Tensor, "b k"]] | None = [] if go.options.sparsity_filter else None
        self.residual: Float[Tensor, "b p d"] | None = None
        self.at_detection: Float[Tensor, "b p"] | None = None
        self._norms: list[Float[Tensor, "b p"]] = []
        self._go, self._layer = go, None if go.settled is None else go.settled.layer
        self._places = go.layout.cls_and_patches if go.options.cls_counts else go.layout.patches
        used = dict(enumerate(go.blocks[:depth]))
        scored = {} if self._layer is None else {i: output_projection(used[i]) for i in range(self._layer + 1)}
        with watch_inputs(scored, self._see_activation), watch_outputs(used, self._see_output):
            forward_until(go.model, images, used[depth - 1])
        self.norms: Float[Tensor, "l b p"] = torch.stack(self._norms)
        patches = self.norms.shape[2]
        if go.patches not in (0, patches):
            raise ValueError(
                f"an image of {patches} patches comes after images of {go.patches}; give images of one size"
            )
        go.patches = patches

    def _see_activation(self, layer: int, a: Float[Tensor, "b n k"]) -> None:
        self.activations.append(self._places(a))
        if self.sparse is not None:
            self.sparse.append((a < SPARSE_BELOW).sum(1) >= SPARSE_SHARE * a.shape[1])

    def _see_output(self, layer: int, x: Float[Tensor, "b n d"]) -> None:
        self._norms.append(self._go.layout.patches(x).float().norm(dim=-1))
        if layer == self._layer:
            self.residual = self._places(x)
            self.at_detection = self.residual.float().norm(dim=-1)

    @property
    def outliers(self) -> Bool[Tensor, "b p"]:
        """Places over the threshold in force."""
        return self.at_detection > self._go.settled.threshold


def _parts(batches: Batches) -> Iterator[Float[Tensor, "b 3 h w"]]:
    """The batches, parted after the images that settle the layer, so that the size of a batch changes nothing."""
    images = 0
    for batch in batches:
        room = SETTLE_ON - images
        images += len(batch)
        if 0 < room < len(batch):
            yield batch[:room]
            batch = batch[room:]
        yield batch


def picked(
    batches: Batches, rows: Int[np.ndarray, " n"]
) -> Iterator[tuple[Int[np.ndarray, " b"], Float[Tensor, "b 3 h w"]]]:
    """Some of the images, with their numbers.

    Args:
        batches: as for `search`.
        rows: numbers of the images, ascending.
    Raises:
        ValueError: there are fewer images than before.
    """
    if not len(rows):
        return
    if select := getattr(batches, "select", None):
        batches, numbers = select(rows.tolist()), rows
    else:
        numbers = np.arange(rows[-1] + 1)
    start = 0
    for images in batches:
        here = numbers[start : start + len(images)]
        start += len(images)
        wanted = np.flatnonzero(np.isin(here, rows))
        if len(wanted):
            yield here[wanted], images[torch.from_numpy(wanted).to(images.device)]
        if start >= len(numbers):
            return
    raise ValueError(f"{start} images came, but {len(numbers)} are wanted; give the same images again")


def _kept_bytes(device: torch.device) -> int:
    """How much memory the activations of a batch may take."""
    if device.type == "cuda":
        return int(KEPT_SHARE * torch.cuda.mem_get_info(device)[0])
    return KEPT_BYTES
