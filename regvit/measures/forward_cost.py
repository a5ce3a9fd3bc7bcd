"""What a treated model costs beside the plain one: time and memory of a forward, measured in turns.

Time is the processor's own on a CPU (of all threads: what else runs there does not count), and the clock's on a GPU. Memory
is the largest sum of bytes that tensors made during the forward hold at once; weights and the images are not in it.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regvit.stats.intervals import Estimate

RESAMPLES = 1000


@dataclass(frozen=True)
class Cost:
    """Both relative to the plain model: 1 is as much. `time` is the median over pairs of forwards, with its 95 % interval."""

    time: Estimate
    memory: float


@torch.inference_mode()
def relative_cost(
    treated: nn.Module, plain: nn.Module, images: Float[Tensor, "b 3 h w"], pairs: int = 20, seed: int = 0
) -> Cost:
    """Runs both models in turns, the one that goes first being the other one each time.

    Args:
        images: normalised, on the device of both.
        pairs: of forwards, after one that is not counted.
    """
    ratios = []
    for i in range(pairs + 1):
        order = ((treated, plain), (plain, treated))[i % 2]
        spent = {id(model): _seconds(model, images) for model in order}
        ratios.append(spent[id(treated)] / spent[id(plain)])
    ratios = np.array(ratios[1:])
    draws = np.random.default_rng(seed).integers(pairs, size=(RESAMPLES, pairs))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    memory = peak_bytes(treated, images) / peak_bytes(plain, images)
    return Cost(Estimate(float(np.median(ratios)), float(low), float(high), pairs), memory)


def peak_bytes(model: nn.Module, images: Float[Tensor, "b 3 h w"]) -> int:
    """The most that tensors made by one forward hold at a time, in bytes."""
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        model.forward_features(images)
        return torch.cuda.max_memory_allocated(images.device) - before
    with _Living() as living:
        model.forward_features(images)
    return living.peak


class _Living(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, until they are freed."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self._known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in inputs and storage not in self._known:
                    self._known.add(storage)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def _seconds(model: nn.Module, images: Float[Tensor, "b 3 h w"]) -> float:
    cuda = images.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize(images.device)
    start = clock()
    model.forward_features(images)
    if cuda:
        torch.cuda.synchronize(images.device)
    return clock() - start
