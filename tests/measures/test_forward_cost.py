import pytest
import torch
from torch import nn

from regvit.measures.forward_cost import peak_bytes, relative_cost


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


def test_a_model_that_does_five_times_the_work_takes_about_five_times_as_long():
    cost = relative_cost(Steps(50), Steps(10), torch.randn(8, 3, 256, 256), pairs=9)
    assert cost.time.lo <= cost.time.value <= cost.time.hi
    assert 3 < cost.time.value < 8
    assert cost.memory == pytest.approx(1)
    assert cost.time.n == 9
