"""A linear classifier on the features of a readout, and the files that hold a run's classifiers.

`features/probes/<run>.safetensors` holds the probes that SGD trained, one a readout and seed; `features/baselines/<run>` has
what does not train by steps, logistic regression and the neighbours' settings. Weights are tensors, all else is JSON in the
metadata; the same classifiers give the same bytes. No torch.

Shape letters: b image, d channel, d' channel that the weight multiplies, c class, r register.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from regvit.files import write_atomic
from regvit.stats.accuracy import accuracy
from regvit.stats.figures import Figure

METADATA_KEY = "regvit"  # one key: safetensors does not fix the order of several, which would change the bytes
FORMAT_VERSION = 3
TENSORS = ("weight", "bias", "pool")  # of a probe


class InvalidProbes(ValueError):
    """A file that holds no probes (or predictions) of this format; the message names the file and the cure."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier on raw features of one readout.

    Attributes:
        readout: name of the readout.
        weight: (c, d') float32, applied to what `embed` makes of features as they stand in the store.
        bias: (c,) float32.
        val_correct: validation images that it gets right.
        learning_rate, seed: of SGD; None for logistic regression.
        C: the inverse regularisation that won, of logistic regression; else None.
        pool: what the registers are weighed with where the probe does so, float32: a (r,) for `cls_reg_learned`,
            q (d,) for `cls_reg_attn` (`heads` has the formulas); else None.
        n_registers: that the probe pools; 0 where it does not.
    """

    readout: str
    weight: Float[np.ndarray, "c d"]
    bias: Float[np.ndarray, " c"]
    val_correct: int
    learning_rate: float | None = None
    seed: int | None = None
    C: float | None = None
    pool: Float[np.ndarray, " rd"] | None = None
    n_registers: int = 0

    @property
    def width(self) -> int:
        """Channels of the features that the probe takes."""
        inner = self.weight.shape[1]
        return inner if self.pool is None else inner // 2 * (1 + self.n_registers)

    @property
    def parameters(self) -> int:
        """Numbers that were trained."""
        return self.weight.size + self.bias.size + (0 if self.pool is None else self.pool.size)

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
        attends = self.readout == "cls_reg_attn"
        scores = registers @ self.pool / math.sqrt(d) if attends else self.pool[None]  # (b | 1, r)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        return np.concatenate([cls, (weights[:, :, None] * registers).sum(1)], axis=1)

    def logits(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b c"]:
        """Class logits of each image, float32. Raises as `embed`."""
        return self.embed(features) @ self.weight.T + self.bias


@dataclass(frozen=True)
class Neighbours:
    """How many neighbours vote, and how sharply their similarity weighs.

    Attributes:
        k: number of neighbours.
        temperature: of the softmax over their similarities.
        val_correct: validation images that they get right; None where k was not chosen on any.
    """

    k: int
    temperature: float
    val_correct: int | None = None


@dataclass(frozen=True)
class ProbeSet:
    """The chosen probes of each readout.

    Attributes:
        probes: by readout name, one a seed.
        classes: class names, in the order of the logits.
        settings: what they were trained with, plain JSON values.
        train_images, val_images: that they were trained and chosen on.
    """

    probes: dict[str, tuple[Probe, ...]]
    classes: tuple[str, ...]
    settings: dict
    train_images: int
    val_images: int


@dataclass(frozen=True)
class Baselines:
    """Classifiers that do not train by steps, by readout name; empty where they were not asked for."""

    logistic: dict[str, Probe]
    knn: dict[str, Neighbours]
    classes: tuple[str, ...]
    train_images: int
    val_images: int


def validation_figures(probes: ProbeSet) -> list[Figure]:
    """Of each readout: validation accuracy of its chosen probes, the learning rates that won (mean, least and largest), and
    what a probe costs: channels that it takes, and its parameters."""
    figures, images = [], np.arange(probes.val_images)
    for name, of_seeds in probes.probes.items():
        correct = np.stack([images < probe.val_correct for probe in of_seeds])  # the same images: seeds narrow nothing
        rates = [probe.learning_rate for probe in of_seeds]
        keys = {"readout": name, "classifier": "linear"}
        figures.append(Figure.of("val_top1", accuracy(correct), **keys))
        figures.append(Figure("learning_rate", float(np.mean(rates)), min(rates), max(rates), **keys))
        figures.append(Figure("width", of_seeds[0].width, **keys))
        figures.append(Figure("head_parameters", of_seeds[0].parameters, **keys))
    return figures


def at_end_of_grid(probes: ProbeSet) -> list[str]:
    """Readouts one of whose probes has the smallest or the largest of several learning rates."""
    rates = probes.settings["learning_rates"]
    ends = {min(rates), max(rates)} if len(rates) > 1 else set()
    return [name for name, of_seeds in probes.probes.items() if ends & {probe.learning_rate for probe in of_seeds}]


def save_probes(path: Path | str, probes: ProbeSet) -> None:
    """Write probes as safetensors: `<readout>/<seed>/weight`, `…/bias` and where the probe pools `…/pool`."""
    readouts = {name: {str(probe.seed): probe for probe in of_seeds} for name, of_seeds in probes.probes.items()}
    _save(path, "probes", readouts, probes)


def load_probes(path: Path | str) -> ProbeSet:
    """Read what `save_probes` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidProbes: the file is no safetensors file of probes, or of another format version.
    """
    readouts, metadata = _load(path, "probes", "probe")
    probes = {name: tuple(of_seeds.values()) for name, of_seeds in readouts.items()}
    return ProbeSet(
        probes, tuple(metadata["classes"]), *(metadata[key] for key in ("settings", "train_images", "val_images"))
    )


def save_baselines(path: Path | str, baselines: Baselines) -> None:
    """Write baselines as safetensors: `<readout>/logistic/weight` and `…/bias`; the neighbours are in the metadata."""
    _save(path, "baselines", {name: {"logistic": probe} for name, probe in baselines.logistic.items()}, baselines)


def load_baselines(path: Path | str) -> Baselines:
    """Read what `save_baselines` wrote. Raises as `load_probes`."""
    readouts, metadata = _load(path, "baselines", "baselines")
    return Baselines(
        {name: probes["logistic"] for name, probes in readouts.items()},
        {name: Neighbours(**about) for name, about in metadata["knn"].items()},
        tuple(metadata["classes"]),
        metadata["train_images"],
        metadata["val_images"],
    )


def _save(
    path: Path | str, kind: str, readouts: Mapping[str, Mapping[str, Probe]], whole: ProbeSet | Baselines
) -> None:
    tensors, described = {}, {}
    for name, probes in readouts.items():
        for key, probe in probes.items():
            about = {field: value for field, value in vars(probe).items() if field not in TENSORS}
            described.setdefault(name, {})[key] = about
            held = {field: getattr(probe, field) for field in TENSORS if getattr(probe, field) is not None}
            tensors |= {f"{name}/{key}/{field}": np.ascontiguousarray(value) for field, value in held.items()}
    metadata = {key: value for key, value in vars(whole).items() if key not in ("probes", "logistic", "knn")}
    if isinstance(whole, Baselines):
        metadata["knn"] = {name: asdict(neighbours) for name, neighbours in whole.knn.items()}
    metadata |= {"kind": kind, "format_version": FORMAT_VERSION, "readouts": described}
    with write_atomic(path) as beside:
        save_file(tensors, str(beside), metadata={METADATA_KEY: json.dumps(metadata, ensure_ascii=False)})


def _load(path: Path | str, kind: str, stage: str) -> tuple[dict[str, dict[str, Probe]], dict]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file of {kind}; run the {stage} stage")
    cure = f"expected a file of {kind} of format {FORMAT_VERSION}; run the {stage} stage again"
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InvalidProbes(f"{path} is no safetensors file ({error}); {cure}") from error
    if (found := (metadata.get("kind"), metadata.get("format_version"))) != (kind, FORMAT_VERSION):
        raise InvalidProbes(f"{path} holds {found[0] or 'something else'} of format {found[1]}; {cure}")
    return {
        name: {key: Probe(**about, **{field: tensors.get(f"{name}/{key}/{field}") for field in TENSORS})
               for key, about in probes.items()}
        for name, probes in metadata["readouts"].items()
    }, metadata  # fmt: skip
