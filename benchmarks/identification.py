"""The search for register neurons against the published one: `python -m benchmarks.identification`.

The published search (arXiv:2506.08010 and its code) takes one image at a time through the whole model, copies what every
block's MLP and every block gave to the host, and keeps the scores of every image until the end. It is written down here
from the paper, with the detection layer and the threshold that ours finds, as it needs them given. Ours settles both,
stops at the detection layer, and keeps sums. Same model, same images, already decoded; both run in turn in one process,
the published one on every fourth image, as it goes image by image.

- Ratio in the same precision, and of ours in bfloat16 to the published in float32. Before that, both must rank the
  neurons alike and every precision must select the same.
- With --memory: peak memory at 1, 4 and 16 times the images, each in a process of its own, beyond that of the model and
  one forward.

By default, the planted backbone and the images of the pipeline where they are built, else a small planted ViT on noise.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.machine import ROUNDS, in_turn, in_words, save
from regvit.data.batches import Batches, sample
from regvit.data.manifest import read_dataset
from regvit.models.arithmetic import arithmetic
from regvit.models.backbones import load_backbone
from regvit.registers.neurons import RegisterNeurons, find_register_neurons
from regvit.registers.planting import plant

BACKBONE, DATASET = Path("data/backbones/focus_planted"), Path("data/twemoji")
BATCH, IMAGES = 8, 512
WANTED = {"cpu": 1.2, "cuda": 20.0}  # times as fast in the same precision
WANTED_FAST = {"cpu": 3.0, "cuda": 20.0}  # in the fastest precision that selects the same neurons
SAME_SCORES = 1e-4  # relative; sums in another order
SHARE = 4  # the published search runs on every fourth image, and its time is taken times four: it goes image by image
TIMES = (1, 4, 16)


@dataclass(frozen=True)
class Subject:
    """A model, its decoded images, and what both are in words."""

    model: nn.Module
    images: Tensor
    words: str


@torch.inference_mode()
def published_search(model: nn.Module, images: Iterator[Tensor], count: int, layer: int, threshold: float) -> Tensor:
    """Mean |activation| of each neuron over the images that have outliers, (l, k), as published.

    One thing differs: CLS and registers never count as outliers (there they would, had they norms over the threshold).
    """
    device = next(model.parameters()).device
    depth, prefix = len(model.blocks), model.num_prefix_tokens
    scores, with_outliers = torch.zeros(count, depth, model.blocks[0].mlp.fc2.in_features, device=device), 0
    for image in images:
        activations, outputs = HostLog(), HostLog()
        handles = [block.mlp.act.register_forward_hook(activations) for block in model.blocks]
        handles += [block.register_forward_hook(outputs) for block in model.blocks]
        model(image.to(device))
        for handle in handles:
            handle.remove()
        acts = torch.from_numpy(np.stack(activations.values)).to(device)[:, 0]  # (l, n, k)
        out = torch.from_numpy(np.stack(outputs.values)).to(device)[:, 0]  # (l, n, d)
        where = torch.where(out[layer, prefix:].norm(dim=1) > threshold)[0] + prefix
        if len(where) == 0:
            continue
        for block in range(depth):
            scores[with_outliers, block] = acts[block][where].abs().mean(0)
        with_outliers += 1
    return scores[:with_outliers].mean(0)


class HostLog:
    """A hook that copies every output to the host, as the published one does."""

    def __init__(self):
        self.values: list[np.ndarray] = []

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.values.append(output.detach().cpu().numpy())


def measure(quick: bool = False) -> list[dict]:
    """Rows of the table of all benchmarks; quick: a tiny model, one round."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject = planted_noise(160) if quick else built_or_noise(BACKBONE, DATASET, IMAGES)
    return ratios(subject, device, rounds=1 if quick else ROUNDS)


def ratios(subject: Subject, device: str, rounds: int) -> list[dict]:
    """Rows of the table, after a check that the searches agree."""
    model, images = subject.model.to(device), subject.images
    found = find_register_neurons(model, images)
    if found.detection is None:
        raise SystemExit(f"{subject.words}: no outliers, so there is nothing to search; name a backbone that has some")
    some = images[::SHARE]
    check_against_published(find_register_neurons(model, some), model, some)
    rows = []
    for precision, wanted in (("float32", WANTED), ("bfloat16", WANTED_FAST)):
        same = find_register_neurons(model, images, precision=precision).selected == found.selected
        if not same:
            raise SystemExit(f"{precision} selects other neurons than float32; it may not be compared")
        timed = in_turn(
            lambda precision=precision: find_register_neurons(model, images, precision=precision),
            lambda: published(model, some, found),
            rounds,
            device,
        )
        what = "identification" if precision == "float32" else f"identification in {precision}"
        detail = f"{subject.words}; detection layer {found.detection.layer}, {found.num_selected} neurons"
        name = f"{what} / the published search in float32"
        rows.append(timed.row(name, wanted[device], detail, len(images) / len(some)))
    return rows


def published(model: nn.Module, images: Tensor, found: RegisterNeurons) -> Tensor:
    """The published search in full float32: on a GPU torch would take TF32 for convolutions, which ours does not."""
    one_by_one, detection = iter(images.split(1)), found.detection
    with arithmetic("float32", next(model.parameters()).device):
        return published_search(model, one_by_one, len(images), detection.layer, detection.threshold)


def check_against_published(found: RegisterNeurons, model: nn.Module, images: Tensor) -> None:
    """The published scores are those that ours reports beside its own, for all neurons that it lists.

    Raises:
        AssertionError: they are not.
    """
    theirs = published(model, images, found).cpu()
    ours = torch.tensor([n.activation for n in found.active])
    same = torch.stack([theirs[n.layer, n.neuron] for n in found.active])
    assert torch.allclose(ours, same, rtol=SAME_SCORES, atol=2e-6), f"scores differ by {(ours - same).abs().max():.2g}"
    depth = found.detection.layer + 1
    best = theirs[:depth].flatten().argmax().item()
    assert divmod(best, theirs.shape[1]) == (found.active[0].layer, found.active[0].neuron)


def built_or_noise(backbone: Path, dataset: Path, count: int) -> Subject:
    """The pipeline's planted backbone and images of its train split, or a stand-in where they are not there."""
    if not (backbone.is_dir() and dataset.is_dir()):
        return planted_noise(count)
    return built(backbone, dataset, count)


def built(backbone: Path, dataset: Path, count: int) -> Subject:
    loaded = load_backbone(backbone)
    batches = Batches(sample(read_dataset(dataset), "train", count, 0), loaded.transform, BATCH, label=None)
    images = torch.cat(list(batches))
    name = loaded.info["architecture"]
    return Subject(loaded.model, images, f"{name} at {images.shape[-1]} px, {len(images)} images of {dataset.name}")


def planted_noise(count: int) -> Subject:
    """A ViT of random weights with register neurons planted by hand, on noise with a flat bright square."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=64, depth=6, num_heads=4, num_classes=0)
    model.eval().requires_grad_(False)
    images = torch.randn(count, 3, 64, 64)
    for image, (row, column) in zip(images, torch.randint(0, 6, (count, 2)).tolist(), strict=True):
        image[:, 8 * row : 8 * row + 24, 8 * column : 8 * column + 24] = 2.0
    plant(model, images[:48], seed_layer=2, amplifier_layer=3, fraction=0.05, edit_keys=True)
    return Subject(model, images, f"ViT of 6 blocks, 64 wide, at 64 px, {count} images of noise")


@dataclass(frozen=True)
class Repeated:
    """The same images over and over, up to a number of them, without holding more of them."""

    images: Tensor
    count: int
    batch: int

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.count, self.batch):
            yield self.images[torch.arange(start, min(start + self.batch, self.count)) % len(self.images)]


def peaks(backbone: Path, dataset: Path, smallest: int) -> dict[str, list[float]]:
    """MiB beyond the model and one forward at 1, 4 and 16 times the images, of both searches."""
    found = {}
    for name in ("ours", "published"):
        found[name] = []
        for times in TIMES:
            command = [sys.executable, "-m", "benchmarks.identification", "--piece", name, str(smallest * times)]
            command += ["--backbone", str(backbone), "--dataset", str(dataset), "--images", str(smallest)]
            found[name].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"{name}: " + ", ".join(f"{n * smallest} images {mib:.0f} MiB" for n, mib in zip(TIMES, found[name])))  # noqa: B905
    return found


def peak_of(name: str, subject: Subject, count: int) -> float:
    """MiB of one search, in this process."""
    found = find_register_neurons(subject.model, subject.images[:8], layer=-2)  # libraries load and warm up here
    with torch.inference_mode():
        subject.model(subject.images[:1])
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, so that it is not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # Linux: from here on, the largest resident set counts anew
    before = status_kib("VmRSS")
    if name == "ours":
        find_register_neurons(subject.model, Repeated(subject.images, count, BATCH))
    else:
        detection = found.detection
        images = iter(Repeated(subject.images, count, 1))
        published_search(subject.model, images, count, detection.layer, detection.threshold)
    return (status_kib("VmHWM") - before) / 1024


def status_kib(key: str) -> int:
    """KiB of this process: now in memory (`VmRSS`), or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, default=BACKBONE, help="folder; of a backbone that has outliers")
    parser.add_argument("--dataset", type=Path, default=DATASET, help="folder of a data set with a train split")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--memory", type=int, metavar="IMAGES", help="also measure memory at 1, 4, 16 times as many, on Linux"
    )
    parser.add_argument("--out", type=Path, help="JSON; default: none")
    parser.add_argument("--piece", nargs=2, help=argparse.SUPPRESS)  # the process of one measurement
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    subject = built_or_noise(given.backbone, given.dataset, given.images)
    if given.piece:
        print(peak_of(given.piece[0], subject, int(given.piece[1])))
        return
    rows = ratios(subject, given.device, given.rounds)
    for row in rows:
        print(f"{row['name']}: {in_words(row)} times as fast (wanted {row['wanted']:g}); {row['detail']}")
    result = {"rows": rows}
    if given.memory:
        result["peak_mib"] = {"images": [given.memory * t for t in TIMES]}
        result["peak_mib"] |= peaks(given.backbone, given.dataset, given.memory)
    save(given.out, result)


if __name__ == "__main__":
    main()
