import pytest
import torch
from extracting import backbone_of, with_registers

from regvit.features.forward import CPU_BATCH, LARGEST_BATCH, Forward, Readouts
from regvit.features.store import ArraySpec
from regvit.models.tokens import TokenLayout


def test_patch_means_of_half_precision_tokens_are_taken_in_float32():
    tokens = torch.full((1, 5000, 1), 0.1, dtype=torch.bfloat16)
    found = Readouts().of_tokens(TokenLayout(cls=0, trained=0), tokens)["patch_mean"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.10009765625, rel=1e-6)  # 0.1 in bfloat16


def test_arrays_have_the_shape_of_a_row_and_are_float16_but_those_named():
    forward = Forward(with_registers(backbone_of(), 2), Readouts(("registers", "patches")), float32=("patches",))
    assert forward.arrays() == {"registers": ArraySpec((2, 64)), "patches": ArraySpec((4, 64), "float32")}


def test_parameters_can_be_trained_after_a_forward():
    backbone = backbone_of()
    Forward(backbone, Readouts()).arrays()
    backbone.model.requires_grad_(True).forward_features(torch.zeros(1, 3, 32, 32)).sum().backward()


def test_a_batch_that_has_no_room_names_the_cure():
    def full(model, images):
        raise torch.OutOfMemoryError("no memory")

    forward = Forward(backbone_of(), full)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"cpu has no room for 3 images of test_vit at once; give a smaller"
    ):
        forward(forward.blank(3, "cpu"))


@pytest.mark.parametrize(("free", "expected"), [(1 << 40, LARGEST_BATCH), (2 * 40 * 1000, 32), (1, 1)])
def test_a_gpu_takes_as_many_images_as_half_of_its_free_memory_has_room_for(monkeypatch, free, expected):
    forward, tried = Forward(backbone_of(), lambda model, images: {}), []
    assert forward.batch_size(torch.device("cpu")) == CPU_BATCH
    monkeypatch.setattr(Forward, "blank", lambda self, images, device: torch.zeros(images, 3, 1, 1, dtype=torch.uint8))
    monkeypatch.setattr(Forward, "__call__", lambda self, images: tried.append(len(images)))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 500 + 1000 * tried[-1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    assert forward.batch_size(torch.device("cuda")) == expected
