"""What one forward of a run leaves of each image, for all measurements on single tokens: the compute half of `dense_set`.

Of an image there are, by group; p patches stand row by row of the grid:

    patches     cls (d), registers (r, d), patches (p, d): what readouts get, the output of `forward_features`
    norms       norms (l, p): L2 norms of the patches at the output of every block
                neighbours (2, p): mean cosine of a patch embedding to its up to four neighbours, as it is, and centred on
                the mean embedding of the set's first images (it says how little information a patch holds)
    attention   attention (l, h, q, n): of CLS and registers to all tokens, by block and head
                all_queries (l, h, 3): entropy, largest weight and coherence over all queries
                (`regvit.models.query_attention`)
    inside      k, q, v, token (m, p, d) of the last m blocks, see `regvit.models.token_features`
    always      outliers (p): where the *untreated* model of the same backbone has an outlier in the detection layer,
                so that runs with and without registers are looked at in the same places

What a model lacks (CLS, registers) is left out. Images are whole, squashed to a square: boxes, masks and depth speak of
all of an image. A run that changes its backbone costs a second forward, which stops at the detection layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from regvit.features.dense_set import GROUPS, grid_side
from regvit.models.attention import watch_prefix_attention
from regvit.models.backbones import Backbone, load_backbone, resized
from regvit.models.hooks import blocks, forward_until, watch_outputs
from regvit.models.query_attention import watch_query_attention
from regvit.models.token_features import KINDS, Feature, last_layers, watch_patch_features
from regvit.models.tokens import TokenLayout
from regvit.registers.neighbourhood import neighbour_cosine
from regvit.registers.outliers import Detection
from regvit.registers.run_files import changes_backbone, read_run
from regvit.registers.runs import detection_of, open_run

CENTRED_ON = 64  # images, the first of the set


@dataclass(frozen=True)
class Subject:
    """A run beside its backbone as it stands on disk.

    Args:
        run: the run's backbone.
        untreated: the same without test-time registers, none of its neurons moved or silenced; the very same object
            where the run changes nothing.
        detection: layer and threshold of outliers in `untreated`; None where it has none.
    """

    run: Backbone
    untreated: Backbone
    detection: Detection | None

    def of_whole_images(self, img_size: int | None) -> Subject:
        """The same for images that are squashed to a square.

        Args:
            img_size: pixels a side, or None for the backbone's own.
        Raises:
            ValueError: the model does not take images of that size.
        """

        def whole(backbone: Backbone) -> Backbone:
            backbone = resized(backbone, img_size)
            return replace(backbone, transform=backbone.transform.whole())

        run = whole(self.run)
        return replace(self, run=run, untreated=run if self.untreated is self.run else whole(self.untreated))


def open_subject(run_file: Path, backbones: Path, device: str = "cpu") -> Subject:
    """The run of a file of `compose` beside its untreated backbone, on the device.

    Args:
        backbones: folder that holds one folder a backbone.
    Raises:
        ValueError: the run was composed of other weights.
    """
    described, run = read_run(run_file), open_run(run_file, backbones)
    untreated = load_backbone(backbones / run.name) if changes_backbone(described) else run
    for backbone in (run, untreated):
        backbone.model.to(device)
    return Subject(run, untreated, detection_of(described))


@dataclass(frozen=True)
class DenseArrays:
    """The arrays of a batch of images: `compute` of a `regvit.features.forward.Forward` on the run's backbone.

    Attributes:
        groups: some of `GROUPS`.
        layers: last blocks that `inside` is of.
        detection: see `Subject`.
        untreated: the model that tells outliers; None where it is the run's own.
        centre: mean patch embedding, from `mean_embedding`; needed for `norms`.
    Raises:
        ValueError: a group is unknown.
    """

    groups: tuple[str, ...]
    layers: int = 1
    detection: Detection | None = None
    untreated: nn.Module | None = None
    centre: Float[Tensor, " d"] | None = None

    def __post_init__(self):
        if unknown := set(self.groups) - set(GROUPS):
            raise ValueError(f"arrays {sorted(unknown)} are unknown; expected some of {', '.join(GROUPS)}")

    def about(self, model: nn.Module) -> dict:
        """What a reader must know of them, as plain JSON values: token layout, blocks that `inside` is of, detection."""
        detection = self.detection and {"layer": self.detection.layer, "threshold": self.detection.threshold}
        return {"layout": vars(TokenLayout.of(model)), "inside_layers": self._inside(model), "detection": detection}

    @torch.inference_mode()
    def __call__(self, model: nn.Module, images: Float[Tensor, "b 3 s s"]) -> dict[str, Shaped[Tensor, "b ..."]]:
        """The arrays by their names; images are normalised and on the model's device."""
        layout, at, norms = TokenLayout.of(model), self._inside(model), {}
        attend = "attention" in self.groups
        with (
            watch_outputs(dict(enumerate(blocks(model))), lambda layer, x: norms.update({layer: _norms(layout, x)})),
            watch_prefix_attention(model) if attend and layout.prefix else nullcontext({}) as weights,
            watch_query_attention(model) if attend else nullcontext({}) as qualities,
            watch_patch_features(model, [Feature(kind, layer) for kind in KINDS for layer in at]) as seen,
        ):
            tokens = model.forward_features(images)
        stacked = torch.stack([norms[layer] for layer in sorted(norms)], dim=1)  # (b, l, p)
        grid_side(stacked.shape[2])
        arrays = {"outliers": self._outliers(images, stacked)}
        if "patches" in self.groups:
            arrays |= {"patches": layout.patches(tokens)}
            arrays |= {"cls": layout.cls_token(tokens)} if layout.cls else {}
            arrays |= {"registers": layout.registers(tokens)} if layout.num_registers else {}
        if "norms" in self.groups:
            e = patch_embeddings(model, images).float()
            cosines = [neighbour_cosine(e), neighbour_cosine(e if self.centre is None else e - self.centre.to(e))]
            arrays |= {"norms": stacked, "neighbours": torch.stack(cosines, dim=1)}
        if weights:
            arrays["attention"] = torch.stack([weights[layer] for layer in sorted(weights)], dim=1)
        if qualities:
            arrays["all_queries"] = torch.stack([qualities[layer] for layer in sorted(qualities)], dim=1)
        if at:
            arrays |= {kind: torch.stack([seen[Feature(kind, layer)] for layer in at], dim=1) for kind in KINDS}
        return arrays

    def _inside(self, model: nn.Module) -> list[int]:
        return (
            [feature.layer for feature in last_layers(model, self.layers, KINDS[:1])] if "inside" in self.groups else []
        )

    def _outliers(self, images: Float[Tensor, "b 3 s s"], norms: Float[Tensor, "b l p"]) -> Bool[Tensor, "b p"]:
        if self.detection is None:
            return torch.zeros_like(norms[:, 0], dtype=torch.bool)
        found = norms[:, self.detection.layer]
        if self.untreated is not None:
            model = self.untreated.to(images.device)
            layout, block, seen = TokenLayout.of(model), blocks(model)[self.detection.layer], []
            with watch_outputs({0: block}, lambda _, x: seen.append(_norms(layout, x))):
                forward_until(model, images, block)
            found = seen[0]
        return found > self.detection.threshold


def _norms(layout: TokenLayout, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b p"]:
    return layout.patches(x).float().norm(dim=-1)


@torch.inference_mode()
def mean_embedding(model: nn.Module, batches: Iterable[Float[Tensor, "b 3 s s"]]) -> Float[Tensor, " d"]:
    """Mean patch embedding of the first `CENTRED_ON` images, before positions are added.

    Raises:
        ValueError: there are no images, or the model has no patch embedding of its own.
    """
    parts: list[Tensor] = []
    for images in batches:
        left = CENTRED_ON - sum(map(len, parts))
        parts.append(patch_embeddings(model, images[:left]).double().mean((1, 2)))  # (b, d)
        if len(images) >= left:
            break
    if not parts:
        raise ValueError("no images to look into; give at least one batch")
    return torch.cat(parts).mean(0).float()


@torch.inference_mode()
def patch_embeddings(model: nn.Module, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b i j d"]:
    """Patch embeddings on their grid, before positions are added.

    Raises:
        ValueError: the model has no patch embedding of its own, or its grid is no square.
    """
    embed = getattr(model, "patch_embed", None)
    if embed is None:
        raise ValueError(f"{type(model).__name__} has no patch embedding at `.patch_embed`; use a timm ViT")
    e = embed(images)
    return e if e.ndim == 4 else e.unflatten(1, (grid_side(e.shape[1]), -1))
