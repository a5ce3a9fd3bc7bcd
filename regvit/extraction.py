"""Extraction: images through a backbone into a feature store, one forward an image.

    decode (threads) -> uint8 -> device -> normalise -> forward_features -> readouts -> float16 units (writer threads)

All of these go on at the same time, so that the forward is what the whole takes: batches are decoded ahead into reused
(on a GPU: pinned) memory, and a GPU is asked for nothing before a unit is whole. `extract` fills a store in this
process, or has an engine do so on others; both compute with an `Extractor`, and a unit is the same bits wherever it is
computed, given the same kind of device.

Features are taken from the tokens that `forward_features` returns, that is after the model's last norm (models that
normalise only what they pooled, timm's `fc_norm`, give their tokens before it):

    cls         CLS token                                  only where the model has one
    registers   trained registers, then test-time ones     only where the model has any
    patch_mean  mean over the patch tokens, in float32
    patches     the patch tokens themselves, row by row of the grid; only where asked for, as they are large
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial as with_arguments
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .arithmetic import arithmetic, check_precision
from .backbones import Backbone
from .bucket_writer import store_writer
from .finite import BadFeatures, where_it_begins
from .hooks import watch_outputs
from .images import in_order
from .lanes import CudaLane, Mark, Upload, lane_of, usual_batch_size
from .manifest import Dataset
from .memory import available
from .progress import progress as Progress
from .storage import place_of
from .store import StoreWriter, UnstorableFeature, default_rows_per_unit, image_ids_digest
from .tokens import TokenLayout

ARRAYS = ("cls", "registers", "patch_mean")  # what is stored where nothing else is asked for
# Computed and on their way to the disk, each on a thread of its own: where the disk is waited for, others go on. A unit of
# 32 x 256 x 1024 values took 19 ms on one thread and 18 ms on four on two idle cores, 65 and 27 ms beside other jobs (medians
# of four), where a fast GPU computes one in 15. They are what writing holds in memory: 6 bytes a value, 0.2 GB in all.
UNITS_IN_FLIGHT = 4
# Of a batch on a GPU: values in the largest tensor that a part of the model puts out, 0.6 GB in float32. It is 128 images
# of 224 px for a ViT-L/14, which fill large GPUs too.
LARGEST_ACTIVATION = 150_000_000
LARGEST_BATCH = 1024  # images, of models however small
# Largest tensors that a forward holds at once, at most: 2.3 to 4.5 of them, measured on the CPU over ViT-S, -B and -g,
# DINOv3 and EVA-02, attention fused or not, float32 and bfloat16. The weights lie there already.
LIVE_ACTIVATIONS = 5
UNITS_ON_DEVICE = 3  # being computed, on its way down, and one whose memory is not yet free again
# Of a GPU's free memory that batches may take: the allocator loses some to gaps, the libraries want space to work in.
SHARE = 0.8
# torch.compile takes about a minute and saves some 0.1 ms of a ViT-L image on a fast GPU: about as many images must come
# before it pays. On a CPU it gains nothing (measured: 2 %).
COMPILED_FROM = 500_000


class CannotCompile(RuntimeError):
    """torch.compile does not work on this machine; the message gives its reason and the cure."""


@dataclass(frozen=True)
class Unit:
    """Features of the rows `start` to `stop` (exclusive) of a data set: float32, shape (stop - start, …), by array."""

    start: int
    stop: int
    arrays: dict[str, Float[np.ndarray, "b ..."]]


class Extractor:
    """The features of any rows of a data set under one backbone, on one device; what a process of a cluster needs too.

    The rows of a unit share their batches with the same images whichever units are asked for, and in whatever order.

    Args:
        backbone: with its test-time registers in place; its model is moved to `device`.
        precision: see `regvit.arithmetic`; it is part of what makes the features.
        device: where the forward runs.
        batch_size: images a forward, lowered to a divisor of `rows_per_unit`; None is `default_batch_size` for the
            memory that the device has left.
        workers: decoding threads, which run ahead of the forward; 0 decodes in between.
        arrays: what to compute, see the module; what the model does not have is left out.
        rows_per_unit: rows that a batch must not straddle; by default those of a store's unit.
        compile: run the model under torch.compile (but for the last, smaller batch).
        shapes: of one row, by array, where they are known (`row_shapes`).
    Attributes:
        shapes, batch_size, rows_per_unit: as above, with what was left open filled in.
    Raises:
        ValueError: the precision or an array is unknown, the model has none of the arrays or returns no token
            sequence, or a number is out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: Dataset,
        precision: str = "float32",
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
        workers: int = 0,
        arrays: Sequence[str] = ARRAYS,
        rows_per_unit: int | None = None,
        compile: bool = False,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        check_precision(precision)
        _check_numbers(1 if batch_size is None else batch_size, workers)
        self.backbone, self.dataset, self.precision, self.workers = backbone, dataset, precision, workers
        self.device, self.arrays = torch.device(device), tuple(arrays)
        self.shapes = dict(shapes or row_shapes(backbone, precision, device, arrays))
        self.rows_per_unit = rows_per_unit or default_rows_per_unit(len(dataset), self.shapes)
        self._forward = backbone.model.to(self.device).forward_features
        if batch_size is None:
            room = _room(self.device, self.shapes, self.rows_per_unit)
            batch_size = default_batch_size(backbone, self.device, precision, room)
        self.batch_size = _divisor(self.rows_per_unit, batch_size)
        self._compiled = self._compile() if compile else None

    def unit(self, start: int, stop: int) -> dict[str, Float[np.ndarray, "b ..."]]:
        """The features of the rows `start` to `stop` (exclusive), by array; see `units`."""
        [unit] = self.units([(start, stop)])
        return unit.arrays

    def units(
        self, spans: Iterable[tuple[int, int]], advance: Callable[[int], None] = lambda images: None
    ) -> Iterator[Unit]:
        """The features of several units, in the order in which they are given; the next is under way meanwhile.

        Args:
            spans: first row of a unit, and the row after its last.
            advance: is told how many images more are done.
        Raises:
            IndexError: rows that the data set does not have.
            UnreadableImage: an image cannot be decoded.
            ChangedImage: an image's file is not the one that the manifest has the SHA-256 of.
            CannotCompile: torch.compile was asked for and fails.
            torch.OutOfMemoryError: the device has no room for a batch.
        """
        spans = list(spans)
        for start, stop in spans:
            if not 0 <= start < stop <= len(self.dataset):
                raise IndexError(f"rows {start} to {stop} are out of range: {self.dataset.name} has rows 0 to "
                                 f"{len(self.dataset)}")  # fmt: skip
        lane = lane_of(self.device)
        on_their_way: deque[tuple[Mark, int]] = deque()  # batches: their marks, and how many images they are
        coming_down: deque = deque()  # units

        def wait_for(batches_left: int) -> None:
            while len(on_their_way) > batches_left:
                mark, images = on_their_way.popleft()
                mark.synchronize()
                advance(images)

        with closing(self._uploads([batch for span in spans for batch in self._batches(*span)], lane)) as uploads:
            for start, stop in spans:
                unit = self._empty(stop - start)
                for first, last in self._batches(start, stop):
                    step = with_arguments(
                        self._compute, {name: rows[first - start : last - start] for name, rows in unit.items()}
                    )
                    on_their_way.append((lane.compute(step, next(uploads)), last - first))
                    wait_for(lane.ahead)
                coming_down.append((start, stop, lane.download(unit)))
                if len(coming_down) > min(1, lane.ahead):
                    start, stop, download = coming_down.popleft()
                    yield Unit(start, stop, download.arrays())
        wait_for(0)
        for start, stop, download in coming_down:
            yield Unit(start, stop, download.arrays())

    def _batches(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The batches of a unit: first row, and the row after the last."""
        return [(first, min(first + self.batch_size, stop)) for first in range(start, stop, self.batch_size)]

    def _uploads(self, batches: list[tuple[int, int]], lane) -> Iterator[Upload]:
        """Decoded batches on their way to the device, in order; two batches are decoded ahead.

        A batch is decoded into memory of the first free buffer of its size, which is free again once it was copied.
        """
        side = self.backbone.transform.size
        free: dict[int, deque] = {last - first: deque() for first, last in batches}
        taken: deque[UInt8[Tensor, "b 3 s s"]] = deque()

        def images() -> Iterator[tuple[int, np.ndarray]]:
            """Each row, and where to put its pixels."""
            for first, last in batches:
                if free[last - first]:
                    buffer, copied = free[last - first].popleft()
                    copied.synchronize()
                else:
                    buffer = lane.buffer((last - first, 3, side, side))
                taken.append(buffer)
                yield from zip(range(first, last), buffer.numpy(), strict=True)

        with closing(in_order(self._decode, images(), self.workers, ahead=2 * self.batch_size)) as decoded:
            for first, last in batches:
                for _ in islice(decoded, last - first):
                    pass
                buffer = taken.popleft()
                upload = lane.upload(buffer)
                free[last - first].append((buffer, upload.done))
                yield upload

    def _decode(self, place: tuple[int, UInt8[np.ndarray, "3 s s"]]) -> None:
        row, pixels = place
        sha256 = self.dataset.rows[row].sha256  # the files of a set that is read in place may have changed
        np.copyto(pixels, self.backbone.transform.pixels(self.dataset.image_path(row), sha256))

    def _compute(self, into: dict[str, Float[Tensor, "b ..."]], images: UInt8[Tensor, "b 3 s s"]) -> None:
        """The readouts of a batch on the device, written where they belong in their unit."""
        whole = self._compiled is not None and len(images) == self.batch_size  # another size would be compiled anew
        forward = self._compiled if whole else self._forward
        try:
            found = _features(self.backbone, forward, images, self.precision, self.arrays)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{self.device} has no room for {len(images)} images of {self.backbone.name} at once; give a smaller "
                f"batch_size, or free memory of the device and run the same again ({error})"
            ) from error
        for name, values in found.items():
            into[name].copy_(values)

    def _empty(self, rows: int) -> dict[str, Float[Tensor, "b ..."]]:
        """Memory of the device for the features of so many rows."""
        return {name: torch.empty((rows, *shape), device=self.device) for name, shape in self.shapes.items()}

    def try_out(self) -> None:
        """A blank batch through the model, beside the units and batches that are on the device at the same time, so that
        what cannot be compiled, or has no room, fails before there is anything to lose.

        Raises:
            CannotCompile: torch.compile was asked for and fails.
            torch.OutOfMemoryError: the device has no room for a batch.
        """
        units = [self._empty(self.rows_per_unit) for _ in range(UNITS_ON_DEVICE)]
        batches = [_blank(self.backbone, self.batch_size, self.device) for _ in range(1 + lane_of(self.device).ahead)]
        self._compute({name: rows[: self.batch_size] for name, rows in units[0].items()}, batches[0])

    def _compile(self) -> Callable[[Tensor], Tensor]:
        """The model's forward under torch.compile."""
        compiled = torch.compile(self._forward, dynamic=False)

        def forward(images: Tensor) -> Tensor:
            try:
                return compiled(images)
            except torch._dynamo.exc.TorchDynamoException as error:
                name = type(self.backbone.model).__name__
                raise CannotCompile(f"torch.compile fails on {name} here ({error}); extract without it") from error

        return forward


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
        precision: see `regvit.arithmetic`; it is part of what makes the features.
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
    _check_numbers(1 if batch_size is None else batch_size, workers)
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
        if _has_own_memory(device):
            key = _resume_key(device, batch_size, False, engine)
            begun = _begun_with(final, partial, storage_options, attributes, key)
            if engine is None:
                room = _room(device, shapes, rows_per_unit)
                estimate = default_batch_size(backbone, device, precision, room)
                batch_size = _find_batch_size(make, device, batch_size, estimate, begun, progress)
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


def readouts(
    layout: TokenLayout, tokens: Float[Tensor, "b n d"], arrays: Sequence[str] = ARRAYS
) -> dict[str, Float[Tensor, "b ..."]]:
    """What is stored of a token sequence, in float32: `cls` (b, d), `registers` (b, r, d), `patch_mean` (b, d),
    `patches` (b, p, d), whichever of them are asked for.

    `cls` and `registers` are left out where the model has none.

    Raises:
        ValueError: an array is unknown.
    """
    tokens = tokens.float()
    make = {
        "cls": layout.cls_token if layout.cls else None,
        "registers": layout.registers if layout.num_registers else None,
        "patch_mean": lambda tokens: layout.patches(tokens).mean(1),
        "patches": layout.patches,
    }
    if unknown := [name for name in arrays if name not in make]:
        raise ValueError(f"array {unknown[0]!r} is unknown; expected some of {', '.join(make)}")
    return {name: make[name](tokens) for name in arrays if make[name] is not None}


def row_shapes(
    backbone: Backbone, precision: str, device: torch.device | str = "cpu", arrays: Sequence[str] = ARRAYS
) -> dict[str, tuple[int, ...]]:
    """Shape of one row of each array, from a forward of one blank image; the model is moved to `device`.

    Raises:
        ValueError: see `Extractor`.
    """
    forward = backbone.model.to(device).forward_features
    found = _features(backbone, forward, _blank(backbone, 1, device), precision, arrays)
    if not found:
        raise ValueError(f"backbone {backbone.name} has none of the arrays asked for ({', '.join(arrays)})")
    return {name: tuple(values.shape[1:]) for name, values in found.items()}


@torch.inference_mode()
def _features(
    backbone: Backbone,
    forward: Callable[[Tensor], Tensor],
    batch: UInt8[Tensor, "b 3 s s"],
    precision: str,
    arrays: Sequence[str],
) -> dict[str, Float[Tensor, "b ..."]]:
    """The readouts of one batch of uint8 images, on its device."""
    with arithmetic(precision, batch.device):
        tokens = forward(backbone.transform.normalise(batch))
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"{type(backbone.model).__name__}.forward_features returns {found}, expected a token sequence "
                "(image, token, channel); use a timm vision transformer"
            )
        return readouts(TokenLayout.of(backbone.model), tokens, arrays)


def _blank(backbone: Backbone, images: int, device: torch.device | str) -> UInt8[Tensor, "b 3 s s"]:
    return torch.zeros(images, 3, backbone.transform.size, backbone.transform.size, dtype=torch.uint8, device=device)


def default_batch_size(
    backbone: Backbone, device: torch.device | str, precision: str = "float32", room: float = math.inf
) -> int:
    """Images a forward where none are given, a power of two.

    8 on a CPU, see `usual_batch_size`. On a GPU as many as keep the largest tensor that a part of the model puts out
    within LARGEST_ACTIVATION values, which is the same in every process and on every GPU; and fewer where those would not
    fit into `room`:

        bytes of a forward = images · (LIVE_ACTIVATIONS · bytes of the largest tensor + 3 · side² · (4 + 3))

    with 4 bytes for a normalised value, and 1 for each of the three batches of uint8 that are on the device. Without fused
    attention the largest tensor may be the attention matrix. It is read off one blank image, wherever the model is.

    Args:
        precision: of the forward; decides the bytes of the largest tensor.
        room: bytes of the device that the forward may take.
    """
    if not _has_own_memory(torch.device(device)):
        return usual_batch_size(device)
    values, size = _largest_output(backbone, precision)
    fitting = room / (LIVE_ACTIVATIONS * size + _input_bytes(backbone))
    images = max(1, int(min(LARGEST_BATCH, LARGEST_ACTIVATION // values, fitting)))
    return 1 << (images.bit_length() - 1)


def _largest_output(backbone: Backbone, precision: str) -> tuple[int, int]:
    """Of one image: values of the largest tensor that a part of the model puts out, and the most bytes of one."""
    values = size = 1

    def see(_: int, output: object) -> None:
        nonlocal values, size
        if isinstance(output, Tensor):
            values, size = max(values, output.numel()), max(size, output.nbytes)

    where = next((parameter.device for parameter in backbone.model.parameters()), torch.device("cpu"))
    blank = _blank(backbone, 1, where)
    with watch_outputs(dict(enumerate(backbone.model.modules())), see):
        _features(backbone, backbone.model.forward_features, blank, precision, ("patch_mean",))
    return values, size


def _input_bytes(backbone: Backbone) -> int:
    """Of one image on its way into the model: normalised to float32, and as uint8 in as many batches as are on a GPU."""
    return 3 * backbone.transform.size**2 * (4 + 1 + CudaLane.ahead)


def _room(device: torch.device, shapes: Mapping[str, tuple[int, ...]], rows_per_unit: int) -> float:
    """Bytes that forwards may take on a device that holds the model already: a share of what units leave of the rest."""
    if not _has_own_memory(device):
        return math.inf
    unit = 4 * rows_per_unit * sum(math.prod(shape) for shape in shapes.values())  # float32
    return SHARE * (available(device) - UNITS_ON_DEVICE * unit)


def _has_own_memory(device: torch.device) -> bool:
    """Whether batches have to fit into memory of the device's own, and choose its kernels: a GPU, not a CPU."""
    return device.type == "cuda"


def _find_batch_size(
    make: Callable[..., Extractor],
    device: torch.device,
    usual: int,
    estimate: int,
    begun: int | None,
    progress: Progress | None,
) -> int:
    """Images a forward for which a GPU here has room, as a blank batch shows.

    Args:
        usual: `default_batch_size` of the model alone; a line tells where it is not reached.
        estimate: `default_batch_size` for the memory that is free; halved as often as it does not fit.
        begun: that of the unfinished store, which is taken instead. Fewer would begin the store anew, and so are left to
            whoever calls.
    Raises:
        torch.OutOfMemoryError: there is no room for those of the unfinished store, or not for a single image.
    """
    if begun is not None:
        try:
            return _tried(make, device, begun, least=begun)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the unfinished store was made in batches of {begun} images and is only gone on with in such; a smaller "
                f"batch_size begins it anew: {error}"
            ) from error
    size = _tried(make, device, estimate, least=1)
    if size < usual and progress is not None:
        progress.line(f"batches of {size} images instead of {usual}, as {device} has no room for more")
    return size


def _tried(make: Callable[..., Extractor], device: torch.device, size: int, least: int) -> int:
    """`size`, or as often halved as a blank batch of it does not fit.

    Raises:
        torch.OutOfMemoryError: half of what does not fit is less than `least`.
    """
    while True:
        try:
            make(device=device, batch_size=size).try_out()
            return size
        except torch.OutOfMemoryError:
            if size // 2 < least:
                raise
        torch.cuda.empty_cache()  # what a larger batch got before it failed lies in pieces of other sizes
        size //= 2


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


def _divisor(rows: int, batch_size: int) -> int:
    """The largest divisor of `rows` that is at most `batch_size`."""
    return next(size for size in range(min(rows, batch_size), 0, -1) if rows % size == 0)


def _tell(progress: Progress | None, writer: StoreWriter) -> None:
    """Shows what was found in the working folder, and counts the rows that are done."""
    if progress is None:
        return
    if writer.note:
        progress.line(writer.note)
    missing = sum(stop - start for start, stop in map(writer.unit_rows, writer.missing_units()))
    progress.skip(writer.rows - missing)


def _check_numbers(batch_size: int, workers: int) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")
