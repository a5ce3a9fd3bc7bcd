"""Arrays that lie on disk and are read and written in parts, and safetensors files of such arrays.

The `safetensors` library holds a whole file in memory when it writes one, and a memory map counts as memory of the process
and turns a full disk into a crash. Here bytes go through `pread` and `pwrite`, so that memory is that of the rows at hand.
Files are those that `safetensors.numpy.save_file` writes, byte for byte:

    8 bytes      length of the header, little-endian
    header       JSON: `__metadata__`, and dtype, shape and place of each tensor; spaces up to a multiple of 8 bytes
    tensors      one after the other, wide types first, then by name
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

DTYPES = {"I64": np.dtype("<i8"), "F64": np.dtype("<f8"), "F32": np.dtype("<f4")}  # in the order of the file
COPIED_AT_ONCE = 1 << 24  # bytes


class DiskArray:
    """An array in a file, in C order: `array[i]` is a part of it that is still on disk, `array[a:b]` is read now.

    `array[a:b] = values` is written at once. The file stays open, even where its name is gone, until the last array of it
    is.
    """

    def __init__(self, file: _File, offset: int, shape: tuple[int, ...], dtype: np.dtype):
        self._file, self._offset, self.shape, self.dtype = file, offset, shape, dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[DiskArray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, which: int | slice) -> DiskArray | np.ndarray:
        """Raises IndexError where the number is out of range, and ValueError where a slice leaves rows out."""
        if isinstance(which, slice):
            start, shape = self._rows(which)
            values = np.empty(shape, dtype=self.dtype)
            self._file.read(start, values)
            return values
        if not 0 <= which < len(self):
            raise IndexError(f"index {which} is out of range (0 to {len(self) - 1})")
        return DiskArray(self._file, self._offset + which * self._row_bytes, self.shape[1:], self.dtype)

    def __setitem__(self, which: slice, values: np.ndarray) -> None:
        """Raises ValueError where shapes do not fit, and OSError where the disk is full."""
        start, shape = self._rows(which)
        values = np.ascontiguousarray(values, dtype=self.dtype)
        if values.shape != shape:
            raise ValueError(f"values have shape {values.shape}; expected {shape}, that of the rows to write")
        self._file.write(start, values)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on disk is copied when it becomes one in memory; do not ask for copy=False")
        return np.asarray(self[:], dtype=dtype)

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:]))

    def _rows(self, which: slice) -> tuple[int, tuple[int, ...]]:
        start, stop, step = which.indices(len(self))
        if step != 1:
            raise ValueError(f"slice {which} has step {step}; rows on disk are read and written one after the other")
        return self._offset + start * self._row_bytes, (max(0, stop - start), *self.shape[1:])


class Scratch:
    """Room on disk for arrays that are too large for memory, in a file without a name: it goes with the last of them."""

    def __init__(self, folder: Path | str):
        """In this folder, which must exist and lie on a disk (/tmp may be memory)."""
        with tempfile.TemporaryFile(dir=folder) as file:
            self._file = _File(os.dup(file.fileno()))
        self._end = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype | type) -> DiskArray:
        """An array of zeros, like `numpy.empty`; it takes room on disk where it is written."""
        array = DiskArray(self._file, self._end, tuple(shape), np.dtype(dtype))
        self._end += array.nbytes
        self._file.reach(self._end)
        return array


def write_tensors(path: Path | str, tensors: Mapping[str, np.ndarray | DiskArray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file.

    Args:
        metadata: at most one key: safetensors does not fix the order of several.
    Raises:
        ValueError: a tensor is of a type that is none of `DTYPES`.
    """
    kinds = {}
    for name, values in tensors.items():
        kinds[name] = next((kind for kind, dtype in DTYPES.items() if dtype == values.dtype), None)
        if kinds[name] is None:
            raise ValueError(
                f"tensor {name!r} is {values.dtype}; expected one of {', '.join(map(str, DTYPES.values()))}"
            )
    header, end = {"__metadata__": metadata}, 0
    names = sorted(tensors, key=lambda name: (list(DTYPES).index(kinds[name]), name.encode()))
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": kinds[name], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in _parts(tensors[name]):
                file.write(np.ascontiguousarray(part).data)


def open_tensors(path: Path | str) -> tuple[dict[str, DiskArray], dict[str, str]]:
    """The tensors of a safetensors file, still on disk, and its metadata.

    Raises:
        SafetensorError: it is no safetensors file, or not whole.
        ValueError: a tensor is of a type that is none of `DTYPES`.
    """
    with safe_open(str(path), framework="numpy"):  # checks the header, and that the file has the size that it tells
        file = _File(os.open(path, os.O_RDONLY))
    length = np.empty(1, dtype="<u8")
    file.read(0, length)
    text = np.empty(int(length[0]), dtype=np.uint8)
    file.read(8, text)
    header = json.loads(text.tobytes())
    metadata = header.pop("__metadata__", {})
    if strange := sorted({about["dtype"] for about in header.values()} - set(DTYPES)):
        raise ValueError(f"{path} has tensors of type {', '.join(strange)}; expected {', '.join(DTYPES)} only")
    tensors = {
        name: DiskArray(file, 8 + len(text) + about["data_offsets"][0], tuple(about["shape"]), DTYPES[about["dtype"]])
        for name, about in header.items()
    }
    return tensors, metadata


def _parts(values: np.ndarray | DiskArray) -> Iterator[np.ndarray]:
    """All of the array in pieces that fit into memory."""
    if isinstance(values, np.ndarray):
        yield values
    elif values.ndim > 2:
        for each in values:
            yield from _parts(each)
    else:
        rows = max(1, COPIED_AT_ONCE * len(values) // max(1, values.nbytes))
        yield from (values[start : start + rows] for start in range(0, len(values), rows))


class _File:
    """A descriptor that is closed when nobody uses it any more."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def read(self, offset: int, values: np.ndarray) -> None:
        """Fills the values.

        Raises:
            EOFError: the file ends before.
        """
        left = memoryview(values.reshape(-1).view(np.uint8))
        while left:
            done = os.preadv(self._descriptor, [left], offset)
            if not done:
                raise EOFError(
                    f"the file ends {len(left)} bytes too early: it was cut while it was read; make it again"
                )
            left, offset = left[done:], offset + done

    def write(self, offset: int, values: np.ndarray) -> None:
        left = memoryview(values.reshape(-1).view(np.uint8))
        while left:
            done = os.pwrite(self._descriptor, left, offset)
            left, offset = left[done:], offset + done

    def reach(self, size: int) -> None:
        """Makes the file that long; what is not written reads as zeros."""
        os.ftruncate(self._descriptor, size)

    def __del__(self):
        os.close(self._descriptor)
