"""Training a backbone with a head on one of its readouts; the head is thrown away, the weights best on the val split are kept.

A training that is broken off goes on where it last saved itself, and ends with the same weights: batches, augmentation and
learning rates follow from seed and step. The model stays in eval mode, without dropout and stochastic depth.

Shape letters: b image, c class.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor, nn
from tqdm.auto import tqdm

from regvit.data.batches import Batches, sample
from regvit.data.manifest import Dataset
from regvit.data.transform import Transform
from regvit.files import locked, write_atomic
from regvit.models.arithmetic import arithmetic
from regvit.training.augmentation import TrainingBatches
from regvit.training.classifier import ReadoutClassifier
from regvit.training.norms_by_step import IMAGES, norm_rows
from regvit.training.recipe import Recipe, parameter_groups, unfreeze
from regvit.training.register_tokens import positions_were_trained

SAVED = "training.pt"
SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Computing:
    """Where and how fast: on the device, so many images a forward, read by so many threads."""

    device: str = "cpu"
    batch_size: int = 8
    workers: int = 0


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        step: whose weights were kept.
        val_top1: theirs.
        curve, norms: rows of `norms_by_step`.
    """

    step: int
    val_top1: float
    curve: list[tuple]
    norms: list[tuple]


def finetune(
    model: nn.Module,
    dataset: Dataset,
    transform: Transform,
    recipe: Recipe,
    folder: Path,
    computing: Computing = Computing(),
    seed: int = 0,
) -> Trained:
    """Trains a model in place on the train split of a data set.

    Args:
        model: with its registers added; it is left in eval mode, on the CPU, without gradients.
        folder: for the state of a training under way; made where it is missing, left to the caller to remove.
    Raises:
        ValueError: recipe, model and data set do not fit together, or the loss is no number any more.
        FolderLocked: another process trains there.
    """
    state = _State(model, dataset, transform, recipe, computing, seed)
    with locked(folder), tqdm(total=recipe.steps, desc=f"train on {dataset.name}", unit="step") as bar:
        state.resume(folder / SAVED, bar.write)
        bar.update(state.step)
        if not state.step and 0 in recipe.checkpoints:
            state.look_at_norms()
        saved = time.monotonic()
        for images, labels in state.batches.from_step(state.step):
            state.update(images, labels)
            bar.update()
            if state.step % recipe.validate_every == 0 or state.step == recipe.steps:
                state.validate()
                bar.set_postfix(val_top1=f"{state.curve[-1][2]:.3f}")
            if state.step in recipe.checkpoints:
                state.look_at_norms()
            if time.monotonic() - saved > SAVE_EVERY:
                state.save(folder / SAVED)
                saved = time.monotonic()
    state.finish()
    return Trained(state.best_step, state.best, state.curve, state.norms)


class _State:
    """All that a training has come to."""

    def __init__(
        self, model: nn.Module, dataset: Dataset, transform: Transform, recipe: Recipe, computing: Computing, seed: int
    ):
        self.recipe, self.computing, self.transform, self.seed = recipe, computing, transform, seed
        self.batches = TrainingBatches(dataset.subset("train"), transform, recipe, seed, computing.workers)
        self.val = dataset.subset("val")
        self.truth = torch.from_numpy(self.val.labels())
        if not len(self.val) or (self.truth < 0).any():
            raise ValueError(
                f"data set {dataset.name} has no val images, or some without a label; it needs some to choose by"
            )
        self.key = self._key(model, dataset)
        unfreeze(model, recipe)
        self.classifier = ReadoutClassifier(model, recipe.readout, len(dataset.classes), seed).to(computing.device)
        groups = list(parameter_groups(model, self.classifier.head, recipe))
        self.optimizer = torch.optim.AdamW(groups)
        self.rates = [group["lr"] for group in groups]
        self.trained = {name: p for name, p in self.classifier.named_parameters() if p.requires_grad}
        self.step, self.best_step, self.best = 0, 0, -1.0
        self.kept: dict[str, Tensor] = {}
        self.curve: list[tuple] = []
        self.norms: list[tuple] = []
        self.losses: list[float] = []

    def update(self, images: UInt8[Tensor, "b 3 s s"], labels: Int[Tensor, " b"]) -> None:
        """One step; gradients of a batch are summed over as many images at once as `computing` says."""
        factor = self.recipe.rate(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.computing.device)
        at_once = self.computing.batch_size
        for pixels, truth in zip(images.split(at_once), labels.split(at_once), strict=True):
            with self._arithmetic():
                logits = self.classifier(self.transform.normalise(pixels.to(self.computing.device)))
            loss = F.cross_entropy(
                logits.float(), truth.to(logits.device), reduction="sum", label_smoothing=self.recipe.label_smoothing
            )
            (loss / len(labels)).backward()
            total += loss.detach()
        self.optimizer.step()
        self.step += 1
        self.losses.append(float(total) / len(labels))
        if not self.losses[-1] < float("inf"):
            raise ValueError(
                f"the loss is {self.losses[-1]} in step {self.step}; take smaller learning rates (now "
                f"{self.recipe.learning_rate:g}, registers {self.recipe.token_learning_rate:g}) or a longer warm-up"
            )

    @torch.inference_mode()
    def validate(self) -> None:
        """Adds a point to the curve, and keeps the weights where it is the best so far."""
        right, first = 0, 0
        for images in self._images(self.val):
            with self._arithmetic():
                guess = self.classifier(images).argmax(1).cpu()
            right += int((guess == self.truth[first : first + len(guess)]).sum())
            first += len(guess)
        self.curve.append((self.step, sum(self.losses) / len(self.losses), right / len(self.val)))
        self.losses = []
        if self.curve[-1][2] > self.best:
            self.best_step, self.best = self.step, self.curve[-1][2]
            self.kept = {name: p.detach().cpu().clone() for name, p in self.trained.items()}

    def look_at_norms(self) -> None:
        """Norms of patches of val images as the model now is."""
        shown = sample(self.val, "val", IMAGES, self.seed)
        self.norms += norm_rows(self.classifier.model, self._images(shown), self.step)

    def finish(self) -> None:
        """Gives the model the weights that were kept."""
        with torch.no_grad():
            for name, value in self.kept.items():
                self.trained[name].copy_(value)
        model = self.classifier.model.cpu().eval().requires_grad_(False)
        if "model.pos_embed" in self.trained:
            positions_were_trained(model)

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name) for name in _PLAIN}
        now = {name: p.detach() for name, p in self.trained.items()}
        with write_atomic(path) as beside:
            torch.save(state | {"now": now, "optimizer": self.optimizer.state_dict()}, beside)

    def resume(self, path: Path, tell: Callable[[str], object]) -> None:
        """Goes on from a file of `save`, if that was of this very training; else says why not."""
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["key"] != self.key:
            tell(f"started anew: what lies in {path.parent} is of another training")
            return
        for name in _PLAIN:
            setattr(self, name, state[name])
        with torch.no_grad():
            for name, value in state["now"].items():
                self.trained[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        tell(f"resumed: {self.step} of {self.recipe.steps} steps were done")

    def _images(self, dataset: Dataset) -> Iterator[Tensor]:
        where = self.computing
        return iter(Batches(dataset, self.transform, where.batch_size, where.workers, where.device, label=None))

    def _arithmetic(self):
        return arithmetic(self.recipe.precision, torch.device(self.computing.device))

    def _key(self, model: nn.Module, dataset: Dataset) -> str:
        """SHA-256 of all that decides the training, the code of this room included."""
        made = {"recipe": asdict(self.recipe), "transform": self.transform.to_dict(), "seed": self.seed}
        digest = hashlib.sha256(json.dumps(made | {"images": dataset.digest, "torch": torch.__version__}).encode())
        for file in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
        for name, value in model.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


_PLAIN = ("key", "step", "best_step", "best", "kept", "curve", "norms", "losses")
