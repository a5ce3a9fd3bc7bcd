"""The features of any rows of a data set, computed so that nothing waits but for the forward.

    decode (threads) -> uint8 -> device -> normalise -> forward_features -> readouts -> units

All of these go on at the same time: batches are decoded ahead into reused (on a GPU: pinned) memory, and a GPU is asked
for nothing before a unit is whole. A unit is the same bits wherever it is computed, given the same kind of device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial as with_arguments
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from regvit.data.decoding import in_order
from regvit.data.manifest import Dataset
from regvit.features.batch_size import UNITS_ON_DEVICE, default_batch_size, room_on
from regvit.features.cuda_streams import Mark, Upload, lane_of
from regvit.features.forward import ARRAYS, blank_batch, features_of, row_shapes
from regvit.features.store_layout import default_rows_per_unit
from regvit.models.arithmetic import check_precision
from regvit.models.backbones import Backbone


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
        precision: see `regvit.models.arithmetic`; it is part of what makes the features.
        device: where the forward runs.
        batch_size: images a forward, lowered to a divisor of `rows_per_unit`; None is `default_batch_size` for the
            memory that the device has left.
        workers: decoding threads, which run ahead of the forward; 0 decodes in between.
        arrays: what to compute, see `forward`; what the model does not have is left out.
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
        check_numbers(1 if batch_size is None else batch_size, workers)
        self.backbone, self.dataset, self.precision, self.workers = backbone, dataset, precision, workers
        self.device, self.arrays = torch.device(device), tuple(arrays)
        self.shapes = dict(shapes or row_shapes(backbone, precision, device, arrays))
        self.rows_per_unit = rows_per_unit or default_rows_per_unit(len(dataset), self.shapes)
        self._forward = backbone.model.to(self.device).forward_features
        if batch_size is None:
            room = room_on(self.device, self.shapes, self.rows_per_unit)
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
            found = features_of(self.backbone, forward, images, self.precision, self.arrays)
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
        batches = [
            blank_batch(self.backbone, self.batch_size, self.device) for _ in range(1 + lane_of(self.device).ahead)
        ]
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


def _divisor(rows: int, batch_size: int) -> int:
    """The largest divisor of `rows` that is at most `batch_size`."""
    return next(size for size in range(min(rows, batch_size), 0, -1) if rows % size == 0)


def check_numbers(batch_size: int, workers: int) -> None:
    """Raises ValueError where one of them is out of range."""
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")
