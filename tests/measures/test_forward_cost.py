"""Operations of a forward counted by hand; time and memory of two models in turns."""

import pytest
import torch
from extracting import SIZE, backbone_of, with_registers
from torch import nn

from regvit.measures import forward_cost
from regvit.measures.forward_cost import cost_figures, gflops, peak_bytes, relative_cost

PATCHES = (SIZE // 16) ** 2


def by_hand(tokens: int, width: int = 64, depth: int = 6, hidden: int = 192) -> float:
    """Two operations a multiplication: patch embedding; queries, keys, values and output; logits and values; the MLP."""
    embed = 2 * PATCHES * 3 * 16**2 * width
    block = 2 * tokens * (4 * width**2 + 2 * width * hidden) + 2 * 2 * tokens**2 * width
    return (embed + depth * block) / 1e9


@pytest.mark.parametrize("registers", [0, 1, 4])
def test_operations_are_those_of_the_matrix_products(registers):
    backbone = backbone_of("test_vit", reg_tokens=registers)
    backbone.info["model_args"] = {"img_size": SIZE, "num_classes": 0, "reg_tokens": registers}
    found = {figure.metric: figure.value for figure in cost_figures(backbone, backbone)}
    assert found["gflops"] == pytest.approx(by_hand(1 + registers + PATCHES), rel=1e-6)
    assert found["gflops_without_registers"] == pytest.approx(by_hand(1 + PATCHES), rel=1e-6)


def test_test_time_registers_cost_what_tokens_cost_and_the_untreated_model_is_without():
    untreated, run = backbone_of(), with_registers(backbone_of(), 2)
    found = {figure.metric: figure.value for figure in cost_figures(run, untreated)}
    assert found["gflops"] == pytest.approx(by_hand(3 + PATCHES), rel=1e-6)
    assert found["gflops_without_registers"] == gflops(untreated.model, SIZE)


class Steps(nn.Module):
    """Three tensors as large as the images, of which at most two are alive at a time; `more` of these steps."""

    def __init__(self, more: int = 1):
        super().__init__()
        self.more = more

    def forward_features(self, x):
        for _ in range(self.more):
            first = x * 2
            second = first + 1
            del first
            x = second.view(-1).view(x.shape) * 3
        return x


def test_the_peak_is_that_of_tensors_that_live_together():
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert peak_bytes(Steps(), x) == 2 * x.nbytes
        assert peak_bytes(Steps(5), x) == 4 * x.nbytes  # and the input of a step, and the last one's `second`


class Clocked(nn.Module):
    """A model whose forward takes so many seconds of a clock that stands still otherwise; it notes when it ran."""

    def __init__(self, name, seconds, clock):
        super().__init__()
        self.name, self.seconds, self.clock = name, seconds, clock

    def forward_features(self, x):
        self.clock["now"] += next(self.seconds)
        self.clock["ran"] += self.name
        return x * 2


def test_time_is_the_median_ratio_of_forwards_in_turns_after_one_that_is_not_counted(monkeypatch):
    clock = {"now": 0.0, "ran": ""}
    monkeypatch.setattr(forward_cost.time, "process_time", lambda: clock["now"])
    treated = Clocked("t", iter([900.0, 10.0, 10.0, 15.0, 10.0, 80.0, 10.0]), clock)  # the first is slow, as everywhere
    plain = Clocked("p", iter([1.0] + [2.0] * 6), clock)
    cost = relative_cost(treated, plain, torch.randn(1, 3, 8, 8), pairs=5)
    assert (cost.time.value, cost.time.lo, cost.time.hi, cost.time.n) == (5.0, 5.0, 40.0, 5)
    assert clock["ran"][:12] == 3 * "tppt"  # which one goes first changes
    assert cost.memory == 1.0
