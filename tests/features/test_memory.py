import torch

from regvit.features.memory import UNKNOWN, available


def written(folder, **files):
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_the_machine_says_what_is_left_in_kibibytes(tmp_path):
    written(tmp_path, meminfo="MemTotal:  900 kB\nMemAvailable:  300 kB\n")
    assert available("cpu", tmp_path / "none", tmp_path / "meminfo") == 300 * 1024


def test_a_container_leaves_its_limit_less_what_it_holds_but_for_droppable_pages(tmp_path):
    written(tmp_path, meminfo="MemAvailable: 9999999 kB\n", memory__max="1000\n", memory__current="700\n",
            memory__stat="anon 400\ninactive_file 250\n")  # fmt: skip
    assert available("cpu", tmp_path, tmp_path / "meminfo") == 1000 - 700 + 250
    written(tmp_path, memory__max="max\n")
    assert available("cpu", tmp_path, tmp_path / "meminfo") == 9999999 * 1024


def test_where_the_system_says_nothing_some_gibibytes_are_assumed(tmp_path):
    assert available("cpu", tmp_path, tmp_path / "meminfo") == UNKNOWN


def test_a_gpu_is_asked_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456) if device.index == 1 else None)
    assert available("cuda:1") == 123


def test_this_machine_has_some_memory_left():
    assert 1 << 20 < available() < 1 << 50
