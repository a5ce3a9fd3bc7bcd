"""Extraction: images through a backbone into a feature store, one forward an image.

    images -> units of features (`extractor`) -> float16 chunks on the disk (writer threads)

`extract` fills a store in this process, or has an engine do so on others; both compute with an `Extractor`, and write
while it computes. What is stored of an image stands in `forward`.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial as with_arguments
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch

from regvit.data.manifest import Dataset
from regvit.data.progress import progress as Progress
from regvit.features.batch_size import default_batch_size, find_batch_size, has_own_memory, room_on
from regvit.features.bucket_writer import store_writer
from regvit.features.extractor import Extractor, check_numbers
from regvit.features.forward import ARRAYS, row_shapes
from regvit.features.storage import place_of
from regvit.features.store import image_ids_digest
from regvit.features.store_layout import UnstorableFeature, default_rows_per_unit
from regvit.features.store_writer import StoreWriter
from regvit.models.arithmetic import arithmetic, check_precision
from regvit.models.backbones import Backbone
from regvit.models.nan_check import BadFeatures, where_it_begins

# Computed and on their way to the disk, each on a thread of its own: where the disk is waited for, others go on. A unit of
# 32 x 256 x 1024 values took 19 ms on one thread and 18 ms on four on two idle cores, 65 and 27 ms beside other jobs (medians
# of four), where a fast GPU computes one in 15. They are what writing holds in memory: 6 bytes a value, 0.2 GB in all.
UNITS_IN_FLIGHT = 4
# torch.compile takes about a minute and saves some 0.1 ms of a ViT-L image on a fast GPU: about as many images must come
# before it pays. On a CPU it gains nothing (measured: 2 %).
COMPILED_FROM = 500_000


class Engine(Protocol):
    """Who has the missing units of a store computed: this process, or others."""

    def fill(self, make: Callable[..., Extractor], writer: StoreWriter, advance: Callable[[int], None]) -> None:
        """Computes every missing unit and has it written; on return none is missing.

        Args:
            make: `make(device=…)` gives the extractor; it can be pickled.
            writer: open; `writer.missing_units()` says what to do.
            advance: is told how many images more are done.
        """
        ...


@dataclass(frozen=True)
class InProcess:
    """The engine that computes here, on one device, and writes on threads of their own."""

    device: torch.device | str = "cpu"

    def fill(self, make: Callable[..., Extractor], writer: StoreWriter, advance: Callable[[int], None]) -> None:
        """See `Engine`; an interruption lets the units in flight get to the disk."""
        missing = writer.missing_units()
        units = make(device=self.device).units(map(writer.unit_rows, missing), advance)
        in_flight: deque[Future] = deque()
        pool = ThreadPoolExecutor(UNITS_IN_FLIGHT, thread_name_prefix="store")
        with pool, closing(units):  # leaving waits for the disk
            for number, unit in zip(missing, units, strict=True):
                if len(in_flight) == UNITS_IN_FLIGHT:
                    in_flight.popleft().result()
                in_flight.append(pool.submit(writer.write, number, unit.arrays))
            for write in in_flight:
                write.result()


def describe(backbone: Backbone, dataset: Dataset, precision: str) -> dict:
    """Attributes of the store that `extract` makes: what decides the features, but for a run's registers.

    Raises:
        ValueError: the precision is unknown.
    """
    check_precision(precision)
    return {
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        **{key: backbone.info[key] for key in ("architecture", "model_args") if key in backbone.info},
        "transform": backbone.transform.to_dict(),
        "precision": precision,
        "dataset": dataset.name,
        "manifest_sha256": dataset.digest,
        "image_ids_sha256": image_ids_digest(dataset.rows.column("image_id")),
    }


def extract(
    backbone: Backbone,
    dataset: Dataset,
    final: Path | str,
    partial: Path | str | None,
    attributes: Mapping,
    precision: str = "float32",
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    workers: int = 0,
    rows_per_unit: int | None = None,
    progress: Progress | None = None,
    arrays: Sequence[str] = ARRAYS,
    compile: bool | None = False,
    engine: Engine | None = None,
    storage_options: Mapping | None = None,
) -> None:
    """Extracts the features of a data set, or what an interrupted extraction left to do, into a feature store.

    Batches end where units end, so that an image shares its batch with the same images whether or not there was an
    interruption; the finished store is then the same, byte for byte. On a CPU another batch size or number of threads
    may move a float32 in its last bits (measured: 1e-6 for a tiny model on two threads, nothing for a ViT-S). On a GPU
    they choose other kernels, as do another GPU and `compile`, and features differ within the precision's rounding: so
    what an interrupted extraction left is only gone on with by the same of them, and begun anew otherwise. A store has
    one batch size: where none is given, it is that of the unfinished store that is gone on with, else found before the
    first unit, and never changed on the way.

    Args:
        backbone: with its test-time registers in place; its model is moved to `device`.
        final, partial, rows_per_unit, storage_options: of the store, in a folder or on object storage; see
            `store_writer`.
        attributes: of the store: those of `describe` and what describes the run.
        precision: see `regvit.models.arithmetic`; it is part of what makes the features.
        device, batch_size, workers: where and how fast; images per forward (lowered to a divisor of the rows of a
            unit), and decoding threads, which run ahead of the forward (0 decodes in between). `batch_size` None is
            `default_batch_size`: on a GPU here for its free memory, and halved until a blank batch fits; with an engine
            of the model's size alone, as the memory of others is not seen from here.
        progress: is told of every image, and of what was resumed; None is silent.
        arrays: what to store, see `readouts`; what the model does not have is left out.
        compile: whether to run the model under torch.compile; None does so on a GPU from 500,000 images on, if a blank
            batch shows that it works here. Where there is no GPU here to try it on, others do without it too.
        engine: has the units computed elsewhere; `device` is then the kind that it computes on. None computes here.
    Raises:
        ValueError: the precision or an array is unknown, the model has none of the arrays, the data set is empty, or the
            model returns no token sequence.
        BadFeatures: an image gives NaN, infinity, or a value beyond float16; where it is no number, the layer where that
            begins is named.
        CannotCompile: torch.compile was asked for and fails.
        torch.OutOfMemoryError: the device has no room for a batch of the size that was given, of the unfinished store, or
            of a single image; or no more, as another program took it meanwhile.
        UnreadableImage, ChangedImage, FileExistsError, FolderLocked: see `Transform.load` and `store_writer`.
        KeyboardInterrupt: passed on; finished units stay in `partial`, and calling again goes on from there.
    """
    check_precision(precision)
    check_numbers(1 if batch_size is None else batch_size, workers)
    device = torch.device(device)
    here = device if engine is None else torch.device("cpu")
    shapes = row_shapes(backbone, precision, here, arrays)
    rows_per_unit = default_rows_per_unit(len(dataset), shapes) if rows_per_unit is None else rows_per_unit
    make = with_arguments(
        Extractor,
        backbone,
        dataset,
        precision,
        workers=workers,
        arrays=tuple(arrays),
        rows_per_unit=rows_per_unit,
        shapes=shapes,
    )
    if batch_size is None:
        batch_size = default_batch_size(backbone, device)
        if has_own_memory(device):
            key = _resume_key(device, batch_size, False, engine)
            begun = _begun_with(final, partial, storage_options, attributes, key)
            if engine is None:
                room = room_on(device, shapes, rows_per_unit)
                estimate = default_batch_size(backbone, device, precision, room)

                def try_out(size: int) -> None:
                    make(device=device, batch_size=size).try_out()

                batch_size = find_batch_size(try_out, device, batch_size, estimate, begun, progress)
            else:
                batch_size = begun or batch_size
    make = with_arguments(make, batch_size=batch_size)
    if compile is None:
        compile = _compiling_pays(device, len(dataset)) and _compiles(make, device, progress)
        backbone.model.to(here)  # it may have been tried on a GPU, and is to be computed elsewhere
    make = with_arguments(make, compile=compile)
    key = _resume_key(device, batch_size, compile, engine)
    with store_writer(final, partial, len(dataset), shapes, attributes, rows_per_unit, key, storage_options) as writer:
        _tell(progress, writer)
        advance = progress.advance if progress is not None else lambda images: None
        try:
            (engine or InProcess(device)).fill(make, writer, advance)
        except UnstorableFeature as error:
            row = dataset.rows[error.row]
            where = "" if math.isfinite(error.value) else f"; {_where(backbone, dataset, error.row, precision, here)}"
            raise BadFeatures(
                f"image {row.image_id!r} ({row.path}): {error}{where}; take the image out of the manifest, "
                f"or extract with another precision than {precision}"
            ) from error
        except KeyboardInterrupt:
            if progress is not None:
                units = writer.units - len(writer.missing_units())
                done = f"{units} of {writer.units} units are safe in {writer.partial}"
                progress.line(f"interrupted: {done}; run the same again to go on from there")
            raise
        writer.finish()


def _begun_with(
    final: Path | str, partial: Path | str | None, storage_options: Mapping | None, attributes: Mapping, key: Mapping
) -> int | None:
    """Images a forward of the unfinished store in `partial`, if that is gone on with where they agree; else None.

    Args:
        key: `_resume_key`, whose `batch_size` and `compile` are not looked at.
    """
    place = place_of(f"{final}".rstrip("/") + ".partial" if partial is None else partial, storage_options)
    try:
        begun = json.loads(place.read("resume.json"))
    except (FileNotFoundError, ValueError):  # there is none, or it is damaged, as the writer will tell
        return None
    if not isinstance(begun, dict):
        return None
    found, stored = begun.get("resume_key", {}), begun.get("attributes", {})
    same_key = all(found.get(name) == value for name, value in key.items() if name not in ("batch_size", "compile"))
    same_store = all(stored.get(name) == value for name, value in json.loads(json.dumps(dict(attributes))).items())
    return found.get("batch_size") if same_key and same_store else None


def _compiling_pays(device: torch.device, images: int) -> bool:
    """Whether torch.compile saves more time than it takes."""
    return device.type == "cuda" and images >= COMPILED_FROM


def _compiles(make: Callable[..., Extractor], device: torch.device, progress: Progress | None) -> bool:
    """Whether torch.compile works, tried on a blank batch; a line says why where it does not."""
    reason = ""
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = "there is no GPU here to try it on; set compile to have others do it"
    else:
        try:
            make(device=device, compile=True).try_out()
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # of torch, of Triton, of the compiler
            reason = f"it fails on a blank batch: {' '.join(str(error).split())[:300]}"
    if reason and progress is not None:
        progress.line(f"goes on without torch.compile: {reason}")
    return not reason


def _where(backbone: Backbone, dataset: Dataset, row: int, precision: str, device: torch.device) -> str:
    """The layer where an image's features stop being numbers, from a forward of that image alone."""
    image = backbone.transform.load(dataset.image_path(row), dataset.rows[row].sha256)[None].to(device)
    with arithmetic(precision, device):
        return where_it_begins(backbone.model.to(device), backbone.transform.normalise(image))


def _resume_key(device: torch.device, batch_size: int, compile: bool, engine: Engine | None) -> dict:
    """What decides features, or their last bits, and is not in the attributes: digest of our own code that is loaded,
    library versions, kind of device, and what else chooses a GPU's kernels."""
    code = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] == __package__:
            code.update(name.encode() + b"\0" + Path(module.__file__).read_bytes())
    key = {"code_sha256": code.hexdigest(), **{name: version(name) for name in ("torch", "timm", "pillow")}}
    key |= {"device": device.type, "compile": compile}
    if device.type == "cuda":
        key["batch_size"] = batch_size
        if engine is None:  # of others the engine keeps account
            key["gpu"] = torch.cuda.get_device_name(device)
    return key


def _tell(progress: Progress | None, writer: StoreWriter) -> None:
    """Shows what was found in the working folder, and counts the rows that are done."""
    if progress is None:
        return
    if writer.note:
        progress.line(writer.note)
    missing = sum(stop - start for start, stop in map(writer.unit_rows, writer.missing_units()))
    progress.skip(writer.rows - missing)
