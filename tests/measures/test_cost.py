"""Operations of a forward, counted by hand."""

import pytest
from extracting import SIZE, backbone_of, with_registers

from regvit.measures.cost import cost_figures, gflops

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
