"""Anatomy of outlier tokens: how their norms grow, where they sit, and what kind of patch they grow on.

Which patches are outliers is decided on the backbone without test-time registers, so that the same positions are looked
at before and after registers are added: norms above the threshold in the detection layer.

Source: Darcet et al. 2024, arXiv:2309.16588, sections 2.1 and 2.2: norms are bimodal, outliers appear in the middle of
the network, and they sit on patches that resemble their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure as Picture
from scipy.stats import rankdata
from sklearn.mixture import GaussianMixture

from regvit.features.dense_set import DenseSet, grid_side
from regvit.files import write_picture
from regvit.measures.tables import image_means, mean_figures
from regvit.registers.outliers import MIN_RATIO, SMALLEST, Detection, otsu
from regvit.stats.figures import Figure

LOW_INFORMATION = 0.25  # of an image's patches: those that resemble their neighbours most


@dataclass(frozen=True)
class Anatomy:
    """What was seen at every patch of a set of images.

    Args:
        norms: L2 norm at the output of every block of the run's model.
        outliers: which patches are outliers in the untreated model.
        neighbours: mean cosine of a patch embedding to its up to four neighbours (Darcet et al. 2024).
        information_rank: share of the image's patches with a lower cosine, embeddings centred, equal ones counted half;
            near 1 for the patches of least information, 1/2 on average.
        detection: layer and threshold of `outliers`; None where the untreated model has none.
    """

    norms: Float[np.ndarray, "b l p"]
    outliers: Bool[np.ndarray, "b p"]
    neighbours: Float[np.ndarray, "b p"]
    information_rank: Float[np.ndarray, "b p"]
    detection: Detection | None

    @classmethod
    def of(cls, dense: DenseSet, rows: Sequence[int]) -> Anatomy:
        """The anatomy of some images."""
        plain, centred = dense.read("neighbours", rows).swapaxes(0, 1)
        rank = (rankdata(centred, axis=1) - 0.5) / centred.shape[1]
        return cls(dense.read("norms", rows), dense.outliers(rows), plain, rank, dense.detection)

    @property
    def side(self) -> int:
        """Patches along a side of the grid."""
        return grid_side(self.outliers.shape[1])


def ashman_d(values: Float[np.ndarray, " n"]) -> float:
    """How far apart the two normal distributions of a mixture are that is fitted to a sample from Otsu's split on:
    |difference of means| / root mean square of the standard deviations; above 2 the modes are cleanly apart.

    Where there is but one mode the fit lets the two overlap, so it falls well below what cutting the sample in two would
    give (2.6 for a normal distribution cut at its mean).

    Raises:
        ValueError: fewer than two distinct values.
    Source: Ashman, Bird and Zepf 1994, Astronomical Journal 108, 2348.
    """
    x = np.asarray(values, dtype=np.float64).ravel()
    if len(x) < 2 or x.min() == x.max():
        raise ValueError(f"{len(x)} value(s), all equal, have no two modes")
    upper = x > otsu(x).threshold
    parts, floor = [x[~upper], x[upper]], 1e-6 * x.var()
    fit = GaussianMixture(
        2,
        reg_covar=floor,
        weights_init=[len(part) / len(x) for part in parts],
        means_init=[[part.mean()] for part in parts],
        precisions_init=[[[1 / max(part.var(), floor)]] for part in parts],
        max_iter=300,
    ).fit(x[:, None])
    return float(abs(np.diff(fit.means_[:, 0])[0]) / np.sqrt(fit.covariances_.mean()))


def norm_table(anatomy: Anatomy) -> pd.DataFrame:
    """One row a block: quantiles of the patch norms, how bimodal they are, and how far the outliers stand out.

    `over_threshold` is the share of patches over the detection layer's threshold; `ratio` the median norm of the
    outliers over that of the other patches. `otsu_separation` is the between-class share of the variance of the log
    norms at Otsu's split (0.64 for a normal distribution, 1 for two points), `ashman_d` that of two fitted modes.
    """
    rows, mask, detection = [], anatomy.outliers, anatomy.detection
    for layer, norms in enumerate(anatomy.norms.swapaxes(0, 1)):
        logs = np.log(norms.ravel().clip(min=SMALLEST))
        spread = logs.min() < logs.max()
        outlier, other = (np.median(norms[kind]) if kind.any() else np.nan for kind in (mask, ~mask))
        rows.append(
            {
                "layer": layer,
                **dict(zip(("min", "median", "q99", "max"), np.quantile(norms, (0, 0.5, 0.99, 1)), strict=True)),
                "over_threshold": np.nan if detection is None else (norms > detection.threshold).mean(),
                "outlier_median": outlier,
                "ratio": outlier / other,
                "otsu_separation": otsu(logs).separation if spread else np.nan,
                "ashman_d": ashman_d(logs) if spread else np.nan,
            }
        )
    return pd.DataFrame(rows)


def position_table(anatomy: Anatomy) -> pd.DataFrame:
    """Share of the images in which each place of the grid is an outlier, row by row."""
    row, column = np.divmod(np.arange(anatomy.outliers.shape[1]), anatomy.side)
    return pd.DataFrame({"row": row, "column": column, "share": anatomy.outliers.mean(0)})


def image_columns(anatomy: Anatomy) -> dict[str, Float[np.ndarray, " b"]]:
    """One value an image; nan where it has no outlier.

    `outlier_fraction` is of the run's own norms, `untreated_outlier_fraction` of the backbone without registers.
    `outlier_on_low_information` is the share of an image's outliers among its patches of low information, the quarter
    whose centred embeddings resemble their neighbours most: a quarter by chance.
    """
    mask, detection = anatomy.outliers, anatomy.detection
    border = np.ones((anatomy.side, anatomy.side), bool)
    border[1:-1, 1:-1] = False
    low = anatomy.information_rank > 1 - LOW_INFORMATION
    own = np.zeros(mask.shape) if detection is None else anatomy.norms[:, detection.layer] > detection.threshold
    kinds = {"normal": ~mask, "outlier": mask}
    columns = {f"neighbour_similarity_{kind}": image_means(anatomy.neighbours, at) for kind, at in kinds.items()}
    similarity = list(columns.values())
    return {
        "outlier_fraction": own.mean(1),
        "untreated_outlier_fraction": mask.mean(1),
        **columns,
        "neighbour_similarity_difference": similarity[1] - similarity[0],
        "outlier_on_border": image_means(border.ravel() * np.ones(mask.shape), mask),
        "outlier_information_rank": image_means(anatomy.information_rank, mask),
        "outlier_on_low_information": image_means(low, mask),
    }


def figures(anatomy: Anatomy, norms: pd.DataFrame, seed: int = 0) -> list[Figure]:
    """Means of `image_columns` with intervals over images, and what is of all images together.

    `appears_in_layer` is the first block after which the outliers' median norm is at least twice that of the other
    patches, and `peak_layer` the one where it is the most times that; both None where it never is.

    Args:
        norms: of `norm_table`.
    """
    # the last block's norms grow for all patches
    layer = len(norms) - 2 if anatomy.detection is None else anatomy.detection.layer
    ratios = norms["ratio"].fillna(0.0)
    appears = int((ratios >= MIN_RATIO).argmax()) if (ratios >= MIN_RATIO).any() else None
    at = norms.iloc[layer].astype(float)
    whole = {
        "images_with_outliers": anatomy.outliers.any(1).sum(),
        "layer": layer,
        "threshold": anatomy.detection and anatomy.detection.threshold,
        "otsu_separation": at["otsu_separation"],
        "ashman_d": at["ashman_d"],
        "norm_ratio": at["ratio"],
        "appears_in_layer": appears,
        "peak_layer": None if appears is None else int(ratios.argmax()),
        "border_patches": 1 - (max(anatomy.side - 2, 0) / anatomy.side) ** 2,
    }
    plain = [
        Figure(name, None if value is None else float(value), n=len(anatomy.outliers)) for name, value in whole.items()
    ]
    return mean_figures(image_columns(anatomy), seed) + plain


def draw_anatomy(path: Path, anatomy: Anatomy, title: str) -> None:
    """Writes a PNG: norms by block, outliers by place, and resemblance to neighbours of outliers and other patches.

    Args:
        title: stands over the picture.
    """
    logs = np.log10(anatomy.norms.clip(min=SMALLEST)).swapaxes(0, 1)
    edges = np.linspace(np.quantile(logs, 0.0005), logs.max() + 1e-6, 61)
    shares = np.stack([np.histogram(layer, edges)[0] / layer.size for layer in logs])  # (l, bin)
    picture = Picture(figsize=(10.5, 3.1), layout="constrained")
    picture.suptitle(title, fontsize=10)
    by_layer, by_place, by_cosine = picture.subplots(1, 3)
    extent = (-0.5, len(shares) - 0.5, edges[0], edges[-1])
    by_layer.imshow(
        np.log10(shares.T + 1e-5), origin="lower", aspect="auto", extent=extent, cmap="magma", interpolation="nearest"
    )
    if anatomy.detection is not None:
        layer, height = anatomy.detection.layer, np.log10(anatomy.detection.threshold)
        by_layer.plot([layer - 0.5, layer + 0.5], [height, height], color="cyan", linewidth=2)
    by_layer.set(xlabel="block", ylabel="log10 of the patch norm", title="norms (bar: threshold)")
    share = anatomy.outliers.mean(0).reshape(anatomy.side, anatomy.side)
    shown = by_place.imshow(share, cmap="viridis", vmin=0, vmax=max(share.max(), 1e-3), interpolation="nearest")
    picture.colorbar(shown, ax=by_place, shrink=0.8)
    by_place.set(title="share of images with an outlier here", xticks=[], yticks=[])
    bins = np.linspace(np.quantile(anatomy.neighbours, 0.001), 1.0, 41)
    for name, chosen in (("normal", ~anatomy.outliers), ("outlier", anatomy.outliers)):
        if chosen.any():
            values = anatomy.neighbours[chosen].clip(bins[0], bins[-1])
            by_cosine.hist(values, bins, weights=np.full(values.shape, 1 / values.size), alpha=0.6, label=name)
    by_cosine.set(xlabel="cosine to the neighbours", title="patch embedding and its neighbours")
    by_cosine.legend(fontsize=8)
    for axis in (by_layer, by_place, by_cosine):
        axis.title.set_fontsize(9)
    write_picture(path, picture, 80)
