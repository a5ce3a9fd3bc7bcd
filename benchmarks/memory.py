"""Peak memory at 1, 4 and 16 times the images: `python -m benchmarks.memory [--only NAME …]`.

Each piece of a stage runs on synthetic data of n, 4 n and 16 n images in a process of its own, whose largest resident set
the system reports (`getrusage`). Memory is *flat* where 16 times the images take no more than 1.25 times the memory beyond
that of a process that has imported the library, plus what must be known of each image:

- 512 bytes where a data set is made: what is found of an image (path, class, split), in Python's objects, and its row;
- 256 bytes elsewhere: a row of a manifest in columns (about 100 bytes), and row numbers, labels, orders and scores, 8 bytes
  each (in evaluation one for each detector, seed and readout).

What a process frees goes back to the system at once, as the allocator's threshold for that is kept where it starts
(`MALLOC_MMAP_THRESHOLD_`): so the peak is that of what is held, not of the holes between it.

Evaluation has 1,000 classes, 3 seeds and 2 readouts, whose logits would be 24 KiB an image, and goes through them in
blocks that are full from the smallest size on. Training from features runs with memory for none of them
(`MEMORY_SHARE = 0`), the mode for sets that do not fit. Prints a table and writes JSON; with --only, the rows of the other pieces
stay in the file as they were.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from benchmarks.machine import describe
from regvit.data.batches import Batches, sample
from regvit.data.manifest import Dataset, Row, read_dataset
from regvit.data.sources import make_dataset
from regvit.data.transform import Transform
from regvit.features import stored_readouts as stored_module
from regvit.features.extraction import Options, extract
from regvit.features.store import ArraySpec, FeatureStore
from regvit.features.store_writer import StoreWriter
from regvit.features.stored_readouts import stored_readouts
from regvit.files import write_text
from regvit.measures import detectors
from regvit.measures.evaluation import confusion_table, paired_differences
from regvit.measures.evaluation import evaluate as evaluated
from regvit.measures.prediction import Measured, predict
from regvit.models.backbones import Backbone
from regvit.probing import heads, predictions, training
from regvit.probing import neighbours as neighbours_module
from regvit.probing.neighbours import Labelled, choose_neighbours
from regvit.probing.probes import (
    Baselines,
    Neighbours,
    Probe,
    ProbeSet,
    load_baselines,
    load_probes,
    save_baselines,
    save_probes,
)
from regvit.probing.splits import Split
from regvit.probing.training import Settings, train_probes
from regvit.registers.neurons import find_register_neurons
from regvit.stats.bootstrap import resample

TIMES = (1, 4, 16)
ALLOWED = 1.25
OF_MAKING, OF_ROWS = 512, 256  # bytes an image
CHANNELS, CLASSES, SIDE = 256, 4, 64
BLOCK = 1024
EVALUATED_CLASSES, EVALUATED_SEEDS, EVALUATED_READOUTS = 1000, 3, {"cls": 1, "cls_patch": 2}  # widths in tokens
NAMES = ("cls", "patch_mean", "cls_patch", "cls_noise")
MIB = 2**20
ENVIRONMENT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's at first, which it raises as it goes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "memory.json")
    parser.add_argument("--piece", nargs=2, help=argparse.SUPPRESS)  # the process of one measurement
    given = parser.parse_args()
    if given.piece:
        print(json.dumps(peak_of(given.piece[0], int(given.piece[1]))))
        return
    rows = [measured(name, given.scale) for name in given.only]
    print("| piece | images | MiB beyond the imports | bytes an image | allowed | |\n|---|---|---|---:|---:|---|")
    for row in rows:
        grown = ", ".join(f"{peak / MIB:.0f}" for peak in row["bytes"])
        print(f"| {row['piece']} | {', '.join(f'{n:,}' for n in row['images'])} | {grown} | "
              f"{row['bytes_per_image']:.0f} | {row['allowed_per_image']} | {'flat' if row['flat'] else 'GROWS'} |")  # fmt: skip
    given.out.write_text(json.dumps({"machine": describe(), "rows": merged(given.out, rows)}, indent=1) + "\n")


def merged(out: Path, rows: list[dict]) -> list[dict]:
    """The new rows and those of other pieces that the file has, in the order of the pieces."""
    found = {row["piece"]: row for row in (json.loads(out.read_text())["rows"] if out.is_file() else [])}
    found |= {row["piece"]: row for row in rows}
    return [found[piece] for piece in PIECES if piece in found]


def measured(piece: str, scale: float = 1.0) -> dict:
    """Peaks of one piece at each size, and whether they are flat."""
    images = [max(8, round(PIECES[piece][1] * scale)) * times for times in TIMES]
    peaks = []
    for n in images:
        command = [sys.executable, "-m", "benchmarks.memory", "--piece", piece, str(n)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent, env=ENVIRONMENT
        )
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    return row(piece, images, peaks)


def row(piece: str, images: list[int], peaks: list[int]) -> dict:
    """Peaks in bytes at each number of images, what they grow by for each image more, and whether that is flat."""
    more, allowed = images[-1] - images[0], PIECES[piece][2]
    flat = peaks[-1] <= ALLOWED * peaks[0] + allowed * more
    return {"piece": piece, "images": images, "bytes": peaks, "bytes_per_image": (peaks[-1] - peaks[0]) / more,
            "allowed_per_image": allowed, "flat": flat}  # fmt: skip


def peak_of(piece: str, n: int) -> int:
    """Bytes that a piece takes at most, beyond those of the process before; what it works on is made beforehand."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if piece in PREPARED:
            made = [
                sys.executable,
                "-c",
                f"from benchmarks.memory import *; PREPARED[{piece!r}](Path({folder!r}), {n})",
            ]
            subprocess.run(made, check=True, cwd=Path(__file__).parent.parent)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        PIECES[piece][0](Path(folder), n)
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


# --- what the pieces work on


def write_images(folder: Path, n: int) -> None:
    """Class folders of small JPEGs of noise; every 64th of them is drawn, the others are links to it."""
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        own = folder / "images" / f"class_{c}"
        own.mkdir(parents=True)
        for i in range(n // CLASSES):
            if i % 64 == 0:
                drawn = own / f"{i:07}.jpg"
                Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(drawn)
            else:
                (own / f"{i:07}.jpg").hardlink_to(drawn)


def write_dataset(folder: Path, n: int) -> None:
    """The images as a data set, as `download` leaves it."""
    write_images(folder, n)
    make_set(folder, n)


def write_store(folder: Path, n: int) -> None:
    """Features of n images."""
    rng = np.random.default_rng(0)
    arrays = dict.fromkeys(("cls", "patch_mean"), ArraySpec((CHANNELS,)))
    with StoreWriter(folder / "x.zarr", folder / "x.partial", n, arrays, {"run": "r"}, 256) as writer:
        for unit in writer.missing_units():
            start, stop = writer.layout.unit_rows(unit)
            writer.write(unit, {name: rng.normal(size=(stop - start, CHANNELS)) for name in arrays})
        writer.finish()


def write_probes(folder: Path, n: int) -> None:
    """Features, and probes with made-up weights: what they say costs what the sayings of trained ones do."""
    write_store(folder, n)
    rng, seeds = np.random.default_rng(0), tuple(range(EVALUATED_SEEDS))

    def probe(name: str, seed: int) -> Probe:
        weight = rng.normal(size=(EVALUATED_CLASSES, CHANNELS * EVALUATED_READOUTS[name])).astype(np.float32)
        return Probe(name, weight, np.zeros(EVALUATED_CLASSES, dtype=np.float32), 0, 0.1, seed)

    probes = {name: tuple(probe(name, seed) for seed in seeds) for name in EVALUATED_READOUTS}
    names, knn = tuple(class_names()), dict.fromkeys(EVALUATED_READOUTS, Neighbours(10, 0.07))
    save_probes(folder / "probes.safetensors", ProbeSet(probes, names, {}, n, 1))
    save_baselines(folder / "baselines.safetensors", Baselines({}, knn, names, n, 1))


def class_names() -> list[str]:
    return [f"c{c:03}" for c in range(EVALUATED_CLASSES)]


def splits(folder: Path, n: int) -> tuple[dict, dict, tuple[np.ndarray, np.ndarray]]:
    """Readouts of the train (nine tenths) and val images, and their labels."""
    rows, store = np.arange(n), FeatureStore.open(folder / "x.zarr")
    parts = rows[rows % 10 != 9], rows[rows % 10 == 9]
    train, val = (stored_readouts(store, NAMES, part) for part in parts)
    return train, val, tuple(part % CLASSES for part in parts)


def backbone() -> Backbone:
    """timm's smallest, with random weights."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=SIDE, num_classes=0).eval().requires_grad_(False)
    return Backbone("tiny", model, Transform(SIDE, (0.5,) * 3, (0.5,) * 3), "0" * 64, None, {})


# --- the pieces


def make_set(folder: Path, n: int) -> None:
    make_dataset(f"folder:{folder / 'images'}", "set", folder / "set", folder, 0, show_progress=False)


def identify(folder: Path, n: int) -> None:
    tiny, images = backbone(), sample(read_dataset(folder / "set"), "train", n, 0)
    find_register_neurons(tiny.model, Batches(images, tiny.transform, 16, 0, "cpu", ""))


def extract_set(folder: Path, n: int) -> None:
    extract(folder / "x.zarr", backbone(), read_dataset(folder / "set"), options=Options(batch_size=16))


def probe(folder: Path, n: int) -> None:
    """Validation goes in blocks that are full at the smallest size already, as in `evaluate`."""
    heads.AT_ONCE, training.MEMORY_SHARE = BLOCK * CHANNELS, 0
    train, val, labels = splits(folder, n)
    settings = Settings((0.01, 0.1), 60, 128, seeds=(0, 1))
    train_probes(Split(train, labels[0]), Split(val, labels[1]), list("abcd"), settings)


def neighbours(folder: Path, n: int) -> None:
    train, val, labels = splits(folder, n)
    learn, choose = Labelled(train["cls_patch"], labels[0]), Labelled(val["cls_patch"][:200], labels[1][:200])
    choose_neighbours(learn, choose, CLASSES)


def evaluate(folder: Path, n: int) -> None:
    """Detectors fitted on half; all of them and the neighbours applied to the others; saved, opened and counted.

    What is bounded by constants of the library (blocks of images and of logits, blocks and samples of detectors) is
    bounded by smaller ones: full at the smallest size already, so that what grows is what an image more takes.
    """
    stored_module.ROWS_AT_ONCE = BLOCK
    neighbours_module.TEST_ROWS_A_PASS = neighbours_module.TRAIN_ROWS = BLOCK
    detectors.CLIP_VALUES = detectors.CELLS_AT_ONCE = BLOCK * CHANNELS * 2
    predictions.LOGITS_AT_ONCE = BLOCK * EVALUATED_CLASSES
    names = class_names()
    rows = tuple(Row(f"{i:07}", f"{i:07}.jpg", names[i % EVALUATED_CLASSES],
                     "test" if i // EVALUATED_CLASSES % 2 else "train") for i in range(n))  # fmt: skip
    home = Measured(Dataset("home", folder, tuple(names), rows, "0" * 64), "id", FeatureStore.open(folder / "x.zarr"))
    asked = detectors.Detectors(("msp", "knn", "relative_mahalanobis", "vim", "react"))
    classifiers = load_probes(folder / "probes.safetensors"), load_baselines(folder / "baselines.safetensors")
    made = predict("r", *classifiers, {"home": home}, asked, folder / "predictions.zarr")
    evaluated(made)
    paired_differences(made, made.readouts[-1], made, made.readouts[0])
    write_text(folder / "confusion.csv", confusion_table(made).to_csv(index=False))


def bootstrap(folder: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    resample(rng.normal(size=(1, n // 2)), rng.normal(1, size=(1, n - n // 2)), 200)


# What each works on is made by another process, as its memory would count.
PREPARED = {"download": write_images, "identify": write_dataset, "extract": write_dataset, "probe": write_store,
            "neighbours": write_store, "evaluate": write_probes}  # fmt: skip
PIECES: dict[str, tuple[Callable[[Path, int], None], int, int]] = {  # the work, the fewest images, bytes for each more
    "download": (make_set, 4096, OF_MAKING),
    "identify": (identify, 4096, OF_ROWS),
    "extract": (extract_set, 512, OF_ROWS),
    "probe": (probe, 8192, OF_ROWS),
    "neighbours": (neighbours, 16384, OF_ROWS),
    "evaluate": (evaluate, 4096, OF_ROWS),
    "bootstrap": (bootstrap, 16384, OF_ROWS),
}


if __name__ == "__main__":
    main()
