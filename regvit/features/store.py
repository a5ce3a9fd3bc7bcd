"""The feature store: arrays of features, one row an image, that another step can trust and read fast.

Format 2. A zarr v3 group in a folder `<name>.zarr`:

- arrays such as `cls (image, channel)`, `registers (image, register, channel)`, `patch_mean (image, channel)`, `patches
  (image, patch, channel)`; float16 unless said otherwise, no compression, a CRC-32C after each chunk, `fill_value` NaN
  (0 where the type has none);
- row i is row i of the manifest, for every array;
- chunks cover `rows_per_unit` rows and all of the other axes. The rows of one chunk, in all arrays, are one *unit*;
- attributes: `format`, `format_version`, `rows`, `rows_per_unit`, `units`, `arrays`, `complete: true`, and what made the
  store (backbone, weights digest, run, transform, precision, manifest digest, …): no path, no time, no machine.

The bytes are a function of the attributes and the features: a store that was interrupted and resumed is the same, byte
for byte, as one that was not. Nothing in zarr itself tells a whole store from half of one (an absent chunk reads as
NaN), so `complete` is set last and `FeatureStore.open` holds every chunk file to its size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

FORMAT, FORMAT_VERSION = "regvit features", 2
CHECKSUM_BYTES = 4  # CRC-32C after each chunk: free to write and read (measured), and zeroed bytes do not go unseen
DTYPES = ("float16", "float32", "bool", "uint8", "int16", "int32", "int64")
AXES = {
    "cls": ("image", "channel"),
    "registers": ("image", "register", "channel"),
    "patch_mean": ("image", "channel"),
    "patches": ("image", "patch", "channel"),
}
WRITE_CONFIG = {
    # It renames whole chunks into place; with `zarrs` a kill in mid-write left broken ones.
    "codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    # Without a look whether all of a chunk is the fill value: three times faster, and every chunk has its file.
    "array.write_empty_chunks": True,
}
# A unit is what an interrupt can lose. Sets of up to 16,384 images may be made on a CPU at some 10 images a second:
# 256 rows are half a minute. From 64 units on they grow, so that a store stays some hundred files, up to 4,096 rows
# (a few MB a chunk; larger ones read no faster). It depends on the data set alone: chunks are part of the bytes.
SMALLEST_UNIT, LARGEST_UNIT, UNITS_BEFORE_GROWTH = 256, 4096, 64
# Patch tokens take hundreds of times more: their units are as many images as fill a chunk, and at least FEWEST_ROWS.
CHUNK_BYTES, FEWEST_ROWS = 16 << 20, 8


class InvalidStore(ValueError):
    """A feature store that is incomplete, damaged, or of other data than expected; the message names the cure."""


class ArraySpec(NamedTuple):
    """What an array holds of one image: its shape, and one of `DTYPES`."""

    shape: tuple[int, ...]
    dtype: str = "float16"

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def fingerprint(description: Mapping) -> str:
    """SHA-256 (hex) of plain JSON values, whatever the order of their keys.

    Raises:
        TypeError, ValueError: a value is not plain JSON.
    """
    return hashlib.sha256(json.dumps(description, sort_keys=True, allow_nan=False).encode()).hexdigest()


def default_rows_per_unit(rows: int, arrays: Mapping[str, ArraySpec]) -> int:
    """Rows of a unit for a store of `rows` images: a power of two from 256 (up to 16,384 images) to 4,096, and fewer
    where a chunk would outgrow CHUNK_BYTES."""
    size = SMALLEST_UNIT
    while size < LARGEST_UNIT and size * UNITS_BEFORE_GROWTH < rows:
        size *= 2
    largest = max(spec.row_bytes for spec in arrays.values())
    while size > FEWEST_ROWS and size * largest > CHUNK_BYTES:
        size //= 2
    return size


@dataclass(frozen=True)
class Layout:
    """What arrays a store has, and how their rows are parted into units; the last unit may have fewer rows."""

    rows: int
    rows_per_unit: int
    arrays: Mapping[str, ArraySpec]

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

    def by_unit(self, rows: Iterable[int]) -> dict[int, list[int]]:
        """Rows by the unit that they lie in, in the order given."""
        units: dict[int, list[int]] = {}
        for row in rows:
            units.setdefault(row // self.rows_per_unit, []).append(row)
        return units

    def chunk(self, name: str, unit: int) -> str:
        """Path, inside the store, of the chunk of one unit: it spans all axes but the first."""
        return f"{name}/" + ".".join(["c", str(unit), *["0"] * len(self.arrays[name].shape)])

    def chunk_bytes(self, name: str) -> int:
        """Size of the file of a chunk, checksum included; those at the end are padded."""
        return self.rows_per_unit * self.arrays[name].row_bytes + CHECKSUM_BYTES

    def create(self, folder: Path, attributes: Mapping) -> None:
        """The group and its arrays, all of them empty."""
        with zarr.config.set(WRITE_CONFIG):
            group = zarr.create_group(LocalStore(folder), attributes=dict(attributes), zarr_format=3)
            for name, spec in self.arrays.items():
                axes = AXES.get(name, ())
                group.create_array(
                    name,
                    shape=(self.rows, *spec.shape),
                    chunks=(self.rows_per_unit, *spec.shape),
                    dtype=spec.dtype,
                    fill_value=math.nan if np.dtype(spec.dtype).kind == "f" else 0,
                    chunk_key_encoding={"name": "default", "separator": "."},  # flat: no folder for each chunk
                    filters=None,
                    compressors=[Crc32cCodec()],
                    dimension_names=axes if len(axes) == len(spec.shape) + 1 else None,
                )

    def open(self, folder: Path) -> dict[str, zarr.Array]:
        """The arrays, to be written to."""
        with zarr.config.set(WRITE_CONFIG):
            group = zarr.open_group(LocalStore(folder), mode="r+", zarr_format=3)
            return {name: group[name] for name in self.arrays}


class FeatureStore:
    """A finished feature store, opened for reading by `FeatureStore.open`.

    Attributes:
        path: of the store.
        attributes: what made it, and `rows`, `rows_per_unit`, `units`.
        arrays: shape of one row by array name, e.g. `{"cls": (384,), "registers": (1, 384)}`.
        layout: with the types too.
    """

    def __init__(self, path: Path, group: zarr.Group):
        self.path, self._group, self.attributes = path, group, dict(group.attrs)
        found = {name: ArraySpec(array.shape[1:], str(array.dtype)) for name, array in sorted(group.arrays())}
        self.layout = Layout(self.attributes["rows"], self.attributes["rows_per_unit"], found)
        self.arrays = {name: spec.shape for name, spec in found.items()}

    def __len__(self) -> int:
        return self.layout.rows

    @classmethod
    def open(cls, path: Path | str, manifest_digest: str | None = None) -> FeatureStore:
        """Opens a store after checking that all of it is there and that it belongs to the data at hand.

        Args:
            path: of the store, `….zarr`.
            manifest_digest: `Dataset.digest` that the features must have been made from; None asks for nothing.
        Raises:
            FileNotFoundError: there is nothing at `path`.
            InvalidStore: not a feature store, of another format version, unfinished, with chunks missing or cut
                short, or of other images.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; run the extract stage, or `dvc pull` it")
        try:
            group = zarr.open_group(LocalStore(path), mode="r", zarr_format=3)
        except (FileNotFoundError, NotADirectoryError, KeyError, ValueError) as error:
            raise InvalidStore(f"{path} is not a zarr v3 group ({error}); delete it and extract again") from error
        kind, version = group.attrs.get("format"), group.attrs.get("format_version")
        if kind != FORMAT:
            raise InvalidStore(f"{path} has format {kind!r}, expected {FORMAT!r}; give a store that `extract` made")
        if version != FORMAT_VERSION:
            raise InvalidStore(
                f"{path} has format version {version!r} and this code reads {FORMAT_VERSION}; extract again, or read it "
                "with the version that wrote it"
            )
        if group.attrs.get("complete") is not True:
            raise InvalidStore(f"{path} is unfinished: `complete` is not set; run the extract stage to its end")
        store = cls(path, group)
        store._check_chunks()
        found = store.attributes.get("manifest_sha256")
        if manifest_digest is not None and found != manifest_digest:
            raise InvalidStore(
                f"{path} was made from a manifest with SHA-256 {found}, and the data set at hand has {manifest_digest}; "
                "its rows may be of other images: run the extract stage"
            )
        return store

    def read(self, name: str) -> Shaped[np.ndarray, "b ..."]:
        """A whole array, shape (image, …); float16 comes as float32, other types as they are.

        Raises:
            KeyError: the store has no such array.
            InvalidStore: a chunk fails its checksum, or holds NaN.
        """
        values = self.read_rows(name, 0, len(self))
        return values.astype(np.float32) if values.dtype == np.float16 else values

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "b ..."]:
        """Some rows of an array as they are stored, shape (stop - start, …); whole units are read fastest.

        Args:
            start, stop: first row, and the row after the last.
        Raises:
            IndexError: the rows are out of range.
            KeyError, InvalidStore: see `read`.
        """
        if name not in self.arrays:
            raise KeyError(f"{self.path} has no array {name!r}; it has {', '.join(self.arrays)}")
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} are out of range: {self.path} has rows 0 to {len(self)}")
        try:
            values = self._group[name][start:stop]
        except ValueError as error:
            cure = "a chunk is damaged: `dvc pull` it or extract again"
            raise InvalidStore(f"{self.path}, array {name!r}: {error}; {cure}") from error
        if values.dtype.kind == "f" and np.isnan(values).any():
            row = start + int(np.isnan(values).reshape(len(values), -1).any(1).argmax())
            raise InvalidStore(f"{self.path}, array {name!r}: row {row} is NaN, as if never written; extract again")
        return values

    def _check_chunks(self) -> None:
        """Every array has the rows of the attributes, and every chunk file is there with its full size."""
        if self.attributes["arrays"] != list(self.arrays):
            found, expected = ", ".join(self.arrays) or "none", ", ".join(self.attributes["arrays"])
            cure = "`dvc pull` all of it, or extract again"
            raise InvalidStore(f"{self.path} has the arrays {found}, expected {expected}; {cure}")
        for name, array in sorted(self._group.arrays()):
            shape, chunks = (len(self), *self.arrays[name]), (self.layout.rows_per_unit, *self.arrays[name])
            if array.shape != shape or array.chunks != chunks:
                raise InvalidStore(
                    f"{self.path}, array {name!r} has shape {array.shape} and chunks {array.chunks}, expected {shape} and "
                    f"{chunks}; extract again"
                )
            files = [self.path / self.layout.chunk(name, unit) for unit in range(self.layout.units)]
            if missing := [file.name for file in files if not file.is_file()]:
                raise InvalidStore(
                    f"{self.path} lacks {len(missing)} of {len(files)} chunks of array {name!r} ({', '.join(missing[:5])}"
                    f"{', …' if len(missing) > 5 else ''}); `dvc pull` all of it, or extract again"
                )
            size = self.layout.chunk_bytes(name)
            if cut := [file for file in files if file.stat().st_size != size]:
                found = f"{cut[0]} has {cut[0].stat().st_size} bytes"
                raise InvalidStore(f"{found}, expected {size}; `dvc pull` it again, or extract again")
