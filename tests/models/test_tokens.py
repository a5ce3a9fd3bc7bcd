import pytest
import timm
import torch

from regvit import TokenLayout, add_test_time_registers


def test_layout_tells_class_registers_and_patches_apart():
    x = torch.arange(8.0).view(1, 8, 1)  # CLS 0, trained 1 2, test-time 3, patches 4 to 7
    layout = TokenLayout(cls=1, trained=2, test_time=1)
    assert layout.prefix == 4
    assert layout.num_registers == 3
    assert layout.cls_token(x).flatten().tolist() == [0]
    assert layout.registers(x).flatten().tolist() == [1, 2, 3]
    assert layout.test_time_registers(x).flatten().tolist() == [3]
    assert layout.untrained(x).flatten().tolist() == [3, 4, 5, 6, 7]
    assert layout.patches(x).flatten().tolist() == [4, 5, 6, 7]


def test_join_puts_new_registers_and_patches_behind_what_is_kept():
    x = torch.arange(6.0).view(1, 6, 1)
    layout = TokenLayout(cls=1, trained=1, test_time=2)
    joined = layout.join(x, torch.full((1, 2, 1), -1.0), torch.full((1, 2, 1), -2.0))
    assert joined.flatten().tolist() == [0, 1, -1, -1, -2, -2]


@pytest.mark.parametrize(
    ("name", "cls", "trained"),
    [
        ("test_vit", 1, 0),
        ("test_vit2", 0, 1),
        ("vit_small_patch14_reg4_dinov2", 1, 4),
        ("deit_tiny_distilled_patch16_224", 2, 0),
        ("naflexvit_base_patch16_gap", 0, 4),
    ],
)
def test_registers_are_never_counted_as_patches(name, cls, trained):
    model = timm.create_model(name, pretrained=False, **({} if name.startswith("test") else {"depth": 2}))
    assert TokenLayout.of(model) == TokenLayout(cls, trained, 0)
    add_test_time_registers(model, {}, 3)
    assert TokenLayout.of(model) == TokenLayout(cls, trained, 3)
