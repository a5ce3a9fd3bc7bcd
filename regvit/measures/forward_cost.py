"""What a forward costs: floating-point operations of one image, and time and memory of a treated model beside the plain one.

Operations are counted by torch's own counter over the products of matrices, attention's among them: two operations a
multiplication and addition. Norms, activations and softmax, a hundredth of them, are left out. Time and memory are measured in
turns. Time is the processor's own on a CPU (of all threads: what else runs there does not count), and the clock's on a GPU. Memory
is the largest sum of bytes that tensors made during the forward hold at once; weights and the images are not in it.
"""

from __future__ import annotations

import inspect
import time
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from regvit.models.attention import unfused
from regvit.models.backbones import Backbone, create
from regvit.models.tokens import TokenLayout
from regvit.stats.figures import Figure
from regvit.stats.intervals import Estimate

RESAMPLES = 1000


def gflops(model: nn.Module, size: int) -> float:
    """10⁹ operations of a forward of one image, `size` pixels a side, wherever the model lies ("meta": nothing is computed)."""
    weight = next(model.parameters())
    image = torch.zeros(1, 3, size, size, dtype=weight.dtype, device=weight.device)
    # not inference_mode: there a linear layer is one operation that the counter does not know
    with FlopCounterMode(display=False) as counter, unfused(model), torch.no_grad():
        model.forward_features(image)
    return counter.get_total_flops() / 1e9


def cost_figures(run: Backbone, untreated: Backbone) -> list[Figure]:
    """`gflops` of the run's model, and `gflops_without_registers`; None where timm cannot make the model without them.

    Args:
        untreated: the run's backbone without test-time registers.
    """
    size, plain, architecture = run.transform.size, untreated.model, run.info["architecture"]
    without: float | None = gflops(plain, size)
    if TokenLayout.of(plain).trained:
        without = None
        if "reg_tokens" in inspect.signature(type(plain).__init__).parameters:
            with torch.device("meta"):
                without = gflops(create(architecture, {**run.info["model_args"], "reg_tokens": 0}), size)
    return [Figure("gflops", gflops(run.model, size)), Figure("gflops_without_registers", without)]


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
