"""Readouts of a feature store that are read when they are asked for: arrays of which a part is in memory at a time.

    train = stored_readouts(store, ["cls", "cls_reg"], rows)  # rows of the train split
    train["cls_reg"].shape      # (images, channels), as of an array
    train["cls_reg"][0:4096]    # float32, read now

Rows come out as `readouts.readout` would give them for the whole store, bit for bit (`cls_random`: but for the rounding of
a matrix product, once in many millions of values), so whoever takes an array in blocks or by rows takes one of these, and
its memory does not grow with the images. Two ways of reading, by what is asked for:

- a slice reads whole units through zarr, which holds each chunk to its checksum: for passes over everything;
- an array of row numbers reads just these rows, each out of its chunk file: chunks are plain rows with a checksum at the
  end, which is not looked at. For random batches, after a pass has been made: zarr would read whole chunks for them. A
  memory map would count as memory of the process, so it is `pread`.

The readouts that are made together share what they read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int

from regvit.features.readouts import CONTROLS, FeatureSource, InMemory, arrays_needed, noise_spread, readout
from regvit.features.store import CHECKSUM_BYTES, FeatureStore, InvalidStore

ROWS_AT_ONCE = 4096  # of a pass over everything: 32 MiB of float32 at 2,048 channels


def blocks(n: int, rows: int | None = None) -> Iterator[slice]:
    """0 to n in slices of so many rows; None: `ROWS_AT_ONCE`."""
    rows = ROWS_AT_ONCE if rows is None else rows
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def stored_readouts(
    features: FeatureSource, names: Iterable[str], rows: Int[np.ndarray, " b"]
) -> dict[str, StoredReadout | Float[np.ndarray, "b d"]]:
    """Some readouts of some rows: arrays where `features` are in memory, else read when they are asked for.

    Args:
        rows: of the store, ascending.
    Raises:
        ValueError: a readout is unknown, or cannot be made from these arrays; the message says why.
    """
    if not isinstance(features, FeatureStore):
        return {name: readout(features, name)[rows] for name in names}
    reader = _Reader(features, np.asarray(rows))
    return {name: StoredReadout(reader, name) for name in names}


class StoredReadout:
    """One readout of some rows of a store, like a float32 array (b, d): `shape`, `len`, slices and row numbers."""

    ndim, dtype = 2, np.dtype(np.float32)

    def __init__(self, reader: _Reader, name: str):
        self._reader, self.name = reader, name
        one = InMemory({array: np.zeros((1, *shape), np.float32) for array, shape in reader.store.arrays.items()})
        self.shape = (len(reader.rows), readout(one, name).shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        """Rows as float32; a slice in whole units, row numbers one by one."""
        arrays = {array: self._reader.read(array, which) for array in arrays_needed(self.name)}
        spread = self._reader.spread() if self.name in CONTROLS else None
        return readout(InMemory({array: v.astype(np.float32) for array, v in arrays.items()}), self.name, spread)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def identity(self) -> str:
        """SHA-256 (hex) of what decides the values: name and rows, the store's attributes and its chunks' checksums."""
        return self._reader.identity(self.name)


class _Reader:
    """Rows of the arrays of a store as they are stored; what was read last is kept, as several readouts ask for it."""

    def __init__(self, store: FeatureStore, rows: Int[np.ndarray, " b"]):
        if len(rows) and (np.diff(rows) <= 0).any():
            raise ValueError("rows are not in ascending order, each once; sort them, and order the labels alike")
        self.store, self.rows, self._unit_rows = store, rows, store.layout.rows_per_unit
        self._last: dict[str, tuple[object, np.ndarray]] = {}  # by array: what was asked for, and what was read
        self._unit: dict[str, tuple[int, np.ndarray]] = {}  # by array: the unit that the last slice ended in
        self._spread: np.ndarray | None = None

    def read(self, array: str, which: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n ..."]:
        by_units = isinstance(which, slice)
        key = which.indices(len(self.rows)) if by_units else np.asarray(which).tobytes()
        if array not in self._last or self._last[array][0] != key:
            wanted = self.rows[which]
            values = np.empty((len(wanted), *self.store.arrays[array]), self.store.layout.arrays[array].dtype)
            (self._read_units if by_units else self._read_rows)(array, wanted, values)
            self._last[array] = (key, values)
        return self._last[array][1]

    def spread(self) -> Float[np.ndarray, " d"]:
        """Standard deviation of each channel of CLS over all images of the store, which scales the noise of a control."""
        if self._spread is None:
            units = range(self.store.layout.units)
            self._spread = noise_spread(lambda: (self._read_unit("cls", unit) for unit in units))
        return self._spread

    def identity(self, name: str) -> str:
        found = hashlib.sha256(json.dumps([name, self.store.attributes], sort_keys=True).encode())
        found.update(np.ascontiguousarray(self.rows, dtype="<i8").data)
        for array in arrays_needed(name):
            for unit in range(self.store.layout.units):
                with open(self.store.path / self.store.layout.chunk(array, unit), "rb") as file:
                    file.seek(-CHECKSUM_BYTES, os.SEEK_END)
                    found.update(file.read())
        return found.hexdigest()

    def _read_units(self, array: str, wanted: Int[np.ndarray, " n"], values: Float[np.ndarray, "n ..."]) -> None:
        units = wanted // self._unit_rows
        for unit in np.unique(units).tolist():
            if array not in self._unit or self._unit[array][0] != unit:
                self._unit[array] = (unit, self._read_unit(array, unit))
            here = units == unit
            values[here] = self._unit[array][1][wanted[here] - unit * self._unit_rows]

    def _read_unit(self, array: str, unit: int) -> Float[np.ndarray, "n ..."]:
        return self.store.read_rows(array, *self.store.layout.unit_rows(unit))

    def _read_rows(self, array: str, wanted: Int[np.ndarray, " n"], values: Float[np.ndarray, "n ..."]) -> None:
        size, lines = self.store.layout.arrays[array].row_bytes, values.reshape(len(wanted), -1).view(np.uint8)
        units = wanted // self._unit_rows
        for unit in np.unique(units).tolist():
            path = self.store.path / self.store.layout.chunk(array, unit)
            with open(path, "rb", buffering=0) as file:
                for place in np.flatnonzero(units == unit).tolist():
                    row = int(wanted[place]) - unit * self._unit_rows
                    if os.preadv(file.fileno(), [lines[place]], row * size) != size:
                        raise InvalidStore(f"{path} ends before row {row}; `dvc pull` it, or extract again")
