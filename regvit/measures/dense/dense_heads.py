"""Linear layers on patch tokens, for what is predicted at every place of an image: segmentation and depth.

    patches (b, p, d) of a feature store → standardise → W x + b on the (g, g) grid → upsample (bilinear) → loss

The protocol is that of DINOv2's dense evaluations (arXiv:2304.07193, section 7.4), which Darcet et al. (2024) use for
models with registers: frozen patch tokens after the last norm, a batch norm and one linear layer, AdamW with linear
warm-up and linear decay to 0. Deviations, each exact or stated where it is made:

- the batch norm's statistics are those of all training patches, computed once; it folds into the linear layer;
- one layer is trained for each pair of learning rate and weight decay, all side by side on the same batches (one
  matrix product); the validation split chooses, and only the chosen one sees the test split;
- no augmentation: features are made once, of whole images.

Patch tokens stay float16 until a batch is drawn. At most `HELD` images are in memory at once: training goes through
the store in groups of whole units, in random order, and through each group in random order; a training split of up to
`HELD` images is one group, read once.

Shape letters: b image, p patch, g side of the patch grid, d channel, h head (one learning rate and weight decay),
c output of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from regvit.features.store import FeatureStore

HELD = 256  # images: 50 MB (ViT-S/14 at 224 px) to 0.7 GB (ViT-L/14 at 518 px) of float16
WARM_UP = 0.05  # share of the steps; mmsegmentation's schedules have 1,500 of 40,000
START = 0.01  # standard deviation of the first weights (mmsegmentation); zero would leave a ReLU without gradient

T = TypeVar("T")


@dataclass(frozen=True)
class DenseTraining:
    """How heads are trained.

    Args:
        learning_rates, weight_decays: AdamW's, a head for each pair; the decay does not touch the bias.
        steps: after which the learning rate has fallen to 0.
        batch_size: images a step.
        seed: of the first weights, which all heads share, and of the order of the images.
        label: what the progress line says.
    Raises:
        ValueError: a setting is missing, repeated or out of range.
    """

    learning_rates: Sequence[float]
    weight_decays: Sequence[float]
    steps: int
    batch_size: int
    seed: int = 0
    device: str = "cpu"
    label: str = "heads"

    def __post_init__(self):
        rates, decays = self.learning_rates, self.weight_decays
        if not rates or len(set(rates)) < len(rates) or min(rates) <= 0:
            raise ValueError(f"learning_rates are {list(rates)}; expected numbers above 0, each once")
        if not decays or len(set(decays)) < len(decays) or min(decays) < 0:
            raise ValueError(f"weight_decays are {list(decays)}; expected numbers of at least 0, each once")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; expected at least 1")


@dataclass(frozen=True)
class LinearLayer:
    """A trained linear layer that takes raw patch tokens.

    Attributes:
        weight: float32.
        bias: float32.
        learning_rate, weight_decay: of the head that the validation split chose.
    """

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"]
    learning_rate: float
    weight_decay: float

    def __call__(self, patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b c g g"]:
        """Its outputs on the grid of a square image."""
        return on_grid(F.linear(patches.float(), self.weight, self.bias))

    def to(self, device: torch.device | str) -> LinearLayer:
        """The same layer on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))


class PatchTokens:
    """The patch tokens of some rows of a feature store, of square images.

    Args:
        rows: of the store; those of a split. They are gone through in ascending order, unit by unit (`units`).
    Raises:
        KeyError: the store holds no patches.
        ValueError: there are no rows, or the number of patches is no square.
    """

    def __init__(self, store: FeatureStore, rows: Sequence[int]):
        if "patches" not in store.arrays:
            held = ", ".join(store.arrays)
            raise KeyError(f"{store.path} holds {held} and no patches; add patches to its arrays in extract_dense")
        count, self.channels = store.arrays["patches"]
        if not len(rows):
            raise ValueError(f"no rows of {store.path} are wanted; give the data set images of every split")
        if math.isqrt(count) ** 2 != count:
            raise ValueError(f"{store.path} has {count} patches an image, expected a square; extract square images")
        self.store, self.rows, self.side = store, sorted({int(row) for row in rows}), math.isqrt(count)
        self.units = store.layout.by_unit(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, unit: int, rows: Sequence[int]) -> Float[Tensor, "b p d"]:
        """Rows of one unit, float16; the unit is read once."""
        first, last = self.store.layout.unit_rows(unit)
        return torch.from_numpy(self.store.read_rows("patches", first, last)[np.asarray(rows) - first])

    def in_order(self) -> Iterator[tuple[list[int], Float[Tensor, "b p d"]]]:
        """All rows, a unit at a time: their numbers and their tokens (float16)."""
        for unit, rows in self.units.items():
            yield rows, self.read(unit, rows)


@dataclass(frozen=True)
class Batch(Generic[T]):
    """What one step learns from: tokens on the device (float16), and the target of each image."""

    patches: Float[Tensor, "b p d"]
    targets: list[T]


def batches(
    tokens: PatchTokens,
    target: Callable[[int], T],
    batch_size: int,
    generator: np.random.Generator,
    device: torch.device | str = "cpu",
) -> Iterator[Batch[T]]:
    """Batches for ever, of equal length, in an order that the generator alone decides.

    Args:
        target: what is to be predicted in a row; called once while its group is held.
        batch_size: images; all of a group where it has fewer. What a group has left over waits for its next turn.
    """
    units = tokens.units
    held: tuple[int, ...] = ()
    patches, targets = torch.empty(0), []
    while True:
        for group in _groups(units, generator):
            if group != held:
                patches = torch.cat([tokens.read(unit, units[unit]) for unit in group]).to(device)
                targets = [target(row) for unit in group for row in units[unit]]
                held = group
            order = generator.permutation(len(targets))
            size = min(batch_size, len(order))
            for start in range(0, len(order) - size + 1, size):
                chosen = order[start : start + size]
                yield Batch(patches[torch.from_numpy(chosen).to(device)], [targets[i] for i in chosen])


def _groups(units: dict[int, list[int]], generator: np.random.Generator) -> list[tuple[int, ...]]:
    """The units in random order, gathered into groups of up to `HELD` images; units of a group are sorted."""
    groups, size = [[]], 0
    names = list(units)
    for unit in (names[i] for i in generator.permutation(len(names))):
        if groups[-1] and size + len(units[unit]) > HELD:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += len(units[unit])
    return [tuple(sorted(group)) for group in groups]


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel; a constant channel has standard deviation 1."""

    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]


def statistics(tokens: PatchTokens) -> Statistics:
    """Of all patches of all rows, in float64, a unit at a time."""
    count, total, squares = 0, torch.zeros(tokens.channels, dtype=torch.float64), 0.0
    shift = None
    for _, patches in tokens.in_order():
        x = patches.double().flatten(0, 1)  # (b p, d)
        shift = x.mean(0) if shift is None else shift  # near the mean, so that the squares do not cancel
        count, total, squares = count + len(x), total + (x - shift).sum(0), squares + (x - shift).square().sum(0)
    variance = (squares / count - (total / count).square()).clamp_min(0)
    std = torch.where(variance > 0, variance.sqrt(), 1.0)
    return Statistics((shift + total / count).float(), std.float())


class DenseHeads:
    """Linear layers trained side by side, one for each pair of learning rate and weight decay.

    Args:
        statistics: of the training patches.
        outputs: c of each head.
    """

    def __init__(self, statistics: Statistics, outputs: int, training: DenseTraining):
        device = training.device
        self.settings = [(float(r), float(d)) for r, d in product(training.learning_rates, training.weight_decays)]
        self.outputs, self.steps, self._taken = outputs, training.steps, 0
        self.mean, self.std = statistics.mean.to(device), statistics.std.to(device)
        first = torch.randn(len(self.mean), outputs, generator=torch.Generator().manual_seed(training.seed)) * START
        self.weights = [nn.Parameter(first.to(device, copy=True)) for _ in self.settings]
        self.biases = [nn.Parameter(torch.zeros(outputs, device=device)) for _ in self.settings]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [parameter], "lr": rate, "weight_decay": decay if parameter.ndim == 2 else 0.0}
                for (rate, decay), *pair in zip(self.settings, self.weights, self.biases, strict=True)
                for parameter in pair
            ]
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    def __len__(self) -> int:
        return len(self.settings)

    def __call__(self, patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b hc g g"]:
        """Outputs of all heads on the grid, those of a head side by side."""
        x = (patches.float() - self.mean) / self.std
        return on_grid(x @ torch.cat(self.weights, dim=1) + torch.cat(self.biases))

    def step(self, losses: Float[Tensor, " h"]) -> None:
        """One update of each head by its own loss."""
        factor = schedule(self._taken, self.steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()  # a head's parameters are in its own loss alone
        self._optimizer.step()
        self._taken += 1

    def layer(self, head: int) -> LinearLayer:
        """One head with the standardisation folded in."""
        with torch.no_grad():
            weight = self.weights[head].double() / self.std.double()[:, None]
            bias = self.biases[head].double() - self.mean.double() @ weight
        rate, decay = self.settings[head]
        return LinearLayer(weight.T.float().contiguous(), bias.float(), rate, decay)

    def is_finite(self, head: int) -> bool:
        """Whether the head has not diverged."""
        return bool(self.weights[head].isfinite().all() and self.biases[head].isfinite().all())


def train_heads(
    tokens: PatchTokens,
    target: Callable[[int], T],
    outputs: int,
    training: DenseTraining,
    losses: Callable[[DenseHeads, Batch[T], int], Float[Tensor, " h"]],
) -> DenseHeads:
    """Heads after the last step.

    Args:
        target: what is to be predicted in a row of the store.
        losses: of each head on a batch in a step.
    """
    heads = DenseHeads(statistics(tokens), outputs, training)
    drawn = batches(tokens, target, training.batch_size, np.random.default_rng(training.seed), training.device)
    for step in tqdm(range(training.steps), training.label, unit="steps", mininterval=1):
        heads.step(losses(heads, next(drawn), step))
    return heads


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over the first `WARM_UP` of the steps, then linearly to 0."""
    warm = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm, 1.0) * (1 - step / steps)


def on_grid(x: Float[Tensor, "b p c"]) -> Float[Tensor, "b c g g"]:
    """Values of patches, which stand row by row, on their square grid."""
    side = math.isqrt(x.shape[1])
    return x.mT.reshape(len(x), x.shape[2], side, side)


def at_pixels(
    maps: Float[Tensor, "b c g g"], rows: Int[Tensor, "b m"], columns: Int[Tensor, "b m"], sizes: Int[Tensor, "b 2"]
) -> Float[Tensor, "b c m"]:
    """Some pixels of maps upsampled to images of any size: what `F.interpolate(maps, size, mode="bilinear")` has there.

    Args:
        rows, columns: of the pixels.
        sizes: height and width of each image.
    """
    y = (2 * rows + 1) / sizes[:, :1] - 1  # pixel centres, from -1 to 1
    x = (2 * columns + 1) / sizes[:, 1:] - 1
    places = torch.stack([x, y], dim=-1).to(maps.dtype)[:, :, None]  # (b, m, 1, 2)
    return F.grid_sample(maps, places, mode="bilinear", padding_mode="border", align_corners=False)[..., 0]


def best_head(heads: DenseHeads, errors: Sequence[float], what: str) -> int:
    """The head of smallest validation error that has not diverged; of equal ones the first.

    Raises:
        ValueError: all diverged.
    """
    sound = [head for head in range(len(heads)) if heads.is_finite(head) and math.isfinite(errors[head])]
    if not sound:
        smallest = min(rate for rate, _ in heads.settings)
        raise ValueError(
            f"all {len(heads)} heads for {what} diverged; the smallest learning rate was {smallest:g}: try smaller ones"
        )
    return min(sound, key=lambda head: errors[head])


def pixels_of_patches(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """A value for each patch of a whole image, shape (p,), as a map (height, width): each pixel has its patch's."""
    side = math.isqrt(len(values))
    rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
    return values.reshape(side, side)[rows[:, None], columns]
