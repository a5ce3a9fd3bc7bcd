"""Why there are attention sinks: what heads give to them, and what they get from them, by block and head.

A sink is an outlier patch; where there are none, the patch of largest norm of each image stands in its place. With A the
attention of a head, V its values and O = A V its output:

    cls_share        mean over images of the CLS query's attention on the image's sinks, nan without CLS
    patch_share      the same of all other patches' queries
    value_ratio      median norm of V at sinks over the median at other patches: small where attending to them does nothing
    effective_rank   exp of the entropy of the singular values of O at patches, as shares of their sum: near 1 where every
                     patch gets the same (Roy and Vetterli 2007, EUSIPCO)

and of the residual stream after the detection block, `sink_norm`, the median norm at sinks over that at other patches, and
the channels that are largest at sinks (massive activations: Sun et al.
2024, arXiv:2402.17762).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regvit.models.attention import attention_of, unfused
from regvit.models.hooks import blocks, watch_inputs, watch_outputs
from regvit.models.token_features import project
from regvit.models.tokens import TokenLayout
from regvit.registers.neurons import RegisterNeurons
from regvit.registers.neurons_file import NeuronsFile
from regvit.registers.outliers import MIN_RATIO, Detection, patch_norms
from regvit.stats.figures import write_csv

IMAGES = 8  # with outliers that are looked at: every attention weight is made, of all tokens
BY_HEAD = ("cls_share", "patch_share", "value_ratio", "effective_rank")
CHANNELS = 3  # the largest ones that are named
NO_OP = 0.5  # a sink whose values are below half of others' hands on next to nothing


@dataclass(frozen=True)
class Channel:
    """A channel of the residual stream: its largest size at sinks, and over the median size of all channels there."""

    index: int
    size: float
    ratio: float


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a model's sinks.

    Args:
        found: the search for register neurons, in the untreated model.
        norm_ratio: largest over median patch norm, by block, in the untreated model.
        sink_norm: see the head of the file.
        cls_share, patch_share, value_ratio, effective_rank: by block and head, see the head of the file.
        channels: the largest at sinks after `layer`.
        layer: the detection block; the last but one without outliers.
    """

    found: RegisterNeurons
    norm_ratio: Float[np.ndarray, " l"]
    sink_norm: float
    cls_share: Float[np.ndarray, "l h"] = field(repr=False)
    patch_share: Float[np.ndarray, "l h"] = field(repr=False)
    value_ratio: Float[np.ndarray, "l h"] = field(repr=False)
    effective_rank: Float[np.ndarray, "l h"] = field(repr=False)
    channels: tuple[Channel, ...]
    layer: int

    @property
    def fraction(self) -> float:
        """Share of the patches that are outliers."""
        return float(self.found.outlier_fraction.mean()) if len(self.found.outlier_fraction) else 0.0

    @property
    def cls_attention(self) -> float:
        """Share of the CLS query's attention on an image's sinks, mean over the later blocks' heads; nan without CLS."""
        later = self.cls_share[self.layer + 1 :]
        return float("nan") if np.isnan(later).all() else float(np.nanmean(later))

    @property
    def sink_value(self) -> float:
        """`value_ratio` of the later blocks' heads, weighted by the share of attention that they give to sinks."""
        weight = np.nan_to_num(self.cls_share[self.layer + 1 :]) + self.patch_share[self.layer + 1 :]
        return float(np.average(self.value_ratio[self.layer + 1 :], weights=weight)) if weight.any() else float("nan")

    @property
    def kind(self) -> str:
        """`none`; `no_op`, where heads that attend to sinks get next to nothing from them; `broadcast`, where they do."""
        if self.found.detection is None:
            return "none"
        return "no_op" if self.sink_value < NO_OP else "broadcast"

    def verdict(self) -> str:
        """What it means for registers, in a sentence."""
        if self.found.detection is None:
            at = int(self.norm_ratio[:-1].argmax())
            return f"no outliers: largest / median norm at most {self.norm_ratio[at]:.1f} (block {at}) in all blocks but the last"
        seen = f"{self.fraction:.2%} of the patches are outliers after block {self.layer}"
        seen += f" ({self.norm_ratio[self.layer]:.0f} times the median norm)"
        if not self.found.num_selected:
            return f"{seen}, but no neuron writes a notable share of their excess: test-time registers have nothing to move"
        share = self.cls_attention
        attention = "" if np.isnan(share) else f"; CLS gives them {share:.0%} of its attention in later blocks"
        units = f"{self.found.num_selected} neuron" + ("s" if self.found.num_selected > 1 else "")
        share = self.found.explained
        written = " can be moved" if share is None else f" write {share:.0%} of their excess"
        return (
            f"registers can help here: {seen}, {units}{written}{attention}, their "
            f"values are {self.sink_value:.2f} of others' ({self.kind.replace('_', '-')} sinks)"
        )

    def verdict_against(self, before: Diagnosis) -> str:
        """What a treatment made of the untreated model's sinks, in a sentence."""
        if self.found.detection is None:
            return self.verdict()
        left = "are gone" if self.sink_norm < MIN_RATIO else "stay"
        said = f"the outliers {left}: at their places {self.sink_norm:.1f} times the norm of other patches"
        said += f" ({before.sink_norm:.1f} before)"
        if not np.isnan(self.cls_attention):
            said += f"; CLS gives these {self.cls_attention:.1%} of its attention in later blocks ({before.cls_attention:.1%} before)"
        if not np.isnan(self.sink_value):  # a cure that hides them has none
            said += f", their values are {self.sink_value:.2f} of others' ({before.sink_value:.2f} before)"
        return said


@torch.inference_mode()
def diagnose(
    model: nn.Module,
    batches: Iterable[Float[Tensor, "b 3 h w"]],
    found: RegisterNeurons,
    untreated: nn.Module | None = None,
) -> Diagnosis:
    """Looks at the sinks of a model.

    Args:
        batches: normalised images, the first of which with outliers are looked at.
        found: by `find_register_neurons`, in the untreated model.
        untreated: the model that tells the outliers, where `model` has a cure.
    Raises:
        ValueError: there are no images, or a block's values or attention weights cannot be read.
    """
    depth = len(blocks(model))
    layer = depth - 2 if found.detection is None else found.detection.layer
    parameter, looks, ratios, seen = next(model.parameters()), [], [], 0
    for batch in batches:
        images = batch.to(parameter.device, parameter.dtype)
        norms = torch.from_numpy(patch_norms(untreated or model, [images]))  # (l, b, p)
        of_layer = norms[layer]
        sinks = of_layer == of_layer.amax(1, keepdim=True)
        if found.detection is not None:
            sinks = of_layer > found.detection.threshold
        chosen = sinks.any(1).nonzero()[: IMAGES - seen, 0]
        ratios.append(norms.amax(2) / norms.median(dim=2).values)
        if len(chosen):
            looks.append(_look(model, images[chosen.to(images.device)], sinks[chosen].to(images.device), layer))
            seen += len(chosen)
        if seen == IMAGES:
            break
    if not looks:
        raise ValueError("none of the images has an outlier, so there is nothing to diagnose; give those of the search")
    stacked = {name: np.nanmean(np.concatenate([look[name] for look in looks]), axis=0) for name in looks[0]}
    sizes, sink_norm = stacked.pop("channels"), float(stacked.pop("sink_norm"))
    order = np.argsort(-sizes, kind="stable")[:CHANNELS]
    median = float(np.median(sizes))
    channels = tuple(Channel(int(i), float(sizes[i]), float(sizes[i]) / median) for i in order)
    norm_ratio = torch.cat(ratios, dim=1).amax(1).numpy()
    return Diagnosis(found, norm_ratio, sink_norm, **stacked, channels=channels, layer=layer)


def _look(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], sinks: Bool[Tensor, "b p"], layer: int
) -> dict[str, Float[np.ndarray, "b ..."]]:
    """One forward, every weight in the open: the figures of each image, (b, l, h), its channels, (b, d), and the
    norm of its sinks, (b)."""
    layout, every = TokenLayout.of(model), blocks(model)
    owners = {at: attention_of(block) for at, block in enumerate(every)}
    for at, owner in owners.items():
        if not isinstance(getattr(owner, "attn_drop", None), nn.Module):
            raise ValueError(f"block {at} ({type(every[at]).__name__}) has no attention weights to read")
    values: dict[int, Tensor] = {}
    # By block, so that of several forwards, as a cure may have them, the last one counts.
    parts: dict[str, dict[int, Tensor]] = {name: {} for name in BY_HEAD}
    found: dict[str, Tensor] = {}

    def see_input(at: int, x: Float[Tensor, "b n d"]) -> None:
        values[at] = project(owners[at], x, "v").float()

    def see_weights(at: int, a: Float[Tensor, "b h n m"]) -> None:
        a, heads = a.float(), a.shape[1]
        v = values.pop(at).unflatten(-1, (heads, -1)).transpose(1, 2)  # (b, h, n, c)
        place, added = getattr(owners[at], "added_keys", (0, 0))
        out = torch.cat([a[..., :place], a[..., place + added :]], -1) @ v if added else a @ v
        to_patches = a[..., -sinks.shape[1] :] * sinks[:, None, None]  # (b, h, q, p)
        queries = to_patches.sum(-1)
        cls = queries[:, :, 0] if layout.cls else torch.full_like(queries[:, :, 0], torch.nan)
        others = (~sinks)[:, None].to(queries)
        patches = (queries[:, :, -sinks.shape[1] :] * others).sum(-1) / others.sum(-1)
        norms = v[:, :, layout.prefix :].norm(dim=-1)  # (b, h, p)
        ratio = _median(norms, sinks) / _median(norms, ~sinks)
        singular = torch.linalg.svdvals(out[:, :, layout.prefix :].cpu())
        share = singular / singular.sum(-1, keepdim=True)
        rank = torch.exp(-(share * share.clamp_min(1e-12).log()).sum(-1))
        for name, figure in zip(parts, (cls, patches, ratio, rank), strict=True):
            parts[name][at] = figure.cpu()

    def see_output(_: int, x: Float[Tensor, "b n d"]) -> None:
        x = layout.patches(x).float()
        found["channels"] = (x.abs() * sinks[..., None]).amax(1).cpu()
        norms = x.norm(dim=-1)[:, None]  # (b, 1, p)
        found["sink_norm"] = (_median(norms, sinks) / _median(norms, ~sinks))[:, 0].cpu()

    with (
        unfused(model),
        watch_inputs(owners, see_input),
        watch_inputs({at: owner.attn_drop for at, owner in owners.items()}, see_weights),
        watch_outputs({layer: every[layer]}, see_output),
    ):
        model.forward_features(images)
    return {name: torch.stack([each[at] for at in owners], dim=1).numpy() for name, each in parts.items()} | {
        name: value.numpy() for name, value in found.items()
    }


def _median(values: Float[Tensor, "b h p"], chosen: Bool[Tensor, "b p"]) -> Float[Tensor, "b h"]:
    """Median over the chosen patches of each image."""
    return values.masked_fill(~chosen[:, None], torch.nan).nanmedian(dim=-1).values


def census_row(model: str, images: int, diagnosis: Diagnosis) -> dict[str, object]:
    """A row of the census; empty where there is nothing to say."""
    found, later = diagnosis.found, slice(diagnosis.layer + 1, None)
    has = found.detection is not None
    largest = diagnosis.channels[0]
    row = {
        "model": model,
        "images": images,
        "outliers": "yes" if has else "none",
        "layer": found.detection.layer if has else "",
        "fraction": round(diagnosis.fraction, 5) if has else 0,
        "norm_ratio": round(float(diagnosis.norm_ratio[:-1].max()), 2),
        "neurons": found.num_selected,
        "explained": round(found.explained, 4) if has and found.explained is not None else "",
        "kind": diagnosis.kind,
        "cls_attention": "" if np.isnan(diagnosis.cls_attention) else round(diagnosis.cls_attention, 4),
        "value_ratio": round(diagnosis.sink_value, 3),
        "effective_rank": round(float(np.median(diagnosis.effective_rank[later])), 2),
        "channel": largest.index,
        "channel_ratio": round(largest.ratio, 1),
    }
    return row


def diagnose_run(
    folder: Path,
    name: str,
    model: nn.Module,
    untreated: nn.Module,
    batches: Iterable[Float[Tensor, "b 3 h w"]],
    found: RegisterNeurons,
) -> str:
    """Why there are sinks, in the untreated model and in a run's; writes `diagnosis.csv` and `heads.csv`.

    Returns: the verdict on the run.
    Raises:
        ValueError: as `diagnose`.
    """
    seen = {"untreated": diagnose(untreated, batches, found)}
    if model is not untreated:
        seen[name] = diagnose(model, batches, found, untreated)
    table = diagnosis_table(seen)
    write_csv(folder / "diagnosis.csv", table)
    write_csv(folder / "heads.csv", head_table(seen))
    return table["verdict"].iloc[-1]


def searched_in(searched: NeuronsFile, outlier_fraction: Float[np.ndarray, " b"]) -> RegisterNeurons:
    """What the file of a search says, with the shares of outliers that were counted on other images."""
    detection = searched.detection and Detection(**searched.detection, separation=float("nan"))
    told = {"explained": searched.explained, "outlier_fraction": outlier_fraction}
    return RegisterNeurons(detection, (), selected=dict(searched.selected), **told)


def diagnosis_table(models: Mapping[str, Diagnosis]) -> pd.DataFrame:
    """A row a model, the untreated one first, with a verdict; the others' verdicts are held against it."""
    before = next(iter(models.values()))
    rows = []
    for name, each in models.items():
        row = census_row(name, IMAGES, each) | {"sink_norm": each.sink_norm}
        rows.append({**row, "verdict": each.verdict() if each is before else each.verdict_against(before)})
    return pd.DataFrame(rows).drop(columns="images")


def head_table(models: Mapping[str, Diagnosis]) -> pd.DataFrame:
    """A row a model, block and head."""
    tables = []
    for name, each in models.items():
        layers, heads = np.indices(each.cls_share.shape)
        columns = {figure: getattr(each, figure).ravel() for figure in BY_HEAD}
        tables.append(pd.DataFrame({"model": name, "layer": layers.ravel(), "head": heads.ravel(), **columns}))
    return pd.concat(tables, ignore_index=True)
