"""Linear probes: every readout × learning rate × seed trained at once, the head chosen on the validation split.

For head h with learning rate η, on rows x standardised by the training split (z = (x − μ) / σ), in step t of T:

    g = ∇ mean cross-entropy(z W + b) + λ W,    v ← m v + g,    (W, b) ← (W, b) − η s(t) v

with s(t) = ½ (1 + cos(π t / T)) for the schedule `cosine` and 1 for `constant`. All heads of a seed see the same
shuffled batches and start at zero, so a head does not depend on which others are trained beside it, and a seed only
sets the order of the rows. `heads` says how that is computed, and what probes are that pool the registers themselves.

Published protocols are settings of this one: that of arXiv:2501.04784 is learning rate 0.01, 10,000 steps, schedule
`constant`, `standardise` off; DINOv2's (arXiv:2304.07193) is 12,500 steps, momentum 0.9, schedule `cosine`,
`standardise` off and the learning rates of `DINOV2_RATES` times batch size / 256. Both choose on what they report;
here the head is always chosen on the validation split.

Training that takes long leaves a checkpoint in a folder of its own, and goes on from there; the probes are then the
same, byte for byte, as without the interruption.

Shape letters: b image, d channel, c class, g readout, s seed, h head (learning rate).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from regvit.data.progress import progress as Progress
from regvit.features.memory import available
from regvit.features.readouts import POOLED
from regvit.features.stored_readouts import blocks
from regvit.files import replacing
from regvit.probing import heads as heads_module
from regvit.probing.checkpoints import Checkpoint
from regvit.probing.heads import Batch, Heads, RowOrder, Settings, make_heads
from regvit.probing.neighbours import Neighbours

MOMENTUM = 0.9
SCHEDULES = ("cosine", "constant")
DINOV2_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # at batch size 256
CURVE_POINTS = 20  # rows a head has in the training curves
SAVE_EVERY = 30.0  # seconds between two checkpoints: training that takes less pays nothing
METADATA_KEY = "regvit_probes"  # one key: safetensors does not fix the order of several, which would change the bytes
FORMAT_VERSION = 2  # 2: several seeds a readout, logistic regression and neighbours, pooling
PLAIN = ("learning_rates", "steps", "batch_size", "weight_decay", "momentum", "schedule", "standardise", "seeds",
         "train_images", "val_images")  # fmt: skip  # fields of a ProbeSet that stand in the metadata as they are


class InvalidProbes(ValueError):
    """A file that holds no probes (or predictions) of this format; the message names the file and the cure."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier on raw features of one readout.

    Attributes:
        readout: name of the readout.
        weight: (c, d') float32, applied to what `embed` makes of features as they stand in the store.
        bias: (c,) float32.
        learning_rate: the one that won on the validation split; None for logistic regression.
        val_correct: validation images that this head gets right.
        seed: of the order of the training images; None for logistic regression.
        C: the inverse regularisation that won, of logistic regression; else None.
        pool: what the registers are weighed with where the probe does so, float32: a (r,) for `cls_reg_learned`,
            q (d,) for `cls_reg_attn` (`heads` has the formulas); else None.
        n_registers: that the probe pools; 0 where it does not.
    """

    readout: str
    weight: Float[np.ndarray, "c d"]
    bias: Float[np.ndarray, " c"]
    learning_rate: float | None
    val_correct: int
    seed: int | None = 0
    C: float | None = None
    pool: Float[np.ndarray, " rd"] | None = None
    n_registers: int = 0

    @property
    def width(self) -> int:
        """Channels of the features that the probe takes."""
        inner = self.weight.shape[1]
        return inner if self.pool is None else inner // 2 * (1 + self.n_registers)

    def embed(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b d'"]:
        """What the weight multiplies, float32: [CLS; pooled registers] where the probe pools, else the features.

        Raises:
            ValueError: the features are not (b, d) with the width that the probe was trained on.
        """
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(
                f"features of shape {features.shape} do not fit the probe of readout {self.readout!r}, which takes "
                f"(b, {self.width}); train the probe on features of the same run"
            )
        features = features.astype(np.float32, copy=False)
        if self.pool is None:
            return features
        d = self.weight.shape[1] // 2
        cls, registers = features[:, :d], features[:, d:].reshape(len(features), self.n_registers, d)
        scores = (
            registers @ self.pool / math.sqrt(d) if self.readout == "cls_reg_attn" else self.pool[None]
        )  # (b | 1, r)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        return np.concatenate([cls, (weights[:, :, None] * registers).sum(1)], axis=1)

    def logits(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b c"]:
        """Class logits of each image, float32. Raises as `embed`."""
        return self.embed(features) @ self.weight.T + self.bias


@dataclass(frozen=True)
class ProbeSet:
    """The chosen probes of each readout, and what they were trained with: all that classifying takes besides a run.

    Attributes:
        probes: by readout name, one a seed, in the order of `seeds`.
        classes: class names, in the order of the logits.
        learning_rates, steps, batch_size, weight_decay, momentum, schedule, standardise, seeds: of the training.
        train_images, val_images: rows that the heads were trained and chosen on.
        logistic: logistic regression by readout name, where it was fitted (`logistic`).
        knn: neighbours by readout name, where they were chosen (`neighbours`).
        origin: attributes of the feature store that the training images came from; empty where it is not known.
    """

    probes: dict[str, tuple[Probe, ...]]
    classes: tuple[str, ...]
    learning_rates: tuple[float, ...]
    steps: int
    batch_size: int
    weight_decay: float
    momentum: float
    schedule: str
    standardise: bool
    seeds: tuple[int, ...]
    train_images: int
    val_images: int
    logistic: dict[str, Probe] = field(default_factory=dict)
    knn: dict[str, Neighbours] = field(default_factory=dict)
    origin: dict = field(default_factory=dict)


@dataclass(frozen=True)
class CurvePoint:
    """One row of the training curves, means over the seeds: `train_loss` over the steps since the row before (inf:
    diverged), `val_top1` at that step."""

    readout: str
    learning_rate: float
    step: int
    train_loss: float
    val_top1: float


@dataclass(frozen=True)
class Training:
    """What `train_probes` gives: the chosen probes, and the curves of all heads."""

    probes: ProbeSet
    curves: tuple[CurvePoint, ...]


def train_probes(
    train: Mapping[str, Float[np.ndarray, "b d"]],
    train_labels: Int[np.ndarray, " b"],
    val: Mapping[str, Float[np.ndarray, "v d"]],
    val_labels: Int[np.ndarray, " v"],
    classes: Sequence[str],
    learning_rates: Sequence[float],
    steps: int = 1000,
    batch_size: int = 256,
    weight_decay: float = 0.0,
    seeds: Sequence[int] = (0,),
    *,
    momentum: float = MOMENTUM,
    schedule: str = "cosine",
    standardise: bool = True,
    channels: int | None = None,
    device: str | torch.device = "cpu",
    memory: int | None = None,
    work: Path | str | None = None,
    save_every: float = SAVE_EVERY,
    progress: Progress | None = None,
) -> Training:
    """Train one head per readout, learning rate and seed; choose for each readout and seed the one best on validation.

    Equal validation accuracy goes to the smaller learning rate. Heads that diverged are never chosen. The same
    arguments give byte-identical probes on the same machine with the same number of threads, interrupted or not.

    Args:
        train: features of the training images by readout: arrays, or `stored.stored_readouts`, which are read when they
            are needed and need not fit in memory.
        train_labels: class index of each training image.
        val: features of the validation images, the same readouts.
        val_labels: class index of each validation image.
        classes: class names, in the order of the indices.
        learning_rates: of SGD at the first step.
        steps: updates of each head.
        batch_size: images an update; more than there are means all of them.
        weight_decay: λ, on the weights in standardised coordinates, not on bias and pooling.
        seeds: of the order of the images; one set of heads each.
        momentum: m.
        schedule: `cosine` (to 0 at the end) or `constant`.
        standardise: whether the heads see (x − μ) / σ, or x itself as in the published protocols.
        channels: of one token; needed by readouts that the probe pools, whose features hold several.
        device: where to train.
        memory: bytes of the device that features may take; None: half of what is left there. Features that fit are
            copied there once, standardised; others are read batch by batch, from where they are. The probes are the same.
        work: folder for the checkpoint of training that takes long; made when it is needed, left to the caller to
            remove; None keeps none. A checkpoint of other data, settings or code is not gone on from.
        save_every: seconds between two checkpoints, which are written where the curves have a row.
        progress: is told of every step, and of what was resumed; None is silent.
    Raises:
        ValueError: features, labels or settings do not fit together, are empty or not finite, the training images are
            all of one class, or all heads of a readout diverged; the message gives value and cure.
        FolderLocked: another process trains in `work`.
        KeyboardInterrupt: passed on; calling again goes on from the checkpoint.
    """
    settings = Settings(
        tuple(float(rate) for rate in learning_rates),
        tuple(int(seed) for seed in seeds),
        len(classes),
        float(momentum),
        float(weight_decay),
        bool(standardise),
    )
    _check_settings(settings, steps, batch_size, schedule)
    check_splits(train, train_labels, val, val_labels, classes)
    _check_pooled(train, channels)
    memory = available(device) // 2 if memory is None else memory
    state = _State(
        make_heads(train, val, settings, channels, device, memory),
        [RowOrder(len(train_labels), batch_size, seed) for seed in settings.seeds],
    )
    described = {**asdict(settings), "steps": steps, "batch_size": batch_size, "schedule": schedule,
                 "channels": channels}  # fmt: skip
    data, code = (train, train_labels, val, val_labels), (__file__, heads_module.__file__)
    labels, truth = _to(train_labels, device), _to(val_labels, device)
    milestones = {math.ceil(steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
    with (
        Checkpoint(work, save_every, described, data, code, device, progress) as checkpoint,
        _Batches(state, train, milestones, device) as batches,
    ):
        checkpoint.resume(state)
        for step in range(state.step + 1, steps + 1):
            batch = batches.next(step)
            decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)) if schedule == "cosine" else 1.0
            for group in state.heads:
                group.step(batch, labels[batch.rows], decay)
            state.step = step
            if step in milestones:
                state.add_point(truth)
                checkpoint.save_if_due(state)
            if progress is not None:
                progress.advance()
    probes = ProbeSet(
        probes={name: state.choose(name, settings) for name in train},
        classes=tuple(classes),
        learning_rates=settings.learning_rates,
        steps=steps,
        batch_size=batch_size,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        schedule=schedule,
        standardise=settings.standardise,
        seeds=settings.seeds,
        train_images=len(train_labels),
        val_images=len(val_labels),
    )
    curves = [point for name in train for point in state.curve(name, settings, len(val_labels))]
    return Training(probes, tuple(curves))


def save_probes(path: Path | str, probes: ProbeSet) -> None:
    """Write probes as safetensors, format 2; the same probes give the same bytes.

    `<readout>/<seed>/weight`, `…/bias` and where the probe pools `…/pool`, with `logistic` in the place of the seed for
    logistic regression, and everything else as JSON in the metadata.
    """
    tensors = {}

    def described(probe: Probe, where: str) -> dict:
        tensors[f"{where}/weight"] = np.ascontiguousarray(probe.weight)
        tensors[f"{where}/bias"] = np.ascontiguousarray(probe.bias)
        if probe.pool is not None:
            tensors[f"{where}/pool"] = np.ascontiguousarray(probe.pool)
        keys = ("seed", "learning_rate", "C", "val_correct", "n_registers")
        return {key: getattr(probe, key) for key in keys}

    metadata = {
        "format_version": FORMAT_VERSION,
        "classes": list(probes.classes),
        "readouts": {name: [described(probe, f"{name}/{probe.seed}") for probe in of_seeds]
                     for name, of_seeds in probes.probes.items()},
        "logistic": {name: described(probe, f"{name}/logistic") for name, probe in probes.logistic.items()},
        "knn": {name: asdict(neighbours) for name, neighbours in probes.knn.items()},
        "origin": probes.origin,
        **{key: getattr(probes, key) for key in PLAIN},
    }  # fmt: skip
    with replacing(path) as beside:
        save_file(tensors, str(beside), metadata={METADATA_KEY: json.dumps(metadata, ensure_ascii=False)})


def load_probes(path: Path | str) -> ProbeSet:
    """Read what `save_probes` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidProbes: the file is no safetensors file of probes, or of another format version.
    """
    tensors, metadata = read_described(path, METADATA_KEY, FORMAT_VERSION, "probes", "probe")

    def probe(name: str, where: str, about: dict) -> Probe:
        return Probe(name, tensors[f"{where}/weight"], tensors[f"{where}/bias"],
                     pool=tensors.get(f"{where}/pool"), **about)  # fmt: skip

    plain = {key: metadata[key] for key in PLAIN}
    return ProbeSet(
        probes={name: tuple(probe(name, f"{name}/{about['seed']}", about) for about in of_seeds)
                for name, of_seeds in metadata["readouts"].items()},
        classes=tuple(metadata["classes"]),
        logistic={name: probe(name, f"{name}/logistic", about) for name, about in metadata["logistic"].items()},
        knn={name: Neighbours(**about) for name, about in metadata["knn"].items()},
        origin=metadata["origin"],
        **{key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()},
    )  # fmt: skip


def read_described(
    path: Path | str, key: str, version: int, what: str, stage: str
) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors of a safetensors file, and the JSON that stands under `key` in its metadata.

    Args:
        version: of the format, which this code reads.
        what: the file should hold, and the stage that makes it; for messages.
    Raises:
        FileNotFoundError: there is no such file.
        InvalidProbes: the file is no safetensors file, lacks the key, or is of another version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file of {what}; run the {stage} stage")
    cure = f"expected a file of {what}; run the {stage} stage again"
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InvalidProbes(f"{path} is no safetensors file ({error}); {cure}") from error
    return tensors, described_in(path, metadata, key, version, what, stage)


def described_in(path: Path | str, metadata: Mapping[str, str], key: str, version: int, what: str, stage: str) -> dict:
    """The JSON that stands under `key` in the metadata of a safetensors file.

    Args:
        version, what, stage: as in `read_described`.
    Raises:
        InvalidProbes: the key is missing, or of another version.
    """
    if key not in metadata:
        raise InvalidProbes(
            f"{path} has no {key!r} in its metadata; expected a file of {what}; run the {stage} stage again"
        )
    described = json.loads(metadata[key])
    if described.get("format_version") != version:
        raise InvalidProbes(
            f"{path} has {what} format {described.get('format_version')}, this version reads {version}; "
            f"run the {stage} stage again"
        )
    return described


class _State:
    """Training so far: the heads, the order of the rows, the steps done and the curves.

    A point of the curves is `loss` (g, s, h), summed since the point before, and `correct` (g, s, h), for each group.
    """

    def __init__(self, heads: list[Heads], orders: list[RowOrder]):
        self.heads, self.orders, self.step = heads, orders, 0
        self.points: list[int] = []  # steps
        self.loss: list[list[np.ndarray]] = [[] for _ in heads]
        self.correct: list[list[np.ndarray]] = [[] for _ in heads]

    def add_point(self, val_labels: Int[Tensor, " v"]) -> None:
        """One point of the curves of all heads, at the last step done."""
        self.points.append(self.step)
        for i, group in enumerate(self.heads):
            self.loss[i].append(group.take_loss())
            self.correct[i].append(group.correct(val_labels))

    def curve(self, name: str, settings: Settings, val_images: int) -> list[CurvePoint]:
        """The curves of one readout, learning rates ascending, means over the seeds."""
        i, g = self._place(name)
        lengths = np.diff([0, *self.points])
        loss = np.stack([loss[g].mean(0, dtype=np.float64) for loss in self.loss[i]]) / lengths[:, None]  # (points, h)
        loss = np.where(np.isfinite(loss), loss, np.inf)
        top1 = np.stack([correct[g].mean(0) for correct in self.correct[i]]) / val_images
        order = sorted(range(len(settings.learning_rates)), key=lambda h: settings.learning_rates[h])
        return [
            CurvePoint(name, settings.learning_rates[h], step, float(loss[p, h]), float(top1[p, h]))
            for h in order
            for p, step in enumerate(self.points)
        ]

    def choose(self, name: str, settings: Settings) -> tuple[Probe, ...]:
        """The best head of one readout on the validation split, for each seed; the last step is a point."""
        i, g = self._place(name)
        rates, probes = settings.learning_rates, []
        right = np.where(self.heads[i].finite()[g], self.correct[i][-1][g], -1)  # (s, h)
        for seed, correct in zip(settings.seeds, right.tolist(), strict=True):
            best = min(range(len(rates)), key=lambda h, correct=correct: (-correct[h], rates[h]))
            if correct[best] < 0:
                raise ValueError(f"all {len(rates)} heads of readout {name!r} diverged; "
                                 f"the smallest learning rate was {min(rates):g}: try smaller ones")  # fmt: skip
            head = self.heads[i].export(name, seed, rates[best])
            probes.append(Probe(name, head.weight, head.bias, rates[best], correct[best], seed,
                                pool=head.pool, n_registers=head.n_registers))  # fmt: skip
        return tuple(probes)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, for a checkpoint."""
        tensors = {"step": torch.tensor(self.step), "points": torch.tensor(self.points)}
        for i, group in enumerate(self.heads):
            tensors |= {f"heads.{i}.{name}": value for name, value in group.state().items()}
            tensors[f"heads.{i}.losses"] = torch.from_numpy(np.stack(self.loss[i]))
            tensors[f"heads.{i}.corrects"] = torch.from_numpy(np.stack(self.correct[i]))
        for i, order in enumerate(self.orders):
            tensors |= {f"order.{i}.{name}": value for name, value in order.state().items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from where `tensors` was taken."""
        self.step, self.points = int(tensors["step"]), tensors["points"].tolist()
        for i, group in enumerate(self.heads):
            for name, value in group.state().items():
                value.copy_(tensors[f"heads.{i}.{name}"])
            self.loss[i] = list(tensors[f"heads.{i}.losses"].numpy())
            self.correct[i] = list(tensors[f"heads.{i}.corrects"].numpy())
        for i, order in enumerate(self.orders):
            order.restore({name: tensors[f"order.{i}.{name}"] for name in order.state()})

    def _place(self, name: str) -> tuple[int, int]:
        """Group of a readout, and its place there."""
        return next((i, group.names.index(name)) for i, group in enumerate(self.heads) if name in group.names)


class _Batches:
    """The batches of all seeds, step by step; where features are read, those of the next step meanwhile.

    Never ahead across a milestone: there the orders are saved, and must be those of the step.
    """

    def __init__(
        self, state: _State, train: Mapping[str, np.ndarray], milestones: set[int], device: str | torch.device
    ):
        self._state, self._train, self._milestones, self._device = state, train, milestones, device
        self._reads = not all(group.held for group in state.heads)
        self._reader = ThreadPoolExecutor(1)
        self._ahead: Future[Batch] | None = None

    def __enter__(self) -> _Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def next(self, step: int) -> Batch:
        """Batch of a step; to be called for one step after another."""
        batch = self._make() if self._ahead is None else self._ahead.result()
        ahead = self._reads and step not in self._milestones
        self._ahead = self._reader.submit(self._make) if ahead else None
        return batch

    def _make(self) -> Batch:
        rows = torch.stack([order.next() for order in self._state.orders])  # (s, b)
        if not self._reads:
            return Batch(rows.to(self._device))
        flat = rows.flatten().numpy()
        return Batch(rows.to(self._device), {name: values[flat] for name, values in self._train.items()})


def _to(values: np.ndarray, device: str | torch.device) -> Int[Tensor, " b"]:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)


def check_splits(
    train: Mapping[str, np.ndarray],
    train_labels: np.ndarray,
    val: Mapping[str, np.ndarray],
    val_labels: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Holds training and validation images to what any classifier needs.

    Raises:
        ValueError: a split is empty or has unusable labels or features, the readouts of the two differ, or the
            training images are all of one class; the message gives value and cure.
    """
    _check_split("train", train, train_labels, classes)
    _check_split("val", val, val_labels, classes)
    if not train or set(train) != set(val):
        raise ValueError(
            f"train has the readouts {sorted(train)} and val {sorted(val)}; expected the same, at least one"
        )
    for name in train:
        if train[name].shape[1] != val[name].shape[1]:
            raise ValueError(
                f"readout {name!r} has {train[name].shape[1]} channels in train, {val[name].shape[1]} in val"
            )
    if (train_labels == train_labels[0]).all():
        raise ValueError(f"all {len(train_labels)} training images are of class {train_labels[0]}; "
                         "a probe needs images of at least 2 classes")  # fmt: skip


def _check_settings(settings: Settings, steps: int, batch_size: int, schedule: str) -> None:
    rates, seeds = list(settings.learning_rates), list(settings.seeds)
    if not rates or len(set(rates)) < len(rates):
        raise ValueError(f"learning_rates are {rates}; expected at least one, each once")
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(f"learning_rates are {rates}; expected finite numbers above 0")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps is {steps} and batch_size {batch_size}; expected at least 1 of each")
    if not (math.isfinite(settings.weight_decay) and settings.weight_decay >= 0):
        raise ValueError(f"weight_decay is {settings.weight_decay}; expected a finite number, 0 or above")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {seeds}; expected at least one, each once")
    if not 0 <= settings.momentum < 1:
        raise ValueError(f"momentum is {settings.momentum}; expected a number of 0 or above, below 1")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")


def _check_pooled(train: Mapping[str, np.ndarray], channels: int | None) -> None:
    for name in train:
        if name not in POOLED:
            continue
        width = train[name].shape[1]
        if channels is None:
            raise ValueError(f"readout {name!r} holds several tokens; give channels, the width of one")
        if channels < 1 or width % channels or width < 2 * channels:
            raise ValueError(f"readout {name!r} has {width} channels and channels is {channels}; "
                             "expected CLS and at least one register of that width each")  # fmt: skip


def _check_split(split: str, features: Mapping[str, np.ndarray], labels: np.ndarray, classes: Sequence[str]) -> None:
    if not len(labels):
        raise ValueError(f"the {split} split is empty; give some images of the in-distribution set split = {split}")
    if labels.min() < 0 or labels.max() >= len(classes):
        fault = f"{int((labels < 0).sum())} images without a label" if labels.min() < 0 else f"label {labels.max()}"
        raise ValueError(f"the {split} split has {fault}; a probe needs class indices 0 to {len(classes) - 1}")
    for name, values in features.items():
        if values.ndim != 2 or len(values) != len(labels):
            raise ValueError(f"readout {name!r} has {split} features of shape {values.shape}; expected "
                             f"({len(labels)}, channels), one row per label")  # fmt: skip
        if bad := sum(int((~np.isfinite(values[rows])).any(1).sum()) for rows in blocks(len(values))):
            raise ValueError(
                f"readout {name!r}: {bad} of {len(values)} {split} rows are not finite; extract them again"
            )
