"""Anatomy of outlier tokens: how their norms grow, where they sit, and what kind of patch they grow on.

Which patches are outliers is decided on the backbone without test-time registers, so that the same positions are looked
at before and after registers are added: norms above the threshold in the detection layer.

Source: Darcet et al. 2024, arXiv:2309.16588, sections 2.1 and 2.2: norms are bimodal, outliers appear in the middle of
the network, and they sit on patches that resemble their neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from regvit.files import replacing
from regvit.models.backbones import Backbone, load_backbone, resized
from regvit.models.hooks import blocks, watch_outputs
from regvit.models.tokens import TokenLayout
from regvit.registers.neighbourhood import neighbour_cosine
from regvit.registers.outliers import MIN_RATIO, Detection, otsu, patch_norms
from regvit.registers.run_files import read_run
from regvit.registers.runs import detection_of, open_run
from regvit.stats.bootstrap import mean_with_interval

LOW_INFORMATION = 0.25  # of an image's patches: those that resemble their neighbours most
EM_STEPS = 300  # of the mixture; at two modes that stand apart a dozen are enough
SMALLEST = np.finfo(np.float32).tiny  # norms are cut off below it before their logarithm is taken


@dataclass(frozen=True)
class Subject:
    """A run to look into, beside its backbone as it stands on disk.

    Args:
        run: the run's backbone.
        untreated: the same without test-time registers, none of its neurons moved or silenced; the very same object
            where the run changes nothing.
        detection: layer and threshold of outliers in `untreated`; None where it has none.
    """

    run: Backbone
    untreated: Backbone
    detection: Detection | None

    @property
    def treated(self) -> bool:
        """Whether the run changes its backbone."""
        return self.run is not self.untreated

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels.

        Raises:
            ValueError: the model has no patch embedding of its own.
        """
        size = getattr(_patch_embedding(self.run.model), "patch_size", None)
        return size[0] if isinstance(size, tuple) else int(size)


@dataclass(frozen=True)
class Look:
    """One batch seen by a run's model.

    Args:
        images: normalised.
        tokens: what readouts get: the output of `forward_features`.
        norms: L2 norms of the patches at the output of every block.
        outliers: which patches are outliers in the untreated model.
    """

    images: Float[Tensor, "b 3 h w"]
    tokens: Float[Tensor, "b n d"]
    norms: Float[Tensor, "l b p"]
    outliers: Bool[Tensor, "b p"]


@dataclass(frozen=True)
class Anatomy:
    """What was seen at every patch of a set of images.

    Args:
        norms: L2 norm at the output of every block of the run's model.
        outliers: which patches are outliers in the untreated model.
        neighbour_cosine: mean cosine of a patch embedding to its up to four neighbours (Darcet et al. 2024).
        information_rank: share of the image's patches with a lower cosine, embeddings centred over all images; near 1
            for the patches of least information, 1/2 on average.
    """

    norms: Float[np.ndarray, "l b p"]
    outliers: Bool[np.ndarray, "b p"]
    neighbour_cosine: Float[np.ndarray, "b p"]
    information_rank: Float[np.ndarray, "b p"]

    @property
    def side(self) -> int:
        """Patches along a side of the grid."""
        return grid_side(self.outliers.shape[1])


@dataclass(frozen=True)
class TwoModes:
    """Two normal distributions fitted to a sample: means, standard deviations, and the share of the upper one."""

    low: float
    high: float
    low_sd: float
    high_sd: float
    high_share: float

    @property
    def ashman_d(self) -> float:
        """|difference of means| / root mean square of the standard deviations; above 2 the modes are cleanly apart.

        Source: Ashman, Bird and Zepf 1994, Astronomical Journal 108, 2348.
        """
        return abs(self.high - self.low) / ((self.low_sd**2 + self.high_sd**2) / 2) ** 0.5


def open_subject(run_file: Path, backbones: Path, img_size: int | None = None, device: str = "cpu") -> Subject:
    """The run of a description (`features/runs/<run>.json`) beside its untreated backbone, on the device.

    Args:
        backbones: folder that holds one folder a backbone.
        img_size: pixels a side, or None for the backbone's own.
    Raises:
        ValueError: the run was composed of other weights, or the model does not take images of that size.
    """
    run = resized(open_run(run_file, backbones), img_size)
    described = read_run(run_file)
    untreated = run
    if described["neurons"] is not None:
        untreated = resized(load_backbone(backbones / run.name), img_size)
        untreated.model.to(device)
    run.model.to(device)
    return Subject(run, untreated, detection_of(described))


@torch.inference_mode()
def looks(subject: Subject, batches: Iterable[Float[Tensor, "b 3 h w"]]) -> Iterator[Look]:
    """What the run's model makes of each batch, and which patches are outliers in the untreated model.

    Args:
        batches: normalised images on any device; each is moved to the model's.
    Raises:
        ValueError: a norm is not finite.
    """
    model, detection = subject.run.model, subject.detection
    layout, all_blocks = TokenLayout.of(model), dict(enumerate(blocks(model)))
    device = next(model.parameters()).device
    for images in batches:
        images = images.to(device)
        norms: dict[int, Tensor] = {}

        def see(layer: int, x: Float[Tensor, "b n d"], norms: dict[int, Tensor] = norms) -> None:
            norms[layer] = layout.patches(x).float().norm(dim=-1)

        with watch_outputs(all_blocks, see):
            tokens = model.forward_features(images)
        stacked = torch.stack([norms[layer] for layer in all_blocks])  # (l, b, p)
        if detection is None:
            outliers = torch.zeros_like(stacked[0], dtype=torch.bool)
        elif subject.treated:
            found = patch_norms(subject.untreated.model, [images], [detection.layer])[0]
            outliers = torch.from_numpy(found > detection.threshold).to(device)
        else:
            outliers = stacked[detection.layer] > detection.threshold
        yield Look(images, tokens, stacked, outliers)


def grid_side(patches: int) -> int:
    """Patches along a side of a square grid.

    Raises:
        ValueError: the number is no square.
    """
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches make no square grid; give the backbone a square img_size")
    return side


@torch.inference_mode()
def patch_embeddings(model: nn.Module, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b i j d"]:
    """Patch embeddings on their grid, before positions are added.

    Raises:
        ValueError: the model has no patch embedding of its own, or its grid is no square.
    """
    e = _patch_embedding(model)(images)
    return e if e.ndim == 4 else e.unflatten(1, (grid_side(e.shape[1]), -1))


def _patch_embedding(model: nn.Module) -> nn.Module:
    embed = getattr(model, "patch_embed", None)
    if embed is None:
        raise ValueError(f"{type(model).__name__} has no patch embedding at `.patch_embed`; use a timm ViT")
    return embed


def rank_share(values: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
    """Share of the row's values below each value, equal ones counted half, itself too."""
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous())
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + up_to).to(values.dtype) / (2 * values.shape[1])


@torch.inference_mode()
def dissect(
    subject: Subject, batches: Iterable[Float[Tensor, "b 3 h w"]], see: Callable[[Look], None] | None = None
) -> Anatomy:
    """Norms, outlier positions and resemblance to neighbours at every patch.

    Args:
        batches: normalised images, gone through twice: the second time for the patch embeddings alone.
        see: called with each batch's look, for whatever else is to be learned from the same forward.
    Raises:
        ValueError: there are no images, a norm is not finite, or the patches make no square grid.
    """
    norms, outliers, total, count = [], [], 0, 0
    for look in looks(subject, batches):
        if see is not None:
            see(look)
        norms.append(look.norms.cpu())
        outliers.append(look.outliers.cpu())
        e = patch_embeddings(subject.run.model, look.images)
        total, count = total + e.double().sum((0, 1, 2)), count + e[..., 0].numel()
    if not count:
        raise ValueError("no images to look into; give at least one batch")
    mean, plain, ranks = (total / count).float(), [], []
    device = mean.device
    for images in batches:
        e = patch_embeddings(subject.run.model, images.to(device))
        plain.append(neighbour_cosine(e).cpu())
        ranks.append(rank_share(neighbour_cosine(e - mean)).cpu())
    stacked = torch.cat(norms, dim=1).numpy()
    if not np.isfinite(stacked).all():
        layer, image, _ = (int(i) for i in np.argwhere(~np.isfinite(stacked))[0])
        raise ValueError(f"patch norms are not finite in layer {layer} for image {image}; check weights and images")
    return Anatomy(stacked, *(torch.cat(parts).numpy() for parts in (outliers, plain, ranks)))


def two_modes(values: Float[np.ndarray, " n"]) -> TwoModes:
    """Two normal distributions fitted to a sample by expectation and maximisation, from Otsu's split on.

    Where there is but one mode the fit lets the two overlap, so `ashman_d` falls well below what cutting the sample in
    two would give (2.6 for a normal distribution cut at its mean).

    Raises:
        ValueError: fewer than two distinct values.
    """
    x = np.asarray(values, dtype=np.float64).ravel()
    if len(x) < 2 or x.min() == x.max():
        raise ValueError(f"{len(x)} value(s), all equal, have no two modes")
    floor = 1e-6 * x.var()
    r = (x > otsu(x).threshold).astype(np.float64)  # responsibility of the upper mode
    for _ in range(EM_STEPS):
        weights = np.stack([1 - r, r])
        mass = weights.sum(1)
        means = weights @ x / mass
        variances = np.maximum((weights * (x - means[:, None]) ** 2).sum(1) / mass, floor)
        log = np.log(mass / len(x)) - np.log(variances) / 2
        log = log[:, None] - (x - means[:, None]) ** 2 / (2 * variances[:, None])
        before, r = r, 1 / (1 + np.exp(np.clip(log[0] - log[1], -700, 700)))
        if np.abs(r - before).max() < 1e-6 or not 0 < r.sum() < len(x):
            break
    (low, high), (low_sd, high_sd) = means, np.sqrt(variances)
    return TwoModes(*(float(v) for v in (low, high, low_sd, high_sd, mass[1] / len(x))))


def norm_table(anatomy: Anatomy, detection: Detection | None) -> list[dict[str, float | int | None]]:
    """One row a block: quantiles of the patch norms, how bimodal they are, and how far the outliers stand out.

    `over_threshold` is the share of patches over the detection layer's threshold; `ratio` the median norm of the
    outliers over that of the other patches. `otsu_separation` is the between-class share of the variance of the log
    norms at Otsu's split (0.64 for a normal distribution, 1 for two points), `ashman_d` that of the two fitted modes.
    """
    rows, mask = [], anatomy.outliers
    for layer, norms in enumerate(anatomy.norms):
        logs = np.log(norms.ravel().clip(min=SMALLEST))
        spread = logs.min() < logs.max()
        row = {"layer": layer, "min": norms.min(), "median": np.median(norms), "q99": np.quantile(norms, 0.99)}
        row |= {"max": norms.max(), "over_threshold": None, "outlier_median": None, "ratio": None}
        if detection is not None:
            row["over_threshold"] = (norms > detection.threshold).mean()
        if mask.any():
            row["outlier_median"] = np.median(norms[mask])
            row["ratio"] = row["outlier_median"] / np.median(norms[~mask])
        row["otsu_separation"] = otsu(logs).separation if spread else None
        row["ashman_d"] = two_modes(logs).ashman_d if spread else None
        rows.append({key: v if v is None or key == "layer" else round(float(v), 6) for key, v in row.items()})
    return rows


def position_table(anatomy: Anatomy) -> list[dict[str, float | int]]:
    """Share of the images in which each place of the grid is an outlier, row by row."""
    share = anatomy.outliers.mean(0)
    places = ((i, j) for i in range(anatomy.side) for j in range(anatomy.side))
    return [{"row": i, "column": j, "share": round(float(v), 6)} for (i, j), v in zip(places, share, strict=True)]


def summary(anatomy: Anatomy, detection: Detection | None, seed: int = 0) -> dict:
    """The anatomy as numbers for a metrics file; what needs outliers is None where there are none.

    `appears_in_layer` is the first block after which the outliers' median norm is at least twice that of the other
    patches, and `peak_layer` the one where it is the most times that; both None where it never is.
    `outlier_on_low_information` is the share of an image's outliers among its patches of low information, the quarter
    whose centred embeddings resemble their neighbours most: a quarter by chance.
    Intervals are over images; a difference is within the images that have outliers.
    """
    table, mask = norm_table(anatomy, detection), anatomy.outliers
    layer = len(table) - 2 if detection is None else detection.layer  # the last block's norms grow for all patches
    ratios = [row["ratio"] or 0.0 for row in table]
    appears = next((i for i, ratio in enumerate(ratios) if ratio >= MIN_RATIO), None)
    over = np.zeros(mask.shape) if detection is None else anatomy.norms[layer] > detection.threshold
    border = np.ones((anatomy.side, anatomy.side), bool)
    border[1:-1, 1:-1] = False
    found = {
        "n": len(mask),
        "n_with_outliers": int(mask.any(1).sum()),
        "outliers": int(mask.sum()),
        **mean_with_interval("outlier_fraction", mask.mean(1), seed),
        **mean_with_interval("over_threshold", over.mean(1), seed),
        "layer": layer,
        "threshold": None if detection is None else round(detection.threshold, 6),
        "otsu_separation": table[layer]["otsu_separation"],
        "ashman_d": table[layer]["ashman_d"],
        "norm_ratio": table[layer]["ratio"],
        "appears_in_layer": appears,
        "peak_layer": None if appears is None else int(np.argmax(ratios)),
        "border_patches": round(float(border.mean()), 6),
    }
    of = {"outlier": mask, "normal": ~mask}
    means = {name: image_means(anatomy.neighbour_cosine, chosen) for name, chosen in of.items()}
    found |= mean_with_interval("outlier_on_border", image_means(border.ravel() * np.ones(mask.shape), mask), seed)
    for name, values in (means | {"difference": means["outlier"] - means["normal"]}).items():
        found |= mean_with_interval(f"neighbour_cosine_{name}", values, seed)
    found |= mean_with_interval("outlier_information_rank", image_means(anatomy.information_rank, mask), seed)
    low = anatomy.information_rank > 1 - LOW_INFORMATION
    found |= {"low_information_patches": LOW_INFORMATION}
    return found | mean_with_interval("outlier_on_low_information", image_means(low, mask), seed)


def image_means(values: Float[np.ndarray, "b p"], chosen: Bool[np.ndarray, "b p"]) -> Float[np.ndarray, " b"]:
    """Mean over the chosen patches of each image; nan where none is chosen."""
    count = chosen.sum(1)
    total = np.where(chosen, values, 0).sum(1, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def draw_anatomy(path: Path, anatomy: Anatomy, detection: Detection | None, title: str) -> None:
    """Writes a PNG: norms by block, outliers by place, and resemblance to neighbours of outliers and other patches.

    Args:
        title: stands over the picture.
    """
    logs = np.log10(anatomy.norms.clip(min=SMALLEST))
    edges = np.linspace(np.quantile(logs, 0.0005), logs.max() + 1e-6, 61)
    shares = np.stack([np.histogram(layer, edges)[0] / layer.size for layer in logs])  # (l, bin)
    figure = Figure(figsize=(10.5, 3.1), layout="constrained")
    figure.suptitle(title, fontsize=10)
    by_layer, by_place, by_cosine = figure.subplots(1, 3)
    extent = (-0.5, len(shares) - 0.5, edges[0], edges[-1])
    by_layer.imshow(
        np.log10(shares.T + 1e-5), origin="lower", aspect="auto", extent=extent, cmap="magma", interpolation="nearest"
    )
    if detection is not None:
        height = np.log10(detection.threshold)
        by_layer.plot([detection.layer - 0.5, detection.layer + 0.5], [height, height], color="cyan", linewidth=2)
    by_layer.set(xlabel="block", ylabel="log10 of the patch norm", title="norms (bar: threshold)")
    share = anatomy.outliers.mean(0).reshape(anatomy.side, anatomy.side)
    shown = by_place.imshow(share, cmap="viridis", vmin=0, vmax=max(share.max(), 1e-3), interpolation="nearest")
    figure.colorbar(shown, ax=by_place, shrink=0.8)
    by_place.set(title="share of images with an outlier here", xticks=[], yticks=[])
    bins = np.linspace(np.quantile(anatomy.neighbour_cosine, 0.001), 1.0, 41)
    for name, chosen in (("normal", ~anatomy.outliers), ("outlier", anatomy.outliers)):
        if chosen.any():
            values = anatomy.neighbour_cosine[chosen].clip(bins[0], bins[-1])
            by_cosine.hist(values, bins, weights=np.full(values.shape, 1 / values.size), alpha=0.6, label=name)
    by_cosine.set(xlabel="cosine to the neighbours", title="patch embedding and its neighbours")
    by_cosine.legend(fontsize=8)
    for axis in (by_layer, by_place, by_cosine):
        axis.title.set_fontsize(9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=80, metadata={"Software": None})
