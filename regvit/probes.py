"""Linear probes: every readout × learning rate trained at once, the head chosen on the validation split.

For head h with learning rate η, on rows x standardised by the training split (z = (x − μ) / σ), in step t of T:

    g = ∇ mean cross-entropy(z W + b) + λ W,    v ← 0.9 v + g,    (W, b) ← (W, b) − η ½ (1 + cos(π t / T)) v

All heads see the same shuffled batches and start at zero, so a head does not depend on which others are trained beside
it, and the seed only sets the order of the rows. Readouts of equal width are one batched matrix product.

μ is the mean per channel and σ one number for all channels (the root of their mean variance). One scale per channel
conditions no better (ViT-S features of 746 images: largest over mean eigenvalue 104 against 137, validated accuracy equal
within noise) and would magnify channels that hardly vary. The exported weights are folded back and take raw features.

Shape letters: b image, d channel, c class, g readout (of one width), h head (learning rate).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

MOMENTUM = 0.9
CURVE_POINTS = 20  # rows a head has in the training curves
LOGITS_AT_ONCE = 1 << 24  # validation logits held at once: 64 MiB of float32
METADATA_KEY = "regvit_probes"  # one key: safetensors does not fix the order of several, which would change the bytes
FORMAT_VERSION = 1


class InvalidProbes(ValueError):
    """A file that holds no probes (or predictions) of this format; the message names the file and the cure."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier on raw features of one readout.

    Attributes:
        readout: name of the readout.
        weight: (c, d) float32, applied to features as they stand in the store.
        bias: (c,) float32.
        learning_rate: the one that won on the validation split.
        val_correct: validation images that this head gets right.
    """

    readout: str
    weight: Float[np.ndarray, "c d"]
    bias: Float[np.ndarray, " c"]
    learning_rate: float
    val_correct: int

    def logits(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b c"]:
        """Class logits of each image, float32.

        Raises:
            ValueError: the features are not (b, d) with the width that the probe was trained on.
        """
        if features.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"features of shape {features.shape} do not fit the probe of readout {self.readout!r}, which takes "
                f"(b, {self.weight.shape[1]}); train the probe on features of the same run"
            )
        return features.astype(np.float32, copy=False) @ self.weight.T + self.bias


@dataclass(frozen=True)
class ProbeSet:
    """The chosen probe of each readout, and what they were trained with.

    Attributes:
        probes: by readout name.
        classes: class names, in the order of the logits.
        learning_rates, steps, batch_size, weight_decay, seed: of the training.
        train_images, val_images: rows that the heads were trained and chosen on.
    """

    probes: dict[str, Probe]
    classes: tuple[str, ...]
    learning_rates: tuple[float, ...]
    steps: int
    batch_size: int
    weight_decay: float
    seed: int
    train_images: int
    val_images: int


@dataclass(frozen=True)
class CurvePoint:
    """One row of the training curves: `train_loss` is the mean over the steps since the row before (inf: diverged)."""

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
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_step: Callable[[int], None] | None = None,
) -> Training:
    """Train one head per readout and learning rate, and choose for each readout the one best on the validation split.

    Equal validation accuracy goes to the smaller learning rate. Heads that diverged are never chosen. The same
    arguments give byte-identical probes on the same machine.

    Args:
        train: features of the training images by readout.
        train_labels: class index of each training image.
        val: features of the validation images, the same readouts.
        val_labels: class index of each validation image.
        classes: class names, in the order of the indices.
        learning_rates: of SGD at the first step, on standardised features; decayed to 0 by a cosine.
        steps: updates of each head.
        batch_size: images an update; more than there are means all of them.
        weight_decay: λ, on the weights in standardised coordinates, not on the bias.
        seed: of the order of the images.
        device: where to train; features are copied there once.
        on_step: called with 1 after each step.
    Raises:
        ValueError: features, labels or settings do not fit together, are empty or not finite, the training images are
            all of one class, or all heads of a readout diverged; the message gives value and cure.
    """
    _check_settings(learning_rates, steps, batch_size, weight_decay)
    _check_split("train", train, train_labels, classes)
    _check_split("val", val, val_labels, classes)
    _check_readouts(train, val, train_labels)
    rates = tuple(float(rate) for rate in learning_rates)
    groups = [_Group(train, val, names, rates, len(classes), device) for names in _by_width(train)]
    batches = _Batches(len(train_labels), batch_size, seed)
    labels, val_labels = _to(train_labels, device), _to(val_labels, device)
    milestones = {math.ceil(steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
    curves: list[CurvePoint] = []
    for step in range(1, steps + 1):
        rows = batches.next().to(device)
        decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        for group in groups:
            group.step(rows, labels[rows], decay, weight_decay)
            if step in milestones:
                curves += group.point(step, val_labels)
        if on_step is not None:
            on_step(1)
    chosen = {probe.readout: probe for group in groups for probe in group.choose(val_labels)}
    probes = ProbeSet(
        probes={name: chosen[name] for name in train},
        classes=tuple(classes),
        learning_rates=rates,
        steps=steps,
        batch_size=batch_size,
        weight_decay=float(weight_decay),
        seed=seed,
        train_images=len(train_labels),
        val_images=len(val_labels),
    )
    order = {name: i for i, name in enumerate(train)}
    return Training(probes, tuple(sorted(curves, key=lambda p: (order[p.readout], p.learning_rate, p.step))))


def save_probes(path: Path | str, probes: ProbeSet) -> None:
    """Write probes as safetensors: `<readout>.weight`, `<readout>.bias`, and everything else as JSON in the metadata.

    The same probes give the same bytes.
    """
    tensors, described = {}, {}
    for name, probe in probes.probes.items():
        tensors[f"{name}.weight"] = np.ascontiguousarray(probe.weight)
        tensors[f"{name}.bias"] = np.ascontiguousarray(probe.bias)
        described[name] = {"learning_rate": probe.learning_rate, "val_correct": probe.val_correct}
    metadata = {
        "format_version": FORMAT_VERSION,
        "classes": list(probes.classes),
        "readouts": described,
        "learning_rates": list(probes.learning_rates),
        "steps": probes.steps,
        "batch_size": probes.batch_size,
        "weight_decay": probes.weight_decay,
        "seed": probes.seed,
        "train_images": probes.train_images,
        "val_images": probes.val_images,
    }
    save_file(tensors, str(path), metadata={METADATA_KEY: json.dumps(metadata, ensure_ascii=False)})


def load_probes(path: Path | str) -> ProbeSet:
    """Read what `save_probes` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidProbes: the file is no safetensors file of probes, or of another format version.
    """
    tensors, metadata = read_described(path, METADATA_KEY, "probes; run the probe stage")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InvalidProbes(
            f"{path} has probe format {metadata.get('format_version')}, this version reads {FORMAT_VERSION}; "
            "run the probe stage again"
        )
    probes = {
        name: Probe(name, tensors[f"{name}.weight"], tensors[f"{name}.bias"], about["learning_rate"],
                    about["val_correct"])
        for name, about in metadata["readouts"].items()
    }  # fmt: skip
    return ProbeSet(
        probes=probes,
        classes=tuple(metadata["classes"]),
        learning_rates=tuple(metadata["learning_rates"]),
        **{key: metadata[key] for key in
           ("steps", "batch_size", "weight_decay", "seed", "train_images", "val_images")},
    )  # fmt: skip


def read_described(path: Path | str, key: str, what: str) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors of a safetensors file, and the JSON that stands under `key` in its metadata.

    Args:
        what: the file should hold, and how to get it; for messages.
    Raises:
        FileNotFoundError: there is no such file.
        InvalidProbes: the file is no safetensors file, or lacks the key.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file of {what}")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InvalidProbes(f"{path} is no safetensors file ({error}); expected a file of {what} again") from error
    if key not in metadata:
        raise InvalidProbes(f"{path} has no {key!r} in its metadata; expected a file of {what} again")
    return tensors, json.loads(metadata[key])


class _Group:
    """All heads of the readouts of one width. Column h·c + k of a weight belongs to class k of head h."""

    def __init__(
        self, train: Mapping, val: Mapping, names: list[str], rates: tuple[float, ...], n_classes: int, device
    ):
        self.names, self.rates, self.n_classes = names, rates, n_classes
        width, columns = train[names[0]].shape[1], len(rates) * n_classes
        mean = np.stack([train[name].mean(0, dtype=np.float64) for name in names])  # (g, d)
        variance = np.stack([train[name].var(0, dtype=np.float64) for name in names])
        scale = np.sqrt(variance.mean(1))  # (g,)
        self.mean, self.scale = mean, np.where(scale > 0, scale, 1.0)  # constant features stay 0, and are harmless
        self.shift = _to(mean.astype(np.float32), device)[:, None]  # (g, 1, d)
        self.stretch = _to((1 / self.scale).astype(np.float32), device)[:, None, None]  # (g, 1, 1)
        self.train = [_to(train[name], device) for name in names]
        self.val = [_to(val[name], device) for name in names]
        self.weight = torch.zeros(len(names), width, columns, device=device)
        self.bias = torch.zeros(len(names), 1, columns, device=device)
        self.weight_velocity, self.bias_velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.rate = torch.tensor(rates, device=device).repeat_interleave(n_classes)  # (h·c,)
        self.loss = torch.zeros(len(names), len(rates), device=device)  # summed since the last point
        self.steps = self.steps_at_point = 0

    def step(self, rows: Int[Tensor, " b"], labels: Int[Tensor, " b"], decay: float, weight_decay: float) -> None:
        """One update of every head on the same rows."""
        b = len(rows)
        x = self._standardised([features[rows] for features in self.train])  # (g, b, d)
        logits = torch.baddbmm(self.bias, x, self.weight).view(len(x), b, len(self.rates), self.n_classes)
        log_p = logits.log_softmax(-1)  # (g, b, h, c)
        image = torch.arange(b, device=rows.device)
        self.loss -= log_p[:, image, :, labels].mean(0)  # (b, g, h) → (g, h)
        gradient = log_p.exp_()
        gradient[:, image, :, labels] -= 1
        gradient = gradient.view(len(x), b, -1).div_(b)  # (g, b, h·c)
        weight_gradient = x.mT @ gradient
        if weight_decay:
            weight_gradient.add_(self.weight, alpha=weight_decay)
        self.weight_velocity.mul_(MOMENTUM).add_(weight_gradient)
        self.bias_velocity.mul_(MOMENTUM).add_(gradient.sum(1, keepdim=True))
        rate = self.rate * decay
        self.weight.addcmul_(self.weight_velocity, rate, value=-1)
        self.bias.addcmul_(self.bias_velocity, rate, value=-1)
        self.steps += 1

    def point(self, step: int, val_labels: Int[Tensor, " v"]) -> list[CurvePoint]:
        """One row of the curves for each head; starts the next mean of the loss."""
        loss = (self.loss / (self.steps - self.steps_at_point)).nan_to_num(nan=math.inf).cpu().tolist()
        top1 = (self._correct(val_labels) / len(val_labels)).cpu().tolist()
        self.loss.zero_()
        self.steps_at_point = self.steps
        return [
            CurvePoint(name, rate, step, loss[g][h], top1[g][h])
            for g, name in enumerate(self.names)
            for h, rate in enumerate(self.rates)
        ]

    def choose(self, val_labels: Int[Tensor, " v"]) -> list[Probe]:
        """The best head of each readout on the validation split, folded back to raw features."""
        finite = self._by_head(self.weight).isfinite().all(1).all(-1)  # (g, h)
        finite &= self._by_head(self.bias).isfinite().all(1).all(-1)
        correct = self._correct(val_labels).masked_fill(~finite, -1).cpu().tolist()
        probes = []
        for g, name in enumerate(self.names):
            best = min(range(len(self.rates)), key=lambda h, g=g: (-correct[g][h], self.rates[h]))
            if correct[g][best] < 0:
                raise ValueError(f"all {len(self.rates)} heads of readout {name!r} diverged; "
                                 f"the smallest learning rate was {min(self.rates):g}: try smaller ones")  # fmt: skip
            weight = self._by_head(self.weight)[g, :, best].double().cpu().numpy() / self.scale[g]  # (d, c)
            bias = self._by_head(self.bias)[g, 0, best].double().cpu().numpy() - self.mean[g] @ weight
            weight, bias = np.ascontiguousarray(weight.T, dtype=np.float32), bias.astype(np.float32)
            probes.append(Probe(name, weight, bias, self.rates[best], correct[g][best]))
        return probes

    def _correct(self, val_labels: Int[Tensor, " v"]) -> Int[Tensor, "g h"]:
        """Validation images that each head gets right."""
        rows = max(1, LOGITS_AT_ONCE // (len(self.names) * self.weight.shape[2]))
        total = torch.zeros(len(self.names), len(self.rates), dtype=torch.int64, device=self.weight.device)
        for start in range(0, len(val_labels), rows):
            x = self._standardised([features[start : start + rows] for features in self.val])
            predicted = self._by_head(torch.baddbmm(self.bias, x, self.weight)).argmax(-1)  # (g, v, h)
            total += (predicted == val_labels[None, start : start + rows, None]).sum(1)
        return total

    def _standardised(self, parts: list[Float[Tensor, "b d"]]) -> Float[Tensor, "g b d"]:
        return torch.stack(parts).sub_(self.shift).mul_(self.stretch)

    def _by_head(self, x: Float[Tensor, "g n hc"]) -> Float[Tensor, "g n h c"]:
        return x.view(*x.shape[:2], len(self.rates), self.n_classes)


class _Batches:
    """Row indices of the batches: one random order after another, cut into equal lengths; drawn on the CPU."""

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.size = n, min(n, batch_size)
        self.generator = torch.Generator().manual_seed(seed)
        self.left = torch.empty(0, dtype=torch.int64)

    def next(self) -> Int[Tensor, " b"]:
        if len(self.left) < self.size:
            self.left = torch.cat([self.left, torch.randperm(self.n, generator=self.generator)])
        rows, self.left = self.left[: self.size], self.left[self.size :]
        return rows


def _by_width(features: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Readout names grouped by their number of channels, in the order of their first readout."""
    groups: dict[int, list[str]] = {}
    for name, values in features.items():
        groups.setdefault(values.shape[1], []).append(name)
    return list(groups.values())


def _to(values: np.ndarray, device: str | torch.device) -> Tensor:
    dtype = np.int64 if np.issubdtype(values.dtype, np.integer) else np.float32
    return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)).to(device)


def _check_settings(learning_rates: Sequence[float], steps: int, batch_size: int, weight_decay: float) -> None:
    if not learning_rates or len(set(learning_rates)) < len(learning_rates):
        raise ValueError(f"learning_rates are {list(learning_rates)}; expected at least one, each once")
    if not all(math.isfinite(rate) and rate > 0 for rate in learning_rates):
        raise ValueError(f"learning_rates are {list(learning_rates)}; expected finite numbers above 0")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps is {steps} and batch_size {batch_size}; expected at least 1 of each")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay is {weight_decay}; expected a finite number, 0 or above")


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
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).any(1).sum())
            raise ValueError(
                f"readout {name!r}: {bad} of {len(values)} {split} rows are not finite; extract them again"
            )


def _check_readouts(train: Mapping[str, np.ndarray], val: Mapping[str, np.ndarray], train_labels: np.ndarray) -> None:
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
