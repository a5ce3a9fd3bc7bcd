import psutil
import pytest
import torch

from regvit.features.memory import available


@pytest.mark.parametrize(("limit", "expected"), [("1000", 1000 - 700 + 250), ("100", 0), ("max", 9000), (None, 9000)])
def test_a_container_leaves_its_limit_less_what_it_holds_but_for_droppable_pages(
    tmp_path, monkeypatch, limit, expected
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 9000}))
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    assert available("cpu", tmp_path) == expected


def test_a_gpu_is_asked_itself_and_this_machine_has_some_left(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456) if device.index == 1 else None)
    assert available("cuda:1") == 123
    assert 1 << 20 < available() < 1 << 50
