"""What a forward costs: floating-point operations of one image, with the run's registers and without.

Counted by torch's own counter over the products of matrices, attention's among them: two operations a multiplication and
addition. Norms, activations and softmax, a hundredth of them, are left out.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regvit.models.attention import unfused
from regvit.models.backbones import Backbone, create
from regvit.models.tokens import TokenLayout
from regvit.stats.figures import Figure


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
