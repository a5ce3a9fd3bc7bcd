import pytest
import torch

from regvit.registers.neighbourhood import neighbour_cosine


def test_resemblance_to_neighbours_is_the_mean_over_those_that_there_are():
    e = torch.nn.functional.normalize(torch.randn(1, 3, 3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = neighbour_cosine(5 * e).reshape(3, 3)
    assert found[0, 0].item() == pytest.approx((e[0, 0, 0] @ (e[0, 0, 1] + e[0, 1, 0])).item() / 2, abs=1e-6)
    around = e[0, 0, 1] + e[0, 2, 1] + e[0, 1, 0] + e[0, 1, 2]
    assert found[1, 1].item() == pytest.approx((e[0, 1, 1] @ around).item() / 4, abs=1e-6)
