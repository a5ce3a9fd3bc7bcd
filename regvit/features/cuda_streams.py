"""A lane to a device: batches go up, results come down, and neither makes the device wait.

A GPU computes while its next batch is copied to it and its last results are copied back, if three things hold: the
memory of the host is pinned, each direction has a stream of its own, and the host waits for events instead of asking
for values. `CudaLane` does that; `Lane` has the same face for a device that does at once what it is told, as the CPU.

    lane = lane_of(device)
    upload = lane.upload(batch)                 # begins the copy; `batch` is free again after upload.done.synchronize()
    mark = lane.compute(step, upload)           # step(images on the device), after the copy
    mark.synchronize()                          # when the host wants to know that it is done
    arrays = lane.download(tensors).arrays()    # begins to copy what was computed; waits for it
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


class Mark(Protocol):
    """A place in the work of a device; a `torch.cuda.Event`, or one that has passed."""

    def synchronize(self) -> None: ...


class Passed:
    """The mark of what is done already."""

    def synchronize(self) -> None:
        return None


@dataclass(frozen=True)
class Upload:
    """A batch on its way to a device; its host memory may be written again once `done` has passed."""

    images: UInt8[Tensor, "b 3 s s"]
    done: Mark


@dataclass(frozen=True)
class Download:
    """Results on their way to the host."""

    tensors: dict[str, Tensor]
    done: Mark

    def arrays(self) -> dict[str, Float[np.ndarray, "b ..."]]:
        """The results by name, after waiting for them."""
        self.done.synchronize()
        return {name: values.numpy() for name, values in self.tensors.items()}


class Lane:
    """To a device that does at once what it is told.

    Attributes:
        ahead: batches that may be on their way before the host waits for the oldest.
    """

    ahead = 0

    def __init__(self, device: torch.device):
        self.device = device

    def buffer(self, shape: tuple[int, ...]) -> UInt8[Tensor, ...]:
        """Host memory for a batch."""
        return torch.empty(shape, dtype=torch.uint8)

    def upload(self, batch: UInt8[Tensor, "b 3 s s"]) -> Upload:
        return Upload(batch.to(self.device), Passed())

    def compute(self, step: Callable[[Tensor], None], upload: Upload) -> Mark:
        step(upload.images)
        return Passed()

    def download(self, tensors: Mapping[str, Tensor]) -> Download:
        return Download({name: values.cpu() for name, values in tensors.items()}, Passed())


class CudaLane(Lane):
    """To an NVIDIA (or ROCm) GPU; computes on the stream that is current when `compute` is called."""

    ahead = 2  # one being computed, one behind it in the queue

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def buffer(self, shape: tuple[int, ...]) -> UInt8[Tensor, ...]:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    def upload(self, batch: UInt8[Tensor, "b 3 s s"]) -> Upload:
        with torch.cuda.stream(self._up):
            images = batch.to(self.device, non_blocking=True)
            return Upload(images, self._up.record_event())

    def compute(self, step: Callable[[Tensor], None], upload: Upload) -> Mark:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(upload.done)
        upload.images.record_stream(stream)  # or its memory could be given to the next upload while it is read
        step(upload.images)
        return stream.record_event()

    def download(self, tensors: Mapping[str, Tensor]) -> Download:
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            found = {}
            for name, values in tensors.items():
                found[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                found[name].copy_(values, non_blocking=True)
                values.record_stream(self._down)
            return Download(found, self._down.record_event())


def lane_of(device: torch.device) -> Lane:
    """The lane to a device."""
    return CudaLane(device) if device.type == "cuda" else Lane(device)


def usable_cores() -> int:
    """CPU cores that this process may use (a container or `taskset` may leave it fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_batch_size(device: torch.device | str) -> int:
    """Images a forward where none are given: 8 on a CPU, 32 elsewhere.

    On a CPU more of them are slower: the hidden activations of a block outgrow 32 MiB, and what is larger glibc takes from
    the system and gives back again each time (ViT-S/14, 224 px, two cores: 24 images/s with 8, 13 with 32).
    """
    return 8 if torch.device(device).type == "cpu" else 32
