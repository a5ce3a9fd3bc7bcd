"""Extraction against the bare forward that bounds it: `python -m benchmarks.extraction`.

The bare forward takes batches that lie in memory, normalised, on the device; extraction takes image files and leaves a
feature store. Both run in turn in one process with the same model, precision and batch, so that a loaded machine slows
both alike. On a CPU the ratio is of CPU seconds: what extraction spends on decoding, copying and writing, which other
cores could take over. On a GPU it is of throughput, which decoding must keep up with; there it also gives images a second
and the share of the GPU's peak that the products of the model make.

Beside it, what the ways to decode cost and change (pixels in levels of 255, features by their cosine), and what memory
grows by for each image more. Prints a line a round; `--out` writes JSON.

    python -m benchmarks.extraction --device cuda --model vit_large_patch14_dinov2 --precision bfloat16 --images 16384

The model has random weights, which cost what trained ones do; `--backbone data/backbones/focus_planted` takes real ones.
The images are made up, 500 by 375 pixels, the size of ImageNet's; `--files folder` takes real ones, again and again.
"""

import argparse
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import ROUNDS, describe, in_turn, in_words, save
from regvit.data.manifest import Dataset, Row, read_dataset, write_dataset
from regvit.data.transform import RESIZINGS, Transform
from regvit.features.extraction import Options, extract
from regvit.features.forward import Forward, Readouts
from regvit.models.arithmetic import PRECISIONS, arithmetic
from regvit.models.backbones import Backbone, load_backbone

WANTED = {"cpu": 0.95, "cuda": 0.95}
IMAGES = {"cpu": 96, "cuda": 8192}  # of the table of all benchmarks: some seconds of work
PEAK = 989e12  # dense bfloat16 products of an H100 or H200, operations a second, by its data sheet
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIFFERENT = 256  # files of different content; more images are copies of them
SUFFIXES = (".jpg", ".jpeg", ".png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="in timm; random weights")
    parser.add_argument("--backbone", type=Path, help="folder of a backbone, instead of --model")
    parser.add_argument("--size", type=int, default=224, help="side of the input, pixels")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, help="default: extraction's own")
    parser.add_argument("--workers", type=int, help="decoding threads; default: 0 on a CPU, a thread a core on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--resizing", default="pillow", choices=RESIZINGS)
    parser.add_argument("--files", type=Path, help="folder of images to take")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peak", type=float, default=PEAK, help="of the GPU, operations a second")
    parser.add_argument("--out", type=Path, help="JSON; default: none")
    given = parser.parse_args()
    result = run(given, say=print)
    save(given.out, result)
    row = result["rows"][0]
    print(f"extraction has {in_words(row)} of the bare forward's {result['of']} (wanted {row['wanted']:g})")


def measure(quick: bool = False) -> list[dict]:
    """The ratios for the table of all benchmarks, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = argparse.Namespace(
        model="vit_small_patch14_dinov2", backbone=None, size=224, precision="float32", device=device, batch_size=None,
        workers=None, threads=1, resizing="pillow", files=None,
        images=32 if quick else IMAGES[device], rounds=1 if quick else ROUNDS, peak=PEAK,
    )  # fmt: skip
    return run(given, say=lambda line: None)["rows"]


def run(given: argparse.Namespace, say: Callable[[str], None]) -> dict:
    """All measurements, as `main` writes them; torch has as many threads afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        return measurements(given, say) | {"machine": describe()}
    finally:
        torch.set_num_threads(before)


def measurements(given: argparse.Namespace, say: Callable[[str], None]) -> dict:
    """The same, with the threads that are set."""
    device = torch.device(given.device)
    gpu = device.type == "cuda"
    workers = given.workers if given.workers is not None else len(os.sched_getaffinity(0)) if gpu else 0
    backbone = backbone_of(given)
    with tempfile.TemporaryDirectory() as folder:
        dataset = files_of(Path(folder), given)
        readouts = Forward(backbone, Readouts(), given.precision).to(device)
        batch_size = given.batch_size or readouts.batch_size(device)
        batches = decoded(backbone, dataset, batch_size, device)
        forward = backbone.model.forward_features
        options = Options(given.device, batch_size, workers)
        say("extraction and bare forward, after one round that is not counted")
        times = in_turn(
            lambda: stored(backbone, dataset, Path(folder) / "store", given.precision, options),
            lambda: bare(forward, batches, given.precision),
            given.rounds,
            device,
            say,
        )
        of = "throughput" if gpu else "CPU seconds"
        what = f"{given.model} at {given.size}, {given.precision}, {given.images:,} files"
        detail = f"{what}, on {device}, {of}, {given.threads} thread{'s' if given.threads > 1 else ''}"
        ways, decoding_row = decoding(backbone, dataset, given)
        result = {
            "rows": [times.row("extraction / bare forward", WANTED[device.type], detail), decoding_row],
            "of": of,
            "batch_size": batch_size,
            "workers": workers,
            "extraction_s": times.first,
            "bare_s": times.second,
            "decoding": ways,
            "memory": memory(dataset) if not gpu else gpu_memory(device, batch_size),
        }
    if gpu:
        rate = len(dataset) / statistics.median(times.first)
        flops = operations(backbone, given.precision, device)
        result |= {"images_per_s": rate, "operations_per_image": flops, "share_of_peak": rate * flops / given.peak}
        say(
            f"{rate:.0f} images a second, {100 * result['share_of_peak']:.0f} % of {given.peak:.3g} operations a second"
        )
    for name, row in result["decoding"].items():
        say(f"resized by {name}: {row['images_per_cpu_s']:.0f} images a CPU second, at most {row['largest_difference']} "
            f"levels from timm's transform in {100 * row['share_of_values']:.2f} % of the values, features to a cosine of "
            f"{row['least_cosine']:.7f}")  # fmt: skip
    result["settings"] = {
        key: value.name if isinstance(value, Path) else value for key, value in vars(given).items() if key != "out"
    }
    return result


def backbone_of(given: argparse.Namespace) -> Backbone:
    """The backbone asked for, or a model of random weights, with timm's evaluation transform of ImageNet."""
    if given.backbone is not None:
        backbone = load_backbone(given.backbone)
        return replace(backbone, transform=replace(backbone.transform, resizing=given.resizing))
    torch.manual_seed(0)
    model = (
        timm.create_model(given.model, pretrained=False, num_classes=0, img_size=given.size)
        .eval()
        .requires_grad_(False)
    )
    transform = Transform(given.size, MEAN, STD, "bicubic", 0.875, given.resizing)
    return Backbone(given.model, model, transform, "random", None, {"architecture": given.model})


def files_of(folder: Path, given: argparse.Namespace) -> Dataset:
    """A data set of copies of the files given, or of made-up photographs: coloured blobs of all sizes, and grain."""
    (folder / "images").mkdir()
    if given.files is None:
        rng = np.random.default_rng(0)
        originals = [folder / f"{i}.jpg" for i in range(min(given.images, DIFFERENT))]
        for file in originals:
            pixels = sum(
                np.asarray(Image.fromarray(rng.normal(0, 40, (side, side)).astype(np.float32)).resize((500, 375), Image.Resampling.BICUBIC))[..., None]
                * rng.normal(0.6, 0.3, 3)
                for side in (3, 7, 19, 53, 141)
            )  # fmt: skip
            noisy = (pixels + rng.normal(128, 6, (375, 500, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(file, quality=90)
    else:
        originals = sorted(file for file in given.files.rglob("*") if file.suffix.lower() in SUFFIXES)[:DIFFERENT]
        if not originals:
            raise SystemExit(f"{given.files} holds no {', '.join(SUFFIXES)}")
    rows = []
    for i in range(given.images):
        original = originals[i % len(originals)]
        path = f"images/{i:07}{original.suffix.lower()}"
        shutil.copyfile(original, folder / path)
        rows.append(Row(f"{i:07}", path, "", "val" if i < 2 else "test"))
    write_dataset(folder, "benchmark", rows, (), {})
    return read_dataset(folder)


def decoded(backbone: Backbone, dataset: Dataset, batch_size: int, device: torch.device) -> list[torch.Tensor]:
    """As many batches as the data set has, normalised on the device; at most four different ones, to save memory."""
    different = []
    for start in range(0, min(len(dataset), 4 * batch_size), batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        images = torch.stack([backbone.transform.load(dataset.image_path(i)) for i in rows])
        different.append(backbone.transform.normalise(images.to(device)))
    whole = [different[i % len(different)] for i in range(len(dataset) // batch_size)]
    rest = len(dataset) % batch_size
    return whole + ([different[0][:rest]] if rest else [])


@torch.inference_mode()
def bare(forward: Callable, batches: list[torch.Tensor], precision: str) -> None:
    """The forward and nothing else."""
    with arithmetic(precision, batches[0].device):
        for batch in batches:
            forward(batch)


def stored(backbone: Backbone, dataset: Dataset, folder: Path, precision: str, options: Options) -> None:
    """Extraction into a store that is deleted afterwards."""
    extract(folder / "x.zarr", backbone, dataset, precision=precision, options=options)
    shutil.rmtree(folder)


def decoding(backbone: Backbone, dataset: Dataset, given: argparse.Namespace) -> tuple[dict[str, dict], dict]:
    """Each way to resize: its speed, and its pixels and features against those of timm's own transform; and the row of
    the table, torch's way against Pillow's."""
    n = min(len(dataset), 64)
    paths = [dataset.image_path(i) for i in range(n)]
    transform = backbone.transform
    reference = create_transform(
        (3, transform.size, transform.size), interpolation=transform.interpolation, mean=transform.mean,
        std=transform.std, crop_pct=transform.crop_pct, normalize=False,
    )  # fmt: skip
    wanted = torch.stack([reference(Image.open(path).convert("RGB")) for path in paths]).to(torch.uint8).int()
    ways = {name: replace(backbone, transform=replace(transform, resizing=name)) for name in ("torch", "pillow")}
    loads = [partial(load, way.transform, paths) for way in ways.values()]
    times = in_turn(*loads, given.rounds)
    table, features, few = {}, {}, min(8, n)
    for (name, way), pixels, seconds in zip(
        ways.items(), [work() for work in loads], (times.first, times.second), strict=True
    ):
        forward = Forward(way, Readouts(), given.precision).to(given.device)
        found = forward.unrounded(pixels[:few].to(torch.uint8).to(given.device))
        features[name] = np.concatenate([rows.reshape(few, -1).cpu() for rows in found.values()], axis=1)
        table[name] = {
            "images_per_cpu_s": n / statistics.median(seconds),
            "largest_difference": int((pixels - wanted).abs().max()),
            "share_of_values": float((pixels != wanted).float().mean()),
        }
    for name, row in table.items():
        row["least_cosine"] = float(cosines(features[name], features["pillow"]).min())
    found = table["torch"]
    levels = f"at most {found['largest_difference']} of 255 levels off"
    detail = f"{levels}, features to a cosine of {found['least_cosine']:.6f}"
    return table, times.row("decoding, resized by torch / by Pillow", 1.0, detail)


def load(transform: Transform, paths: list[Path]) -> torch.Tensor:
    """Pixels of the files as whole numbers, (b, 3, s, s)."""
    return torch.stack([transform.load(path) for path in paths]).int()


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of each row of the one with that of the other, in float64."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def memory(dataset: Dataset) -> dict:
    """Peak memory of a process that extracts so many images, for 1, 4 and 16 times as many (MiB), with a tiny model."""
    counts = [len(dataset), 4 * len(dataset), 16 * len(dataset)]
    peaks = {}
    for count in counts:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own: peaks never fall
            peaks[count] = pool.apply(peak_of, (str(dataset.image_path(0)), count))
    growth = (peaks[counts[2]] - peaks[counts[1]]) / (counts[2] - counts[1])
    return {"peak_mib": peaks, "kib_per_image_more": 1024 * growth}


def peak_of(image: str, count: int) -> float:
    """Extracts one file `count` times in this process; its peak memory in MiB."""
    torch.set_num_threads(1)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32).eval().requires_grad_(False)
    backbone = Backbone("test_vit", model, Transform(32, MEAN, STD), "random", None, {})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        rows = []
        for i in range(count):
            os.symlink(image, root / f"images/{i:07}.jpg")
            rows.append(Row(f"{i:07}", f"images/{i:07}.jpg", "", "test"))
        write_dataset(root, "benchmark", rows, (), {})
        dataset = read_dataset(root)
        extract(root / "x.zarr", backbone, dataset)
    return peak_mib()


def peak_mib() -> float:
    """Largest memory of this process so far. On Linux `ru_maxrss` would count what its parent had before."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def gpu_memory(device: torch.device, batch_size: int) -> dict:
    """Peak memory of the GPU in this process, model and batches in flight together (MiB)."""
    return {"peak_mib": torch.cuda.max_memory_allocated(device) / 2**20, "batch_size": batch_size}


def operations(backbone: Backbone, precision: str, device: torch.device) -> int:
    """Floating-point operations of the products of one image's forward; a multiplication and an addition are two."""
    image = torch.zeros(1, 3, backbone.transform.size, backbone.transform.size, device=device)
    with FlopCounterMode(display=False) as counter:
        bare(backbone.model.to(device).forward_features, [image], precision)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
