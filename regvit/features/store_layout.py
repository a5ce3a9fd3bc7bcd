"""What a feature store is cut into and made of: units, chunks, float16 (the format stands in `store`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import zarr
from jaxtyping import Float, Shaped
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec

from regvit.features.float16 import DTYPE, INFINITY, largest_bits, to_half

FORMAT, FORMAT_VERSION = "regvit features", 1
CHECKSUM_BYTES = 4  # CRC-32C after each chunk: free to write and read (measured), and zeroed bytes do not go unseen
LARGEST = float(np.finfo(np.float16).max)  # 65504
DIMENSIONS = {
    "cls": ("image", "channel"),
    "registers": ("image", "register", "channel"),
    "patch_mean": ("image", "channel"),
    "patches": ("image", "patch", "channel"),
}
WRITE_CONFIG = {
    # It renames whole chunks into place; with `zarrs` a kill in mid-write left broken ones.
    "codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    # Without a look whether all of a chunk is the fill value, which is NaN and refused before.
    "array.write_empty_chunks": True,
}
# A unit is what an interrupt can lose. Sets of up to 16,384 images may be made on a CPU at some 10 images a second:
# 256 rows are half a minute. From 64 units on they grow, so that a store stays some hundred files, up to 4,096 rows
# (a few MB a chunk; larger ones read no faster). It depends on the data set alone: chunks are part of the bytes.
SMALLEST_UNIT, LARGEST_UNIT, UNITS_BEFORE_GROWTH = 256, 4096, 64
# Patch tokens are hundreds of times larger: 32 images are 6 MB (ViT-S/14 at 224 px) to 90 MB (ViT-L/14 at 518 px), and
# readers that shuffle do so by units. 20,000 images of the largest kind are 57 GB in 630 files: keep such sets small.
UNIT_OF_PATCHES = 32


class UnstorableFeature(ValueError):
    """A feature that float16 cannot hold: NaN, infinity, or beyond ±65504.

    Attributes: array (its name), row (of the whole store), value (the offending one).
    """

    def __init__(self, array: str, row: int, value: float):
        what = "is not a finite number" if not math.isfinite(value) else f"is beyond float16 (±{LARGEST:g})"
        super().__init__(f"array {array!r}, row {row}: {value:g} {what}")
        self.array, self.row, self.value = array, row, value

    def __reduce__(self) -> tuple:
        return type(self), (self.array, self.row, self.value)  # it comes from other processes too


def default_rows_per_unit(rows: int, arrays: Iterable[str] = ()) -> int:
    """Rows of a unit for a store of `rows` images: a power of two from 256 (up to 16,384 images) to 4,096.

    Args:
        arrays: names of the arrays; with `patches` among them a unit is 32 rows.
    """
    if "patches" in arrays:
        return UNIT_OF_PATCHES
    size = SMALLEST_UNIT
    while size < LARGEST_UNIT and size * UNITS_BEFORE_GROWTH < rows:
        size *= 2
    return size


@dataclass(frozen=True)
class Layout:
    """What arrays a store has, and how their rows are parted into units.

    Attributes:
        rows: images.
        rows_per_unit: rows of a unit; the last may have fewer.
        arrays: shape of one row by array name.
    """

    rows: int
    rows_per_unit: int
    arrays: Mapping[str, tuple[int, ...]]

    @property
    def units(self) -> int:
        """How many there are."""
        return -(-self.rows // self.rows_per_unit)

    def unit_rows(self, unit: int) -> tuple[int, int]:
        """First row of a unit, and the row after its last.

        Raises:
            IndexError: there is no such unit.
        """
        if not 0 <= unit < self.units:
            raise IndexError(f"unit {unit} is out of range (0 to {self.units - 1})")
        return unit * self.rows_per_unit, min((unit + 1) * self.rows_per_unit, self.rows)

    def to_halves(
        self, unit: int, arrays: Mapping[str, Shaped[np.ndarray, "b ..."]]
    ) -> dict[str, Float[np.ndarray, "b ..."]]:
        """The features of one unit as float16.

        Raises:
            ValueError: an array is missing, unknown, or has another shape than (rows of the unit, …).
            UnstorableFeature: a value is not finite or beyond float16.
        """
        start, stop = self.unit_rows(unit)
        if arrays.keys() != self.arrays.keys():
            raise ValueError(f"unit {unit} has the arrays {sorted(arrays)}, expected {list(self.arrays)}")
        halves = {}
        for name, shape in self.arrays.items():
            if (found := tuple(arrays[name].shape)) != (stop - start, *shape):
                raise ValueError(f"unit {unit}, array {name!r} has shape {found}, expected {(stop - start, *shape)}")
            halves[name] = _to_half(name, arrays[name], start)
        return halves

    def create(self, store: Store, attributes: Mapping) -> zarr.Group:
        """The group and its arrays, all of them empty."""
        with zarr.config.set(WRITE_CONFIG):
            group = zarr.create_group(store, attributes=dict(attributes), zarr_format=3)
            for name, shape in self.arrays.items():
                dimensions = DIMENSIONS.get(name, ())
                group.create_array(
                    name,
                    shape=(self.rows, *shape),
                    chunks=(self.rows_per_unit, *shape),
                    dtype=DTYPE,
                    fill_value=float("nan"),
                    chunk_key_encoding={"name": "default", "separator": "."},  # flat: no folder for each chunk
                    filters=None,
                    compressors=[Crc32cCodec()],
                    dimension_names=dimensions if len(dimensions) == len(shape) + 1 else None,
                )
        return group

    def open(self, store: Store) -> dict[str, zarr.Array]:
        """The arrays, to be written to."""
        with zarr.config.set(WRITE_CONFIG):
            group = zarr.open_group(store, mode="r+", zarr_format=3)
            return {name: group[name] for name in self.arrays}


def _to_half(name: str, values: Shaped[np.ndarray, "b ..."], start: int) -> Float[np.ndarray, "b ..."]:
    """The features as float16.

    Raises:
        UnstorableFeature: names the first row with a value that float16 cannot hold.
    """
    half = to_half(values)
    if largest_bits(half) >= INFINITY:
        bad = ~np.isfinite(half)
        place = np.unravel_index(bad.argmax(), bad.shape)
        raise UnstorableFeature(name, start + int(place[0]), float(values[place]))
    return half


def chunk_key(array: zarr.Array, unit: int) -> str:
    """Path, inside the store, of the chunk of one unit."""
    return f"{array.basename}/{array.metadata.encode_chunk_key((unit,) + (0,) * (array.ndim - 1))}"


def chunk_bytes(array: zarr.Array) -> int:
    """Size of the file of a whole chunk, checksum included; those at the end are padded."""
    return math.prod(array.chunks) * DTYPE.itemsize + CHECKSUM_BYTES
