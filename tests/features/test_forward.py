import pytest
import torch
from extracting import backbone_of, with_registers

from regvit.features.forward import readouts, row_shapes
from regvit.models.tokens import TokenLayout


def test_readouts_take_each_token_from_its_place():
    tokens = torch.arange(6.0).reshape(1, 6, 1)  # CLS 0, trained 1, test-time 2, patches 3 4 5
    found = readouts(TokenLayout(cls=1, trained=1, test_time=1), tokens)
    assert {name: values.flatten().tolist() for name, values in found.items()} == {
        "cls": [0.0],
        "registers": [1.0, 2.0],
        "patch_mean": [4.0],
    }
    assert readouts(TokenLayout(cls=0, trained=0), tokens).keys() == {"patch_mean"}


def test_patch_means_of_half_precision_tokens_are_taken_in_float32():
    tokens = torch.full((1, 5000, 1), 0.1, dtype=torch.bfloat16)
    found = readouts(TokenLayout(cls=0, trained=0), tokens)["patch_mean"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.10009765625, rel=1e-6)  # 0.1 in bfloat16


def test_shapes_are_those_of_a_row():
    backbone = with_registers(backbone_of(), 2)
    assert row_shapes(backbone, "float32", arrays=["registers", "patches"]) == {
        "registers": (2, 64),
        "patches": (4, 64),
    }
