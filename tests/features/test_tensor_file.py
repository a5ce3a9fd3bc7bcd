import errno
import os
import tracemalloc

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from regvit.features import tensor_file
from regvit.features.tensor_file import Scratch, open_tensors, write_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "b/ä": RNG.normal(size=(2, 5, 3)).astype(np.float32),
    "b/a": RNG.normal(size=(4, 7)),
    "z": RNG.integers(-9, 9, size=11),
    "a": RNG.normal(size=(3, 2)).astype(np.float32),
    "none": np.empty((0, 4), dtype=np.float32),
}
METADATA = {"about": '{"classes": ["çat", "a\\"b", "tab\\t"]}'}


def on_disk(values, folder):
    array = Scratch(folder).empty(values.shape, values.dtype)
    array[:] = values
    return array


@pytest.mark.parametrize("from_disk", [False, True])
@pytest.mark.parametrize("metadata", [METADATA, {"about": "x" * 7}])
def test_the_file_is_that_of_safetensors_to_the_byte(tmp_path, from_disk, metadata, monkeypatch):
    monkeypatch.setattr(tensor_file, "COPIED_AT_ONCE", 16)  # less than a row of some
    save_file(TENSORS, str(tmp_path / "theirs"), metadata=metadata)
    given = {name: on_disk(values, tmp_path) if from_disk else values for name, values in TENSORS.items()}
    write_tensors(tmp_path / "ours", given, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_safetensors_wrote_is_read_in_parts(tmp_path):
    save_file(TENSORS, str(tmp_path / "x"), metadata=METADATA)
    tensors, metadata = open_tensors(tmp_path / "x")
    assert metadata == METADATA and set(tensors) == set(TENSORS)
    for name, values in TENSORS.items():
        assert tensors[name].shape == values.shape and tensors[name].dtype == values.dtype
        np.testing.assert_array_equal(tensors[name][1:3], values[1:3])
        np.testing.assert_array_equal(np.asarray(tensors[name]), values)
    np.testing.assert_array_equal(tensors["b/ä"][1][2:], TENSORS["b/ä"][1, 2:])
    assert [each.shape for each in tensors["b/ä"]] == [(5, 3), (5, 3)]


def test_an_array_outlives_the_name_of_its_file(tmp_path):
    save_file(TENSORS, str(tmp_path / "x"))
    array = open_tensors(tmp_path / "x")[0]["z"]
    (tmp_path / "x").unlink()
    np.testing.assert_array_equal(array[:], TENSORS["z"])


def test_arrays_of_a_scratch_file_are_apart_and_the_file_has_no_name(tmp_path):
    scratch = Scratch(tmp_path)
    first, second = scratch.empty((2, 3), np.float32), scratch.empty((4,), np.int64)
    first[1:] = np.ones((1, 3))
    second[:] = [1, 2, 3, 4]
    assert first[:].tolist() == [[0, 0, 0], [1, 1, 1]] and second[:].tolist() == [1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_closed_with_its_last_array(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    array = Scratch(tmp_path).empty((2, 3), np.float32)[1]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del array
    assert len(os.listdir("/proc/self/fd")) == before


def test_large_arrays_are_copied_in_parts(tmp_path):
    array = Scratch(tmp_path).empty((2, 1 << 20, 8), np.float32)  # 64 MiB
    tracemalloc.start()
    write_tensors(tmp_path / "x", {"x": array}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * tensor_file.COPIED_AT_ONCE and (tmp_path / "x").stat().st_size > 1 << 26


def test_a_full_disk_is_told_when_it_is_met(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    array = Scratch(tmp_path).empty((2, 3), np.float32)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device"):
        array[:] = np.ones((2, 3))


def test_what_does_not_fit_is_refused(tmp_path):
    array = Scratch(tmp_path).empty((4, 3), np.float32)
    with pytest.raises(ValueError, match=r"values have shape \(3,\); expected \(2, 3\), that of the rows to write"):
        array[:2] = np.ones(3)
    with pytest.raises(ValueError, match="has step 2; rows on disk are read and written one after the other"):
        array[::2]
    with pytest.raises(IndexError, match=r"index 4 is out of range \(0 to 3\)"):
        array[4]
    with pytest.raises(ValueError, match="do not ask for copy=False"):
        array.__array__(copy=False)
    with pytest.raises(ValueError, match="tensor 'x' is int8; expected one of int64, float64, float32"):
        write_tensors(tmp_path / "x", {"x": np.zeros(3, np.int8)}, {})


def test_files_that_are_none_or_of_other_types_or_cut_are_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SafetensorError):
        open_tensors(tmp_path / "text")
    save_file({"x": np.zeros(3, np.int8)}, str(tmp_path / "bytes"))
    with pytest.raises(ValueError, match="has tensors of type I8; expected I64, F64, F32 only"):
        open_tensors(tmp_path / "bytes")
    save_file(TENSORS, str(tmp_path / "cut"))
    array = open_tensors(tmp_path / "cut")[0]["b/ä"]
    os.truncate(tmp_path / "cut", 16)
    with pytest.raises(EOFError, match="the file ends 120 bytes too early: it was cut while it was read"):
        array[:]
