"""Classifying images with a run and its probes: backbone + registers + probe, and nothing else.

    classifier = Classifier.load("data/backbones/focus", "features/original/run.json",
                                 "features/original/probes.safetensors")
    for image in classifier.classify(["cat.png", "dog.png"]):
        print(image.path, image.class_name, image.probability)

Images are read, cropped and normalised as in extraction, and the logits are those that the probe gives for stored
features, up to what storing them as float16 rounds (a relative 5e-4 a channel).

Shape letters: b image, c class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from .backbones import Backbone
from .detectors import energy
from .finite import check_finite
from .forward import readouts
from .images import Transform, UnreadableImage, in_order, to_rgb
from .lanes import usual_batch_size
from .probes import InvalidProbes, Probe, ProbeSet, load_probes
from .progress import progress as Progress
from .readouts import InMemory, arrays_needed, readout
from .runs import open_run, read_run
from .store import fingerprint
from .tokens import TokenLayout

CLASSIFIERS = ("linear", "logistic")
COMPARED = ("weights_sha256", "transform", "registers", "num_registers", "statistic", "patches", "scale", "control")


@dataclass(frozen=True)
class Classified:
    """What a probe says of one image.

    Attributes:
        path: of the image; None where it was handed in as an image.
        class_name: of the largest logit.
        probability: its softmax.
        energy: −log Σ exp(logits), larger for anomalies.
        logits: (c,) float32, in the order of `Classifier.classes`.
    """

    path: Path | None
    class_name: str
    probability: float
    energy: float
    logits: Float[np.ndarray, " c"]


@dataclass(frozen=True)
class FolderClassified:
    """The images of a folder, sorted by path, and the files that could not be read, each with its `path` and `reason`."""

    images: tuple[Classified, ...]
    unreadable: tuple[UnreadableImage, ...]


@dataclass(frozen=True)
class Classifier:
    """A backbone with its registers in place, and the probe on top.

    Attributes:
        backbone: of the run.
        probe: that classifies.
        classes: class names, in the order of the logits.
        device: where the model is.
    """

    backbone: Backbone
    probe: Probe
    classes: tuple[str, ...]
    device: torch.device

    @classmethod
    def load(
        cls,
        backbone_folder: Path | str,
        run_json: Path | str,
        probes: Path | str,
        readout: str | None = None,
        *,
        classifier: str = "linear",
        seed: int | None = None,
        device: str | torch.device = "cpu",
    ) -> Classifier:
        """Opens all three and checks that they belong together.

        Args:
            backbone_folder: `data/backbones/<backbone>`, of the run.
            run_json: `features/<run>/run.json`.
            probes: `features/<run>/probes.safetensors`.
            readout: which one's probe; the best on validation when None.
            classifier: `linear` (SGD) or `logistic`.
            seed: of the linear probe; the best on validation when None.
            device: where to compute.
        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the folder is not the run's backbone, or readout, classifier or seed is not among the probes.
            InvalidProbes: the file holds no probes, or those of another run.
        """
        folder, run = Path(backbone_folder), read_run(Path(run_json))
        if folder.resolve().name != run["backbone"] and folder.name != run["backbone"]:
            raise ValueError(
                f"run {run['run']} is of backbone {run['backbone']!r}, and the folder is {folder}; "
                f"give the folder named {run['backbone']}"
            )
        trained = load_probes(probes)
        _check_origin(trained, run, Path(probes))
        chosen = choose_probe(trained, readout, classifier, seed)
        backbone = open_run(Path(run_json), folder.parent)
        backbone.model.to(device)
        return cls(backbone, chosen, trained.classes, torch.device(device))

    def classify(
        self, images: Iterable[Path | str | Image.Image], batch_size: int | None = None, workers: int = 0
    ) -> list[Classified]:
        """Classifies paths and images, in their order.

        Args:
            batch_size: images a forward; None is 8 on a CPU, else 32.
            workers: decoding threads; 0 decodes in between.
        Raises:
            UnreadableImage: an image cannot be decoded; `stream` and `classify_folder` go on instead.
            BadFeatures: the model gives NaN or infinity for an image.
        """
        results = []
        for result in self.stream(images, batch_size, workers):
            if isinstance(result, UnreadableImage):
                raise result
            results.append(result)
        return results

    def classify_folder(
        self,
        folder: Path | str,
        batch_size: int | None = None,
        workers: int = 0,
        progress: Progress | None = None,
    ) -> FolderClassified:
        """Classifies every image below a folder; a broken one is reported and stops nothing.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: nothing below the folder has the extension of an image format.
        """
        images, unreadable = [], []
        for result in self.stream(image_files(folder), batch_size, workers):
            (unreadable if isinstance(result, UnreadableImage) else images).append(result)
            if progress is not None:
                progress.advance()
        return FolderClassified(tuple(images), tuple(sorted(unreadable, key=lambda error: error.path)))

    def stream(
        self, images: Iterable[Path | str | Image.Image], batch_size: int | None = None, workers: int = 0
    ) -> Iterator[Classified | UnreadableImage]:
        """Classifies one batch after another, so that memory does not grow with the images.

        Yields: a `Classified` for each image in their order; an `UnreadableImage`, before the batch that it would have
            been in, for what cannot be decoded.
        Raises:
            ValueError: batch_size below 1 or workers below 0.
            BadFeatures: the model gives NaN or infinity for an image.
        """
        batch_size = usual_batch_size(self.device) if batch_size is None else batch_size
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0")
        decoded = in_order(_Decode(self.backbone.transform), images, workers, ahead=2 * batch_size)
        while batch := list(islice(decoded, batch_size)):
            yield from (image for _, image in batch if isinstance(image, UnreadableImage))
            whole = [(path, image) for path, image in batch if isinstance(image, Tensor)]
            if whole:
                logits = self.logits(torch.stack([image for _, image in whole]), [path for path, _ in whole])
                yield from map(self._classified, [path for path, _ in whole], logits)

    @torch.inference_mode()
    def logits(
        self, batch: UInt8[Tensor, "b 3 s s"], paths: Sequence[Path | None] | None = None
    ) -> Float[np.ndarray, "b c"]:
        """Logits of a batch of decoded images (`Transform.load`).

        Args:
            paths: of the images, for errors; None for one that has none, or for all.
        Raises:
            BadFeatures: the model gives NaN or infinity for an image.
        """
        model, images = self.backbone.model, self.backbone.transform.normalise(batch.to(self.device))
        tokens = model.forward_features(images)
        arrays = readouts(TokenLayout.of(model), tokens, arrays_needed(self.probe.readout))
        check_finite(model, images, arrays, paths and [path and str(path) for path in paths])
        features = InMemory({name: values.cpu().numpy() for name, values in arrays.items()})
        return self.probe.logits(readout(features, self.probe.readout))

    def _classified(self, path: Path | None, logits: Float[np.ndarray, " c"]) -> Classified:
        best, e = int(logits.argmax()), float(energy(logits[None])[0])
        return Classified(path, self.classes[best], float(np.exp(float(logits[best]) + e)), e, logits)


def choose_probe(probes: ProbeSet, readout: str | None, classifier: str = "linear", seed: int | None = None) -> Probe:
    """One probe of a set: that of a readout, a classifier and a seed, or the best on validation where these are None.

    Of equals the first of the set is taken. `cls_noise` is never chosen.

    Raises:
        ValueError: readout, classifier or seed is not among the probes, or is a control that takes whole data sets.
    """
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier is {classifier!r}; expected one of {', '.join(CLASSIFIERS)}")
    if readout == "cls_noise":
        raise ValueError("readout 'cls_noise' takes its noise from the spread of a whole data set, so it cannot "
                         "classify an image; choose another readout")  # fmt: skip
    linear = classifier == "linear"
    known = probes.probes if linear else {name: (probe,) for name, probe in probes.logistic.items()}
    if not known or (readout is not None and readout not in known):
        raise ValueError(
            f"there is no {classifier} probe of readout {readout!r}; there are {', '.join(known) or 'none'}: choose one "
            "of them, or name it in probe.readouts and run the probe stage again"
        )
    if seed is not None and (not linear or seed not in probes.seeds):
        has = f"there are {', '.join(map(str, probes.seeds))}" if linear else "logistic regression has no seed"
        raise ValueError(f"there is no {classifier} probe of seed {seed}; {has}")
    candidates = [
        probe
        for name, of_seeds in known.items()
        for probe in of_seeds
        if (name == readout if readout is not None else name != "cls_noise") and seed in (None, probe.seed)
    ]
    if not candidates:
        raise ValueError("the only readout is 'cls_noise', a control; train a probe on another")
    return max(candidates, key=lambda probe: probe.val_correct)


def image_files(folder: Path | str) -> list[Path]:
    """The files below a folder that have the extension of an image format, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give one that holds images")
    known = Image.registered_extensions()
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in known
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"{folder} holds no file with the extension of an image format (.png, .jpg, …)")
    return files


@dataclass(frozen=True)
class _Decode:
    """(path, decoded image) of an item; what is wrong with it in the place of the image where it is broken."""

    transform: Transform

    def __call__(self, item: Path | str | Image.Image) -> tuple[Path | None, Tensor | UnreadableImage]:
        if not isinstance(item, Image.Image):
            try:
                return Path(item), self.transform.load(item)
            except UnreadableImage as error:
                return Path(item), error
        image = self.transform.crop(to_rgb(item))
        return None, torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _check_origin(probes: ProbeSet, run: dict, path: Path) -> None:
    """The probes were trained on features of this run; probes that do not say of which are taken on trust."""
    if not probes.origin:
        return
    here = run | {"neurons_sha256": None if run["neurons"] is None else fingerprint(run["neurons"])}
    differ = [key for key in (*COMPARED, "neurons_sha256") if here.get(key) != probes.origin.get(key)]
    if differ:
        raise InvalidProbes(
            f"{path} was trained on features of another run than {run['run']}: {', '.join(differ)} differ; "
            "give the probes of this run, or run the extract and probe stages again"
        )
