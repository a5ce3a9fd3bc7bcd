"""What a single token knows: linear probes from outlier tokens against the same from normal ones.

Darcet et al. 2024 (arXiv:2309.16588, section 2.2) read three things linearly from single tokens: where in the image the
patch lies, what its pixels are, and which class the image has. DINOv2-g there: position top-1 41.7 from normal and 22.8
from outlier tokens, mean distance 0.79 and 5.09, pixel error 18.38 and 25.23; class from one random token 65.8 normal,
69.0 outlier, 86.0 CLS. Tokens here are what readouts get, x in R^d.

**Position and pixels** are learned from all patches of the training images, outliers and normal ones alike, and tested
on each kind. Both have a closed form in sums over tokens, so that no token needs to be kept. With x~ = [x; 1]:

    pixels:    W = (Σ x~ x~' + λ I)^-1 Σ x~ y',   λ = RIDGE * mean diagonal of Σ x~ x~'  (not on the 1)
    position:  linear discriminant, class i a place of the grid with mean m_i, C the covariance within places, ridged:
               score_i = m_i' C^-1 x - m_i' C^-1 m_i / 2      (all places are equally frequent)

A least-squares fit to one-hot places would be closed as well, but places inside the grid are masked by those around.

**Class** is learned from one token an image, drawn at random, by logistic regression with an L2 penalty, and tested on
every token of that kind: the mean over them is what one drawn at random is expected to score.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from regvit.measures.anatomy import Look, grid_side, image_means
from regvit.models.tokens import TokenLayout
from regvit.stats.bootstrap import mean_with_interval

RIDGE = 1e-2  # of the mean diagonal: on images held out of a training split better than 1e-4 by a sixth (pixels), a
# quarter (position); tokens of one image resemble each other, so there are fewer of them than it seems
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # λ of the logistic regression, chosen by cross-validation on the training tokens
FOLDS = 3

# Of PatchErrors, by their names in metrics and tables.
FIGURES = {"top1": "correct", "distance": "distance", "l2": "pixel_error", "guess_l2": "mean_patch_error"}


@dataclass(frozen=True)
class Linear:
    """x -> x W' + b.

    Args:
        weight: (m, d).
        bias: (m,).
    """

    weight: Float[Tensor, "m d"]
    bias: Float[Tensor, " m"]

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... m"]:
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class PatchProbes:
    """Position and pixels of a patch from its token.

    Args:
        position: scores of the places of the grid, row by row.
        pixels: the patch's normalised pixel values, channel by channel.
        mean_pixels: the mean training patch, the guess of a probe that knows nothing.
    """

    position: Linear
    pixels: Linear
    mean_pixels: Float[Tensor, " m"]


@dataclass(frozen=True)
class PatchErrors:
    """How well the probes read each patch of some images, and which of them are outliers.

    Args:
        correct: the right place has the highest score (1 or 0).
        distance: Euclidean distance of the place with the highest score from the right one, in patches.
        pixel_error: L2 norm of the error over the patch's normalised pixel values.
        mean_patch_error: the same for the mean training patch as the guess.
        outliers: which patches are outliers in the untreated model.
    """

    correct: Float[np.ndarray, "b p"]
    distance: Float[np.ndarray, "b p"]
    pixel_error: Float[np.ndarray, "b p"]
    mean_patch_error: Float[np.ndarray, "b p"]
    outliers: Bool[np.ndarray, "b p"]


def patch_pixels(images: Float[Tensor, "b 3 h w"], patches: int) -> Float[Tensor, "b p m"]:
    """The normalised pixel values of each patch of a square image, channel by channel.

    Raises:
        ValueError: the images do not divide into so many square patches.
    """
    side = grid_side(patches)
    if images.shape[-1] % side or images.shape[-2] != images.shape[-1]:
        raise ValueError(
            f"images of {images.shape[-1]} x {images.shape[-2]} px do not divide into {side} x {side} patches; "
            "use a square img_size that is a multiple of the patch size"
        )
    size = images.shape[-1] // side
    return F.unfold(images, size, stride=size).mT


@torch.inference_mode()
def fit_patch_probes(layout: TokenLayout, seen: Iterable[Look]) -> PatchProbes:
    """Learns position and pixels from all patches of the training images, in closed form.

    Args:
        layout: of the run's model.
        seen: the training images, gone through once; nothing is kept but sums.
    Raises:
        ValueError: there are fewer than two images (the places would have no covariance).
    """
    images = 0
    for look in seen:
        x = layout.patches(look.tokens).double()  # (b, p, d)
        y = patch_pixels(look.images, x.shape[1]).double()  # (b, p, m)
        if not images:
            d, device = x.shape[2], x.device
            xx, x_sum = x.new_zeros(d, d), x.new_zeros(x.shape[1:])
            xy, y_sum = x.new_zeros(d, y.shape[2]), x.new_zeros(y.shape[2])
        flat = x.flatten(0, 1)
        xx += flat.T @ flat
        xy += flat.T @ y.flatten(0, 1)
        x_sum += x.sum(0)
        y_sum += y.sum((0, 1))
        images += len(x)
    if images < 2:
        raise ValueError(f"{images} training image(s) cannot teach where a patch lies; give a hundred")
    tokens = images * len(x_sum)
    mean, means = x_sum.sum(0) / tokens, x_sum / images  # (d,), (p, d)
    eye = torch.eye(d, dtype=xx.dtype, device=device)
    # Centring x takes the constant out of the system, which leaves the bias without a penalty.
    centred = xx - tokens * torch.outer(mean, mean)
    ridge = RIDGE * centred.diagonal().mean()
    weight = torch.linalg.solve(centred + ridge * eye, xy - torch.outer(x_sum.sum(0), y_sum / tokens)).T  # (m, d)
    pixels = Linear(weight, y_sum / tokens - weight @ mean)
    within = (xx - images * means.T @ means) / (tokens - len(means))
    within = within + RIDGE * within.diagonal().mean() * eye
    discriminant = torch.linalg.solve(within, (means - mean).T).T  # (p, d); a shift of all means shifts all scores
    position = Linear(discriminant, -((means + mean) * discriminant).sum(1) / 2)
    return PatchProbes(position, pixels, y_sum / tokens)


@torch.inference_mode()
def read_patches(probes: PatchProbes, layout: TokenLayout, look: Look) -> PatchErrors:
    """What the probes get right and wrong at every patch of a batch of test images.

    Args:
        layout: of the run's model.
    """
    x = layout.patches(look.tokens).double()
    y = patch_pixels(look.images, x.shape[1]).double()
    side, places = grid_side(x.shape[1]), torch.arange(x.shape[1], device=x.device)
    guess = probes.position(x).argmax(-1)  # (b, p)
    apart = torch.stack([guess // side - places // side, guess % side - places % side]).double()
    found = {
        "correct": (guess == places).double(),
        "distance": apart.norm(dim=0),
        "pixel_error": (probes.pixels(x) - y).norm(dim=-1),
        "mean_patch_error": (probes.mean_pixels - y).norm(dim=-1),
        "outliers": look.outliers,
    }
    return PatchErrors(**{name: values.cpu().numpy() for name, values in found.items()})


def patch_summary(batches: Sequence[PatchErrors], seed: int = 0) -> dict:
    """Position and pixels by kind of token, for a metrics file; None where no image has outliers.

    `normal` are the other patches of all images, `outlier` the outliers, and `difference` outlier − normal within the
    images that have outliers. Values are means over images of the mean over an image's patches; intervals over images.
    `guess_l2` is the error of the mean training patch at the same patches: what a token that knows nothing would give.

    Args:
        batches: errors of all test images.
    """
    by_image = patch_means(batches)
    patches = batches[0].outliers.shape[1]
    i, j = np.divmod(np.arange(patches), grid_side(patches))
    apart = np.hypot(i[:, None] - i, j[:, None] - j)

    def compare(name: str) -> dict:
        of = {kind: by_image[f"{name}_{kind}"] for kind in ("normal", "outlier")}
        of["difference"] = of["outlier"] - of["normal"]
        return {kind: mean_with_interval(name, v, seed) | {"n": int((~np.isnan(v)).sum())} for kind, v in of.items()}

    def merge(*tables: dict) -> dict:
        return {kind: {k: v for table in tables for k, v in table[kind].items()} for kind in tables[0]}

    position = merge(compare("top1"), compare("distance"))
    pixels = merge(compare("l2"), compare("guess_l2"))
    chance = {"top1": round(1 / patches, 6), "distance": round(float(apart.mean()), 6)}
    return {"position": position | {"chance": chance}, "pixels": pixels}


def patch_means(batches: Sequence[PatchErrors]) -> dict[str, Float[np.ndarray, " b"]]:
    """`top1`, `distance`, `l2` and `guess_l2`, each `_normal` and `_outlier`: means over an image's patches of that kind.

    Args:
        batches: errors of all test images.
    Returns: one value an image; nan where it has no such patch.
    """
    mask = np.concatenate([batch.outliers for batch in batches])
    means = {}
    for name, field in FIGURES.items():
        values = np.concatenate([getattr(batch, field) for batch in batches])
        means |= {f"{name}_normal": image_means(values, ~mask), f"{name}_outlier": image_means(values, mask)}
    return means


def kinds_of_tokens(
    layout: TokenLayout, look: Look
) -> Iterator[tuple[str, Float[Tensor, "b t d"], Bool[Tensor, "b t"]]]:
    """The kinds of tokens that a class is read from: name, tokens, and which of them belong to the kind.

    `normal` are the patches that are no outliers; `normal_beside` those of images that have outliers, so that
    `outlier` can be compared with the same images.
    """
    patches, mask = layout.patches(look.tokens), look.outliers
    if layout.cls:
        tokens = layout.cls_token(look.tokens)[:, None]
        yield "cls", tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool)
    if layout.num_registers:
        tokens = layout.registers(look.tokens)
        yield "register", tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool)
    yield "normal", patches, ~mask
    yield "normal_beside", patches, ~mask & mask.any(1, keepdim=True)
    yield "outlier", patches, mask


@torch.inference_mode()
def class_from_token(
    layout: TokenLayout,
    train: Iterable[Look],
    train_labels: Int[np.ndarray, " b"],
    test: Iterable[Look],
    test_labels: Int[np.ndarray, " b"],
    seed: int = 0,
) -> dict[str, Float[np.ndarray, " b"]]:
    """Expected accuracy of reading an image's class from one random token, by kind of token.

    Args:
        layout: of the run's model.
        train, test: images with their outliers, each gone through once.
        train_labels, test_labels: class index of each image.
        seed: of the draw of training tokens and of the folds.
    Returns: one value a test image and kind: share of its tokens of that kind which give the right class; nan where it
        has none. A kind that is too rare in the training images to learn two classes from is nan throughout.
    Raises:
        ValueError: an image has no label.
    """
    for name, labels in (("training", train_labels), ("test", test_labels)):
        if (labels < 0).any():
            raise ValueError(f"{int((labels < 0).sum())} {name} images have no label; leave them out")
    rng, drawn = np.random.default_rng(seed), {}
    for look in train:
        for kind, tokens, belongs in kinds_of_tokens(layout, look):
            lots = torch.from_numpy(rng.random(tuple(belongs.shape))).to(tokens.device)
            chosen = lots.masked_fill(~belongs, -1).argmax(1)  # (b,)
            token = tokens[torch.arange(len(tokens), device=tokens.device), chosen]
            token = token.double().masked_fill(~belongs.any(1, keepdim=True), torch.nan)
            drawn.setdefault(kind, []).append(token.cpu())
    probes: dict[str, Linear | None] = {}
    for kind, tokens in drawn.items():
        x = torch.cat(tokens).numpy()
        there = ~np.isnan(x).any(1)
        enough = np.unique(train_labels[there], return_counts=True)[1]
        learnable = (enough > FOLDS).sum() > 1  # so that every fold leaves two classes
        probes[kind] = fit_classes(x[there], train_labels[there], seed=seed) if learnable else None
    found: dict[str, list[Tensor]] = {kind: [] for kind in probes}
    start = 0
    for look in test:
        labels = torch.from_numpy(test_labels[start : start + len(look.images)])[:, None]
        start += len(labels)
        for kind, tokens, belongs in kinds_of_tokens(layout, look):
            if probes[kind] is None:
                found[kind].append(torch.full((len(labels),), torch.nan, dtype=torch.float64))
                continue
            right = (probes[kind](tokens.cpu().double()).argmax(-1) == labels) & belongs.cpu()
            found[kind].append(right.sum(1) / belongs.cpu().sum(1).double())  # 0 / 0 = nan
    return {kind: torch.cat(parts).numpy() for kind, parts in found.items()}


def class_summary(correct: dict[str, Float[np.ndarray, " b"]], seed: int = 0) -> dict:
    """Top-1 by kind of token with intervals over images, for a metrics file."""
    found = {
        kind: mean_with_interval("top1", values, seed) | {"n": int((~np.isnan(values)).sum())}
        for kind, values in correct.items()
    }
    difference = correct["outlier"] - correct["normal_beside"]
    found["difference"] = mean_with_interval("top1", difference, seed) | {"n": int((~np.isnan(difference)).sum())}
    return found


def fit_classes(
    x: Float[np.ndarray, "b d"], labels: Int[np.ndarray, " b"], penalties: Sequence[float] = PENALTIES, seed: int = 0
) -> Linear:
    """Logistic regression; the penalty with the best cross-validated accuracy, of equal ones the largest.

    Args:
        labels: class indices, at least two different ones in every fold's rest.
        penalties: λ, see `logistic_regression`.
        seed: of the folds.
    """
    folds = np.random.default_rng(seed).permutation(len(x)) % FOLDS
    right = dict.fromkeys(sorted(penalties, reverse=True), 0)
    for penalty in right if len(right) > 1 else ():
        for out in (folds == fold for fold in range(FOLDS)):
            guess = logistic_regression(x[~out], labels[~out], penalty)(torch.from_numpy(x[out])).argmax(1)
            right[penalty] += int((guess.numpy() == labels[out]).sum())
    return logistic_regression(x, labels, max(right, key=right.get))


def logistic_regression(x: Float[np.ndarray, "b d"], labels: Int[np.ndarray, " b"], penalty: float) -> Linear:
    """Multinomial logistic regression, folded so that it takes tokens as they are.

        minimise over W, b:  mean cross-entropy(z W' + b) + λ |W|² / 2,    z = (x − mean) / σ,  σ² the mean variance

    Args:
        labels: class indices, at least two different ones; the probe has a row for each up to the largest, with a bias
            of −inf for those that do not occur.
        penalty: λ.
    """
    mean = x.mean(0)
    sd = max(float(np.sqrt(np.square(x - mean).mean())), 1e-12)
    fit = LogisticRegression(C=1 / (len(x) * penalty), tol=1e-4, max_iter=1000).fit((x - mean) / sd, labels)
    rows, bias = fit.coef_, fit.intercept_
    if len(rows) == 1:  # two classes: scikit-learn gives the log odds of the second
        rows, bias = np.concatenate([-rows, rows]) / 2, np.concatenate([-bias, bias]) / 2
    weight = np.zeros((int(labels.max()) + 1, x.shape[1]))
    weight[fit.classes_] = rows / sd
    folded = np.full(len(weight), -np.inf)
    folded[fit.classes_] = bias - rows @ mean / sd
    return Linear(torch.from_numpy(weight), torch.from_numpy(folded))
