"""Extraction: images through a backbone into a feature store, one forward an image.

    decode (threads) -> uint8 -> device -> normalise -> forward -> float16 -> units -> chunks on the disk (threads)

All of these go on at the same time: batches are decoded ahead (on a GPU into pinned memory), a GPU is told of the next ones
before the last is waited for, and units are written while the next is computed. One stream does on a GPU: copying a batch
to it takes some hundredths of its forward. `extract` stores readouts, `fill_store` whatever a function makes of a batch.

A unit is the same bits wherever it is computed, given the same kind of device and batch size: batches end where units end,
so that an image shares its batch with the same images whether or not there was an interruption.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from regvit.data.manifest import Dataset
from regvit.data.prefetch import in_order
from regvit.features.forward import ARRAYS, Forward, Readouts
from regvit.features.store import FeatureStore, InvalidStore, fingerprint
from regvit.features.store_writer import StoreWriter, UnstorableFeature
from regvit.models.arithmetic import arithmetic
from regvit.models.backbones import Backbone
from regvit.models.nan_check import BadFeatures, where_it_begins

# Computed and on their way to the disk, each on a thread of its own: where the disk is waited for, others go on. They are
# what writing holds in memory.
UNITS_IN_FLIGHT = 4
BATCHES_AHEAD = 2  # of what is waited for, on a GPU and in decoding
FOREIGN_BATCH = 32  # images a forward on GPUs that are not seen from here


@dataclass(frozen=True)
class Job:
    """How any rows of a data set are computed; it can be sent to another process.

    Attributes:
        batch_size: images a forward.
        workers: decoding threads, which run ahead of the forward; 0 decodes in between.
    """

    forward: Forward
    dataset: Dataset
    batch_size: int
    workers: int = 0

    def units(
        self,
        spans: Sequence[tuple[int, int]],
        device: torch.device | str = "cpu",
        advance: Callable[[int], object] = lambda images: None,
    ) -> Iterator[dict[str, Shaped[np.ndarray, "b ..."]]]:
        """The arrays of several units, in the order in which they are given; the next is under way meanwhile.

        Args:
            spans: first row of a unit, and the row after its last.
            advance: is told how many images more are done.
        Raises:
            UnreadableImage, ChangedImage: see `Transform.load`.
            torch.OutOfMemoryError: the device has no room for a batch.
        """
        units = [
            [(first, min(first + self.batch_size, stop)) for first in range(start, stop, self.batch_size)]
            for start, stop in spans
        ]
        with closing(self._computed([batch for unit in units for batch in unit], torch.device(device))) as computed:
            for unit in units:
                parts = []
                for first, last in unit:
                    parts.append(next(computed))
                    advance(last - first)
                yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _computed(
        self, batches: Sequence[tuple[int, int]], device: torch.device
    ) -> Iterator[dict[str, Shaped[np.ndarray, "b ..."]]]:
        """The arrays of each batch, in order; a GPU is told of BATCHES_AHEAD more before one is waited for."""
        forward, gpu = self.forward.to(device), device.type == "cuda"
        under_way: deque[Callable[[], dict]] = deque()
        with closing(self._decoded(batches, pinned=gpu)) as decoded:
            for images in decoded:
                under_way.append(_to_host(forward(images.to(device, non_blocking=gpu)), device))
                if len(under_way) > BATCHES_AHEAD * gpu:
                    yield under_way.popleft()()
            for arrived in under_way:
                yield arrived()

    def _decoded(self, batches: Sequence[tuple[int, int]], pinned: bool) -> Iterator[UInt8[Tensor, "b 3 s s"]]:
        """Decoded batches in order, some of them ahead."""
        side = self.forward.backbone.transform.size
        buffers: deque[UInt8[Tensor, "b 3 s s"]] = deque()

        def places() -> Iterator[tuple[int, UInt8[np.ndarray, "3 s s"]]]:
            """Each row, and where to put its pixels."""
            for first, last in batches:
                buffers.append(torch.empty((last - first, 3, side, side), dtype=torch.uint8, pin_memory=pinned))
                yield from zip(range(first, last), buffers[-1].numpy(), strict=True)

        with closing(in_order(self._decode, places(), self.workers, BATCHES_AHEAD * self.batch_size)) as decoded:
            for first, last in batches:
                deque(islice(decoded, last - first), maxlen=0)
                yield buffers.popleft()

    def _decode(self, place: tuple[int, UInt8[np.ndarray, "3 s s"]]) -> None:
        row, pixels = place
        sha256 = self.dataset.rows[row].sha256  # the files of a set that is read in place may have changed
        np.copyto(pixels, self.forward.backbone.transform.pixels(self.dataset.image_path(row), sha256))


def _to_host(arrays: Mapping[str, Tensor], device: torch.device) -> Callable[[], dict[str, np.ndarray]]:
    """Begins to copy arrays from their device; what comes back waits for it."""
    host = {name: values.to("cpu", non_blocking=True) for name, values in arrays.items()}
    copied = None
    if device.type == "cuda":
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(device))

    def arrived() -> dict[str, np.ndarray]:
        if copied is not None:
            copied.synchronize()
        return {name: values.numpy() for name, values in host.items()}

    return arrived


class Engine(Protocol):
    """Who has the missing units of a store computed elsewhere: see `ray_engine`."""

    def fill(self, job: Job, writer: StoreWriter, advance: Callable[[int], object]) -> None:
        """Has every missing unit computed and recorded; `advance` is told how many images more are done."""
        ...


@dataclass(frozen=True)
class Options:
    """Where and how fast a store is filled: changes no feature beyond its last bits.

    Attributes:
        device: `cpu`, `cuda`, `cuda:1`; with an engine the kind that it computes on.
        batch_size: images a forward; None: 8 on a CPU, as many as fit on a GPU (`Forward.batch_size`).
        workers: decoding threads; 0 decodes in between.
        engine: computes the units elsewhere; None does so here.
        work: folder for unfinished stores, on the file system of the finished ones; None: beside them.
        label: of the progress bar; None is silent.
    Raises:
        ValueError: a number is out of range.
    """

    device: str = "cpu"
    batch_size: int | None = None
    workers: int = 0
    engine: Engine | None = None
    work: Path | None = None
    label: str | None = None

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("workers", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")


def extract(
    path: Path | str,
    backbone: Backbone,
    dataset: Dataset,
    run: Mapping | None = None,
    precision: str = "float32",
    arrays: Iterable[str] = ARRAYS,
    options: Options = Options(),
) -> FeatureStore:
    """Stores CLS, registers and mean of patches of every image of a data set. See `fill_store`.

    Args:
        run: plain values that describe the run, kept in the store's attributes.
        arrays: what to store, see `forward`; what the model does not have is left out.
    """
    return fill_store(path, dataset, Forward(backbone, Readouts(tuple(arrays)), precision), run or {}, options)


def fill_store(
    path: Path | str,
    dataset: Dataset,
    forward: Forward,
    attributes: Mapping,
    options: Options = Options(),
    rows_per_unit: int | None = None,
) -> FeatureStore:
    """Fills a feature store with what a forward makes of a data set's images, or goes on with an interrupted one.

    The store is the same, byte for byte, whether or not there was an interruption. What an interrupted extraction left is
    only gone on with by the same code, libraries, kind of device and batch size, and begun anew otherwise. A finished
    store of the same attributes is opened as it is.

    Args:
        path: of the store, `….zarr`.
        attributes: plain JSON values that say what made it, besides those of `describe`.
        rows_per_unit: see `StoreWriter`.
    Raises:
        ValueError: the data set is empty, or see `Forward.compute`.
        BadFeatures: an image gives NaN, infinity, or a value beyond float16; where it is no number, the layer where that
            begins is named.
        FileExistsError: there is a store, or something else, of other attributes.
        FolderLocked: another process is at it.
        UnreadableImage, ChangedImage, torch.OutOfMemoryError: see `Job.units`.
        KeyboardInterrupt: passed on; finished units are safe, and calling again goes on from there.
    """
    path, device = Path(path), torch.device(options.device)
    here = device if options.engine is None else torch.device("cpu")
    attributes = describe(forward, dataset) | dict(attributes)
    partial = _working_folder(path, attributes, options.work)
    arrays = forward.arrays(here)
    batch_size = options.batch_size or (FOREIGN_BATCH if here != device else forward.batch_size(here))
    key = _resume_key(device, batch_size, options.engine)
    writer = StoreWriter(path, partial, len(dataset), arrays, attributes, rows_per_unit, key)
    if (finished := _finished(writer, dataset)) is not None:
        return finished
    job = Job(forward, dataset, batch_size, options.workers)
    with writer, tqdm(total=len(dataset), desc=options.label, unit="image", disable=options.label is None) as bar:
        if writer.note and options.label is not None:
            bar.write(writer.note, file=sys.stderr)
        missing = sum(stop - start for start, stop in map(writer.layout.unit_rows, writer.missing_units()))
        bar.update(len(dataset) - missing)
        bar.unpause()  # the rate is of this run
        try:
            if options.engine is None:
                _fill_here(job, writer, device, bar.update)
            else:
                options.engine.fill(job, writer, bar.update)
        except UnstorableFeature as error:
            raise BadFeatures(_explained(forward, dataset, error, here)) from error
        except KeyboardInterrupt:
            if options.label is not None:
                done = f"{len(writer.done)} of {writer.layout.units} units are safe in {partial}"
                bar.write(f"interrupted: {done}; run the same again to go on from there", file=sys.stderr)
            raise
        writer.finish()
    return FeatureStore.open(path, dataset.digest)


def describe(forward: Forward, dataset: Dataset) -> dict:
    """Attributes of every store: what decides the features, but for a run's registers and what is made of a forward."""
    backbone = forward.backbone
    return {
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        **{key: backbone.info[key] for key in ("architecture", "model_args") if key in backbone.info},
        "transform": backbone.transform.to_dict(),
        "precision": forward.precision,
        "dataset": dataset.name,
        "manifest_sha256": dataset.digest,
    }


def _fill_here(job: Job, writer: StoreWriter, device: torch.device, advance: Callable[[int], object]) -> None:
    """Computes here, and writes on threads; an interruption lets the units in flight get to the disk."""
    missing = writer.missing_units()
    units = job.units([writer.layout.unit_rows(unit) for unit in missing], device, advance)
    in_flight: deque[Future] = deque()
    with ThreadPoolExecutor(UNITS_IN_FLIGHT, thread_name_prefix="store") as pool, closing(units):
        for number, arrays in zip(missing, units, strict=True):
            if len(in_flight) == UNITS_IN_FLIGHT:
                in_flight.popleft().result()
            in_flight.append(pool.submit(writer.write, number, arrays))
        for write in in_flight:
            write.result()


def _working_folder(path: Path, attributes: Mapping, work: Path | None) -> Path:
    """One for each set of attributes, so that queued experiments with other parameters are not in each other's way."""
    if work is None:
        return path.with_name(f"{path.name}.partial")
    name = "-".join(path.with_suffix("").parts[-3:]).replace(os.sep, "")
    return work / f"{name}-{fingerprint(attributes)[:12]}.partial"


def _finished(writer: StoreWriter, dataset: Dataset) -> FeatureStore | None:
    """The very store that is to be made, where a process was killed after it had finished it."""
    try:
        store = FeatureStore.open(writer.final, dataset.digest)
    except (FileNotFoundError, InvalidStore):
        return None  # the writer refuses to write over what is there
    if store.attributes != writer.attributes | {"complete": True} or store.layout != writer.layout:
        return None
    shutil.rmtree(writer.partial, ignore_errors=True)
    return store


def _explained(forward: Forward, dataset: Dataset, error: UnstorableFeature, device: torch.device) -> str:
    """What is wrong with an image, from a forward of it alone."""
    row, transform = dataset.rows[error.row], forward.backbone.transform
    image = transform.load(dataset.image_path(error.row), row.sha256)[None].to(device)
    values = forward.unrounded(image)[error.array].float()
    if values.isfinite().all():
        what = f"{values[values.abs() == values.abs().max()][0].item():g} is beyond float16 (±65504)"
        cure = "check the weights: features are kept in float16, whatever precision they are computed in"
    else:
        with arithmetic(forward.precision, device):
            where = where_it_begins(forward.backbone.model, transform.normalise(image))
        what = f"{values[~values.isfinite()][0].item():g} is not a finite number; {where}"
        exact = forward.precision.startswith("float32")
        cure = "check the weights" if exact else f"set extract.precision to float32 instead of {forward.precision}"
    return (
        f"image {row.image_id!r} ({row.path}): array {error.array!r}, row {error.row}: {what}; take the image out of the "
        f"data set, or {cure}"
    )


def _resume_key(device: torch.device, batch_size: int, engine: Engine | None) -> dict:
    """What decides features, or their last bits, and is not in the attributes: digest of our own code that is loaded,
    library versions, kind of device and batch size."""
    made_with = software()
    code = {name: digest for name, digest in made_with.items() if name.startswith("regvit")}
    key = {name: found for name, found in made_with.items() if name not in code}
    key |= {"code_sha256": fingerprint(code), "device": device.type, "batch_size": batch_size}
    if device.type == "cuda" and engine is None:  # of others the engine keeps account
        key["gpu"] = torch.cuda.get_device_name(device)
    return key


def software() -> dict[str, str]:
    """What must be the same for the same bits: our modules that are loaded, by the SHA-256 of their code, and the versions
    of the libraries that compute."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "regvit"}
    files = {name: module.__file__ for name, module in ours.items() if getattr(module, "__file__", None)}
    code = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items()}
    return code | {name: version(name) for name in ("torch", "timm", "pillow", "numpy")}
