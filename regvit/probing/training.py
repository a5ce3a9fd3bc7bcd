"""Linear probes: every readout × learning rate × seed trained at once, the head chosen on the validation split.

For head h with learning rate η, on rows x standardised by the training split (z = (x − μ) / σ), in step t of T:

    g = ∇ mean cross-entropy(z W + b) + λ W,    v ← m v + g,    (W, b) ← (W, b) − η s(t) v

with s(t) = ½ (1 + cos(π t / T)) for the schedule `cosine` and 1 for `constant`. A seed sets the first weights and the order
of the rows; all heads of a seed see the same batches, so a head does not depend on which others are trained beside it.
`heads` says how that is computed, and what probes are that pool the registers themselves.

Published protocols are settings of this one: that of arXiv:2501.04784 is learning rate 0.01, 10,000 steps, schedule
`constant`, `standardise` off; DINOv2's (arXiv:2304.07193) is 12,500 steps, momentum 0.9, schedule `cosine`,
`standardise` off and the learning rates of `DINOV2_RATES` times batch size / 256. Both choose on what they report;
here the head is always chosen on the validation split.

Shape letters: b image, v validation image, d channel, g readout, s seed, h head (learning rate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from regvit.features.memory import available
from regvit.features.readouts import POOLED
from regvit.probing import heads as heads_module
from regvit.probing.checkpoints import Checkpoint
from regvit.probing.heads import Features, Heads, standards_of
from regvit.probing.probes import Probe, ProbeSet
from regvit.probing.splits import Split, check_splits

SCHEDULES = ("cosine", "constant")
DINOV2_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # at batch size 256
CURVE_POINTS = 20  # points of the training curves; checkpoints are written there
MEMORY_SHARE = 0.5  # of what is left of the device that features may take; what does not fit is read batch by batch


@dataclass(frozen=True)
class Settings:
    """How all heads are trained.

    Attributes:
        learning_rates: of the first step, one head each.
        steps: updates of each head.
        batch_size: images an update; more than there are means all of them.
        weight_decay: λ, on the weights in standardised coordinates, not on bias and pooling.
        momentum: m.
        schedule: `cosine` (to 0 at the end) or `constant`.
        standardise: whether the heads see (x − μ) / σ, or x itself as in the published protocols.
        seeds: one set of heads each.
    Raises:
        ValueError: a value is out of its range; the message gives it.
    """

    learning_rates: tuple[float, ...]
    steps: int = 1000
    batch_size: int = 256
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "cosine"
    standardise: bool = True
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self):
        rates, seeds = list(self.learning_rates), list(self.seeds)
        for held, expected in (
            (rates and len(set(rates)) == len(rates), f"learning_rates are {rates}; expected at least one, each once"),
            (all(math.isfinite(rate) and rate > 0 for rate in rates),
             f"learning_rates are {rates}; expected finite numbers above 0"),
            (self.steps >= 1 and self.batch_size >= 1,
             f"steps is {self.steps} and batch_size {self.batch_size}; expected at least 1 of each"),
            (math.isfinite(self.weight_decay) and self.weight_decay >= 0,
             f"weight_decay is {self.weight_decay}; expected a finite number, 0 or above"),
            (seeds and len(set(seeds)) == len(seeds), f"seeds are {seeds}; expected at least one, each once"),
            (0 <= self.momentum < 1, f"momentum is {self.momentum}; expected a number of 0 or above, below 1"),
            (self.schedule in SCHEDULES, f"schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}"),
        ):  # fmt: skip
            if not held:
                raise ValueError(expected)


def train_probes(
    train: Split,
    val: Split,
    classes: Sequence[str],
    settings: Settings,
    device: str | torch.device = "cpu",
    checkpoint: Checkpoint | None = None,
    on_point: Callable[[int, dict[str, float]], object] | None = None,
) -> ProbeSet:
    """Train one head per readout, learning rate and seed; choose for each readout and seed the one best on validation.

    Equal validation accuracy goes to the smaller learning rate. Heads that diverged are never chosen. The same
    arguments give byte-identical probes on the same machine with the same number of threads, interrupted or not.

    Args:
        classes: class names, in the order of the indices.
        checkpoint: of training that takes long; one of other data, settings or code is not gone on from.
        on_point: is called some 20 times with the step and, of each readout, the validation accuracy of its best learning
            rate there, mean over the seeds; after a resumption also with the points before it.
    Raises:
        ValueError: features, labels or settings do not fit together, are empty or not finite, the training images are
            all of one class, or all heads of a readout diverged; the message gives value and cure.
        FolderLocked: another process trains in the checkpoint's folder.
    """
    check_splits(train, val, classes)
    state = _Training(train, val, len(classes), settings, device)
    described = {**asdict(settings), "channels": train.channels, "device": str(device)}
    data, code = (train.features, train.labels, val.features, val.labels), (__file__, heads_module.__file__)
    on_point = on_point or (lambda step, accuracies: None)
    with checkpoint.of(described, data, code) if checkpoint else nullcontext():
        if checkpoint and (kept := checkpoint.resume()):
            state.restore(kept)
            checkpoint.step = state.step
            checkpoint.tell(f"resumed: {state.step} of {settings.steps} steps were done")
            for step, correct in state.points.items():
                on_point(step, state.best(correct))
        milestones = {math.ceil(settings.steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
        for step, (rows, features) in enumerate(state.batches(state.step), state.step + 1):
            state.update(rows, features)
            if step in milestones:
                on_point(step, state.best(state.validate()))
                if checkpoint:
                    checkpoint.save(step, state.tensors)
    probes = {name: state.choose(name) for name in train.features}
    return ProbeSet(probes, tuple(classes), asdict(settings), len(train.labels), len(val.labels))


class _Training:
    """The heads, their momentum, and how many steps are done."""

    def __init__(self, train: Split, val: Split, n_classes: int, settings: Settings, device: str | torch.device):
        self.settings, self.step, self.device = settings, 0, device
        self.labels, self.truth = (
            torch.from_numpy(np.asarray(part.labels, dtype=np.int64)).to(device) for part in (train, val)
        )
        self.n = len(train.labels)
        standards = standards_of(train.features, train.channels, settings.standardise)
        groups: dict[object, list[str]] = {}
        for name, values in train.features.items():
            groups.setdefault(name if name in POOLED else values.shape[1], []).append(name)
        self.heads = [
            Heads(names, [standards[name] for name in names], settings.seeds, settings.learning_rates, n_classes,
                  train.features[names[0]].shape[1] // train.channels - 1 if names[0] in POOLED else 0).to(device)
            for names in groups.values()
        ]  # fmt: skip
        self.velocities = [
            {name: torch.zeros_like(value) for name, value in each.named_parameters()} for each in self.heads
        ]
        room = MEMORY_SHARE * available(device)
        needed = [sum(4 * math.prod(values.shape) for values in part.features.values()) for part in (val, train)]
        self.val = [Features(val.features, each, needed[0] <= room) for each in self.heads]
        self.train = [Features(train.features, each, sum(needed) <= room) for each in self.heads]
        rates = torch.tensor(settings.learning_rates, device=device)
        self.rates = {"pool": rates, "weight": rates.repeat_interleave(n_classes)}
        self.rates["bias"] = self.rates["weight"]
        self.points: dict[int, list[np.ndarray]] = {}  # by step, validation images that each head of a group gets right

    def batches(self, done: int) -> Iterator[tuple[Int[np.ndarray, "s b"], list[Tensor]]]:
        """Rows and features of the steps that are left; where features are read, those of the next step meanwhile."""

        def make(step: int) -> tuple[Int[np.ndarray, "s b"], list[Tensor]]:
            rows = np.stack([batch_rows(self.n, self.settings.batch_size, seed, step) for seed in self.settings.seeds])
            return rows, [features[rows.ravel()] for features in self.train]

        if all(features.held is not None for features in self.train):
            yield from map(make, range(done, self.settings.steps))
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(make, done) if done < self.settings.steps else None
            for step in range(done, self.settings.steps):
                batch = ahead.result()
                ahead = reader.submit(make, step + 1) if step + 1 < self.settings.steps else None
                yield batch

    def update(self, rows: Int[np.ndarray, "s b"], features: Sequence[Tensor]) -> None:
        """One step of every head; the heads of a seed share a batch."""
        whole = self.settings
        decay = 0.5 * (1 + math.cos(math.pi * self.step / whole.steps)) if whole.schedule == "cosine" else 1.0
        labels = self.labels[torch.from_numpy(rows).to(self.device)]
        for heads, velocities, x in zip(self.heads, self.velocities, features, strict=True):
            x = x.reshape(-1, rows.shape[1], *x.shape[2:])
            heads.zero_grad()
            heads.losses(x, labels.repeat(len(heads.names), 1)).sum().backward()
            with torch.no_grad():
                for name, value in heads.named_parameters():
                    gradient = value.grad.add_(value, alpha=whole.weight_decay) if name == "weight" else value.grad
                    velocities[name].mul_(whole.momentum).add_(gradient)
                    value.addcmul_(velocities[name], self.rates[name] * decay, value=-1)
        self.step += 1

    def validate(self) -> list[Int[np.ndarray, "g s h"]]:
        """How many validation images each head of each group gets right; kept as a point of the curves."""
        self.points[self.step] = [each.correct(val, self.truth) for each, val in zip(self.heads, self.val, strict=True)]
        return self.points[self.step]

    def best(self, correct: Sequence[Int[np.ndarray, "g s h"]]) -> dict[str, float]:
        """Validation accuracy of each readout's best learning rate, mean over the seeds."""
        return {
            name: float(counts.mean(0).max()) / len(self.truth)
            for heads, group in zip(self.heads, correct, strict=True)
            for name, counts in zip(heads.names, group, strict=True)
        }

    def choose(self, name: str) -> tuple[Probe, ...]:
        """The best head of one readout on the validation split, for each seed; the last step is a point."""
        i, g = next((i, each.names.index(name)) for i, each in enumerate(self.heads) if name in each.names)
        rates, probes = self.settings.learning_rates, []
        right = np.where(self.heads[i].finite()[g], self.points[self.settings.steps][i][g], -1)  # (s, h)
        for s, correct in enumerate(right.tolist()):
            h = min(range(len(rates)), key=lambda h, correct=correct: (-correct[h], rates[h]))
            if correct[h] < 0:
                raise ValueError(f"all {len(rates)} heads of readout {name!r} diverged; "
                                 f"the smallest learning rate was {min(rates):g}: try smaller ones")  # fmt: skip
            probes.append(Probe(readout=name, val_correct=correct[h], learning_rate=rates[h], seed=self.settings.seeds[s],
                                **self.heads[i].export(g, s, h)))  # fmt: skip
        return tuple(probes)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, for a checkpoint."""
        tensors = {"points": torch.tensor(list(self.points))}
        for i, (heads, velocities) in enumerate(zip(self.heads, self.velocities, strict=True)):
            tensors |= {f"{i}.{name}": value for name, value in heads.state_dict().items()}
            tensors |= {f"{i}.velocity.{name}": value for name, value in velocities.items()}
            tensors[f"{i}.correct"] = torch.from_numpy(np.stack([each[i] for each in self.points.values()]))
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from where `tensors` was taken."""
        steps = tensors["points"].tolist()
        self.step = steps[-1]
        self.points = {
            step: [tensors[f"{i}.correct"][p].numpy() for i in range(len(self.heads))] for p, step in enumerate(steps)
        }
        for i, (heads, velocities) in enumerate(zip(self.heads, self.velocities, strict=True)):
            heads.load_state_dict({name: tensors[f"{i}.{name}"] for name in heads.state_dict()})
            for name, value in velocities.items():
                value.copy_(tensors[f"{i}.velocity.{name}"])


def batch_rows(n: int, size: int, seed: int, step: int) -> Int[np.ndarray, " b"]:
    """Rows of the batch of one step: one random order after another, cut into equal lengths."""
    size = min(n, size)
    epoch, place = divmod(step, n // size)
    return _order(n, seed, epoch)[place * size : (place + 1) * size]


@lru_cache(maxsize=16)
def _order(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng([seed, epoch]).permutation(n)
