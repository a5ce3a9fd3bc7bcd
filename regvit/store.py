"""The feature store: arrays of features, one row an image, that another step can trust and read fast.

Format 1. A zarr v3 group in a folder `<name>.zarr`:

- arrays `cls (image, channel)`, `registers (image, register, channel)`, `patch_mean (image, channel)`, …, whichever
  the model has; little-endian float16, no compression, a CRC-32C after each chunk, `fill_value` NaN;
- row i is row i of the manifest, for every array;
- chunks cover `rows_per_unit` rows and all of the other axes. The rows of one chunk, in all arrays, are one *unit*.
  A store that holds `patches` has units of 32 rows (one image is up to some MB there), all others of 256 to 4,096;
- attributes: `format`, `format_version`, `rows`, `rows_per_unit`, `units`, `complete: true`, and what made the store
  (backbone, weights digest, run, transform, precision, manifest digest, …): no path, no time, no machine.

The bytes are a function of the attributes and the features: a store that was interrupted and resumed is the same,
byte for byte, as one that was not. Nothing in zarr itself tells a whole store from half of one (an absent chunk reads
as NaN), so `complete` is set last and `FeatureStore.open` holds every chunk file to its size.

While it is written, a store lives in another folder, `<…>.partial`:

    lock         held with flock by the one writer; says who that is
    resume.json  all that must agree for the work to be resumed
    done.jsonl   one line a finished unit, written after its chunks are on disk
    store/       the zarr group, renamed to its final name at the end

A unit is done when its line is there, and its chunks with it; whatever a killed writer left of other units is deleted and done again.
The writer needs a POSIX system (flock). Chunks may be written by other processes (`StoreWriter.unit_writer`), on other
machines too where they share the folder; the one writer alone records them. Stores on object storage, which has no
rename, no lock and no appending, are written by `bucket_writer` and read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Float, Shaped
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from .durable import append_record, lock_folder, move_folder, read_records, sync, write_record
from .halves import DTYPE, INFINITY, largest_bits, to_float, to_half
from .storage import Bucket, Folder, place_of

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
SEEN_WITHIN = 60.0  # seconds in which a network file system shows what another machine wrote


class InvalidStore(ValueError):
    """A feature store that is incomplete, damaged, or of other data than expected; the message names the cure."""


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


class OutOfReach(RuntimeError):
    """A process that should write units does not see the unfinished store, or others do not see what it wrote."""


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


def image_ids_digest(image_ids: Iterable[str]) -> str:
    """SHA-256 (hex) of the image ids joined by newlines: the proof of which image each row belongs to."""
    digest, before = hashlib.sha256(), ""
    for image_id in image_ids:
        digest.update(f"{before}{image_id}".encode())
        before = "\n"
    return digest.hexdigest()


def fingerprint(description: Mapping) -> str:
    """SHA-256 (hex) of plain JSON values, whatever the order of their keys.

    Raises:
        TypeError, ValueError: a value is not plain JSON.
    """
    return hashlib.sha256(json.dumps(description, sort_keys=True, allow_nan=False).encode()).hexdigest()


class FeatureStore:
    """A finished feature store, opened for reading by `FeatureStore.open`.

    Attributes:
        path: of the store, or its URL.
        attributes: what made it, and `rows`, `rows_per_unit`, `units`.
        arrays: shape of one row by array name, e.g. `{"cls": (384,), "registers": (1, 384)}`.
    """

    def __init__(self, place: Folder | Bucket, group: zarr.Group):
        self.path = place.path if isinstance(place, Folder) else place.url
        self._place, self._group = place, group
        self.attributes = dict(group.attrs)
        self.arrays = {name: array.shape[1:] for name, array in sorted(group.arrays())}

    def __len__(self) -> int:
        return self.attributes["rows"]

    @classmethod
    def open(
        cls,
        path: Path | str,
        manifest_digest: str | None = None,
        image_ids: Sequence[str] | None = None,
        storage_options: Mapping | None = None,
    ) -> FeatureStore:
        """Opens a store after checking that all of it is there and that it belongs to the data at hand.

        Args:
            path: of the store, `….zarr`, or its URL, `s3://bucket/….zarr`.
            manifest_digest: `Dataset.digest` that the features must have been made from; None asks for nothing.
            image_ids: of every row, in order; None asks for nothing.
            storage_options: of the object storage, see `storage`; for a URL only.
        Raises:
            FileNotFoundError: there is nothing at `path`.
            StorageError: the object storage refuses or cannot be reached.
            InvalidStore: not a feature store, of another format version, unfinished, with chunks missing or cut
                short, or of other images.
        """
        path = place_of(path, storage_options)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; run the extract stage, or `dvc pull` it")
        try:
            group = zarr.open_group(path.zarr(), mode="r", zarr_format=3)
        except (FileNotFoundError, NotADirectoryError, KeyError, ValueError) as error:
            raise InvalidStore(f"{path} is not a zarr v3 group ({error}); delete it and extract again") from error
        attributes = group.attrs
        if attributes.get("format") != FORMAT:
            found = attributes.get("format")
            raise InvalidStore(f"{path} has format {found!r}, expected {FORMAT!r}; give a store that `extract` made")
        if attributes.get("format_version") != FORMAT_VERSION:
            raise InvalidStore(
                f"{path} has format version {attributes.get('format_version')!r} and this code reads {FORMAT_VERSION}; "
                "extract again, or read it with the version that wrote it"
            )
        if attributes.get("complete") is not True:
            raise InvalidStore(f"{path} is unfinished: `complete` is not set; run the extract stage to its end")
        store = cls(path, group)
        store._check_chunks()
        store._check_origin(manifest_digest, image_ids)
        return store

    def read(self, name: str) -> Float[np.ndarray, "b ..."]:
        """A whole array as float32, shape (image, …).

        Raises:
            KeyError: the store has no such array.
            InvalidStore: a chunk fails its checksum, or holds NaN.
        """
        return to_float(self.read_rows(name, 0, len(self)))

    def read_rows(self, name: str, start: int, stop: int) -> Float[np.ndarray, "b ..."]:
        """Some rows of an array as they are stored (float16), shape (stop - start, …); whole units are read fastest.

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
        if largest_bits(values) > INFINITY:
            row = start + int(np.isnan(values).reshape(len(values), -1).any(1).argmax())
            raise InvalidStore(f"{self.path}, array {name!r}: row {row} is NaN, as if never written; extract again")
        return values

    def digest(self) -> str:
        """SHA-256 (hex) of all files of the store, names included; stores of equal digest are equal in every byte."""
        whole = hashlib.sha256()
        for key in self._place.sizes():
            whole.update(f"{self._place.digest(key)}  {key}\n".encode())
        return whole.hexdigest()

    def _check_chunks(self) -> None:
        """Every array has the rows of the attributes, and every chunk file is there with its full size."""
        rows, unit = self.attributes["rows"], self.attributes["rows_per_unit"]
        expected = self.attributes["arrays"]
        if expected != sorted(self.arrays):
            found = ", ".join(self.arrays) or "none"
            cure = "`dvc pull` all of it, or extract again"
            raise InvalidStore(f"{self.path} has the arrays {found}, expected {', '.join(expected)}; {cure}")
        sizes = self._place.sizes()
        for name, array in sorted(self._group.arrays()):
            if array.shape[0] != rows or array.chunks != (unit, *array.shape[1:]) or array.dtype != DTYPE:
                raise InvalidStore(
                    f"{self.path}, array {name!r} has shape {array.shape}, chunks {array.chunks}, type {array.dtype}, "
                    f"expected {rows} rows in chunks of {unit} and {DTYPE}; extract again"
                )
            size = _chunk_bytes(array)
            keys = [_chunk_key(array, u) for u in range(-(-rows // unit))]
            if missing := [key for key in keys if key not in sizes]:
                raise InvalidStore(
                    f"{self.path} lacks {len(missing)} of {len(keys)} chunks of array {name!r} ({', '.join(missing[:5])}"
                    f"{', …' if len(missing) > 5 else ''}); `dvc pull` all of it, or extract again"
                )
            if cut := [key for key in keys if sizes[key] != size]:
                found = f"{self.path}/{cut[0]} has {sizes[cut[0]]} bytes"
                raise InvalidStore(f"{found}, expected {size}; `dvc pull` it again, or extract again")

    def _check_origin(self, manifest_digest: str | None, image_ids: Sequence[str] | None) -> None:
        """The store was made from this manifest, with these images in this order."""
        found = self.attributes.get("manifest_sha256")
        if manifest_digest is not None and found != manifest_digest:
            raise InvalidStore(
                f"{self.path} was made from a manifest with SHA-256 {found}, and the data set at hand has "
                f"{manifest_digest}; its rows may be of other images: run the extract stage"
            )
        if image_ids is None:
            return
        if len(image_ids) != len(self):
            found = f"{len(self)} rows, and the data set {len(image_ids)} images"
            raise InvalidStore(f"{self.path} has {found}; run the extract stage")
        if image_ids_digest(image_ids) != self.attributes.get("image_ids_sha256"):
            raise InvalidStore(
                f"{self.path} has other images, or another order, than the data set; run the extract stage"
            )


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


@dataclass(frozen=True)
class UnitWriter:
    """Writes the chunks of units into an unfinished store, and records nothing; it can be sent to another process.

    Two may write the same unit at the same time: a chunk is renamed into place whole, and both have the same bytes.

    Attributes:
        partial: working folder of the `StoreWriter`, absolute.
        layout: of the store.
        resume_sha256: of `resume.json`. A process that outlives its `StoreWriter` must not write into what was begun
            anew in the same folder.
    """

    partial: Path
    layout: Layout
    resume_sha256: str

    def write(self, unit: int, arrays: Mapping[str, Shaped[np.ndarray, "b ..."]]) -> dict:
        """Writes one unit of every array; on return it is on disk.

        Args:
            arrays: features of the rows `layout.unit_rows(unit)`, any float type.
        Returns: what `StoreWriter.record` is to be told: nothing here.
        Raises:
            ValueError, UnstorableFeature: see `Layout.to_halves`; nothing of the unit is written.
            OutOfReach: the unfinished store is not there, or is another by now.
        """
        halves = self.layout.to_halves(unit, arrays)
        self._check_place()
        start, stop = self.layout.unit_rows(unit)
        for name, half in halves.items():
            array = self._zarrays[name]
            array[start:stop] = half
            sync(self.partial / "store" / _chunk_key(array, unit))
        return {}

    @cached_property
    def _zarrays(self) -> dict[str, zarr.Array]:
        return self.layout.open(LocalStore(self.partial / "store"))

    def _check_place(self) -> None:
        me = f"process {os.getpid()} on {socket.gethostname()}"
        try:
            found = hashlib.sha256((self.partial / "resume.json").read_bytes()).hexdigest()
        except FileNotFoundError:
            raise OutOfReach(
                f"{self.partial} is no unfinished store as {me} sees it; it must lie on a file system that all workers "
                "share, or the store on object storage (s3://…)"
            ) from None
        if found != self.resume_sha256:
            raise OutOfReach(f"{self.partial} was begun anew with other settings; {me} gives up its unit")


class StoreWriter:
    """Writes a feature store unit by unit, and goes on where a killed writer stopped; use it in a `with` block.

    Args:
        final: where the store goes when it is finished; must not exist.
        partial: folder to work in, best on the same file system; kept when the block ends early, removed by `finish`.
        rows: images.
        arrays: shape of one row by array name.
        attributes: plain JSON values that say what made the features; stored, and compared before resuming.
        rows_per_unit: rows of a unit; the default depends on `rows` and the names of the arrays alone.
        resume_key: plain JSON values that must also agree before resuming, and are not stored: code digest, versions.
    Attributes:
        layout: arrays and units.
        records: what was recorded of each unit that is done, by unit.
        note: one sentence on what was found in `partial`, "" where there was nothing.
    Raises:
        ValueError: no rows, no arrays, or a reserved attribute.
        FileExistsError: on entering the block, `final` exists.
        FolderLocked: on entering the block, another process is at work in `partial`.
    """

    def __init__(
        self,
        final: Path | str,
        partial: Path | str,
        rows: int,
        arrays: Mapping[str, Sequence[int]],
        attributes: Mapping,
        rows_per_unit: int | None = None,
        resume_key: Mapping | None = None,
    ):
        self.final, self.partial = self._places(final, partial)
        self.rows = rows
        self.rows_per_unit = default_rows_per_unit(rows, arrays) if rows_per_unit is None else rows_per_unit
        if rows < 1 or self.rows_per_unit < 1 or not arrays:
            raise ValueError(
                f"rows {rows} and rows_per_unit {self.rows_per_unit} must be at least 1, and there must be an array "
                f"(given: {', '.join(arrays) or 'none'})"
            )
        self.arrays = {name: tuple(int(n) for n in shape) for name, shape in sorted(arrays.items())}
        self.layout = Layout(rows, self.rows_per_unit, self.arrays)
        self.units = self.layout.units
        own = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "rows": rows,
            "rows_per_unit": self.rows_per_unit,
            "units": self.units,
            "arrays": list(self.arrays),
        }
        if taken := sorted(attributes.keys() & {*own, "complete"}):
            raise ValueError(f"attribute {taken[0]!r} is the store's own; name it otherwise")
        # Sorted, so that the bytes do not depend on the order in which a caller builds the dict.
        self.attributes = json.loads(json.dumps({**attributes, **own}, sort_keys=True, allow_nan=False))
        key = json.loads(json.dumps(resume_key or {}, allow_nan=False))
        shapes = {name: list(shape) for name, shape in self.arrays.items()}
        self._description = {"attributes": self.attributes, "shapes": shapes, "resume_key": key}
        self.note = ""
        self.records: dict[int, dict] = {}
        self._lock: int | None = None
        self._unit_writer: UnitWriter | None = None
        self._one_at_a_time = threading.Lock()

    def __enter__(self) -> StoreWriter:
        if self.final.exists():
            raise FileExistsError(f"{self.final} exists; delete it to extract it again")
        self._lock = lock_folder(self.partial)
        try:
            self.records = self._resume() if self._resumable() else self._start()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()

    def missing_units(self) -> list[int]:
        """Units still to be written, in order."""
        return [unit for unit in range(self.units) if unit not in self.records]

    def unit_rows(self, unit: int) -> tuple[int, int]:
        """First row of a unit, and the row after its last.

        Raises:
            IndexError: there is no such unit.
        """
        return self.layout.unit_rows(unit)

    def write(self, unit: int, arrays: Mapping[str, Shaped[np.ndarray, "b ..."]]) -> None:
        """Writes one unit of every array and records it as done; on return it is on disk.

        Threads may write different units at the same time.

        Args:
            arrays: features of the rows `unit_rows(unit)`, any float type; nobody may change them meanwhile.
        Raises:
            ValueError: an array is missing, unknown, or has another shape than (rows of the unit, …).
            UnstorableFeature: a value is not finite or beyond float16; nothing of the unit is written.
        """
        with self._one_at_a_time:
            if self._unit_writer is None:
                self._unit_writer = self.unit_writer()
        self.record(unit, self._unit_writer.write(unit, arrays))

    def unit_writer(self) -> UnitWriter:
        """What writes the chunks of this store in another process; its units are done when they are recorded here."""
        self._require_lock()
        digest = hashlib.sha256((self.partial / "resume.json").read_bytes()).hexdigest()
        return UnitWriter(self.partial.absolute(), self.layout, digest)

    def record(self, unit: int, receipt: Mapping) -> None:
        """Records a unit as done whose chunks were written by a `unit_writer`; on return the record is on disk.

        Args:
            receipt: what the `unit_writer` returned, and whatever else is to be known of the unit (plain JSON).
        Raises:
            OutOfReach: its chunks are not to be seen here, for a minute.
        """
        self._require_lock()
        self._await_chunks(unit)
        record = {"unit": unit, **receipt}
        with self._one_at_a_time:
            append_record(self.partial / "done.jsonl", record)
            self.records[unit] = record

    def finish(self) -> None:
        """Marks the store complete, renames it to its final name and removes the working folder.

        Raises:
            ValueError: units are missing.
            FileExistsError: `final` has come into being meanwhile.
        """
        self._require_lock()
        if missing := self.missing_units():
            found = f"{len(missing)} of {self.units} units (the first is {missing[0]})"
            raise ValueError(f"{self.partial} lacks {found}; write them first")
        if self.final.exists():
            raise FileExistsError(f"{self.final} exists; delete it, the finished work is in {self.partial}")
        store = self.partial / "store"
        _sweep(store)
        zarr.open_group(LocalStore(store), mode="r+", zarr_format=3).attrs["complete"] = True
        sync(store / "zarr.json")
        move_folder(store, self.final)
        shutil.rmtree(self.partial)
        self._unlock()

    def _resumable(self) -> bool:
        """Whether what is in `partial` is the beginning of this very store; `note` says why where it is not."""
        file = self.partial / "resume.json"
        if not file.exists() or not self._agrees(file.read_bytes(), str(file)):
            return False
        store = self.partial / "store"
        if not all((store / name / "zarr.json").exists() for name in (".", *self.arrays)):
            self.note = f"started anew: {self.partial} has lost its store"
            return False
        return True

    def _agrees(self, resume: bytes, where: str) -> bool:
        """Whether an unfinished store was described as this one is; `note` says how it was not."""
        try:
            old = json.loads(resume)
        except ValueError:  # of JSON or of UTF-8
            old = None
        if not isinstance(old, dict):
            self.note = f"started anew: {where} is damaged"
            return False
        if differences := _differences(old, self._description):
            self.note = "started anew, as the unfinished store differs: " + "; ".join(differences)
            return False
        return True

    def _start(self) -> dict[int, dict]:
        """An empty store. `resume.json` goes first and comes last: where it is, the rest is whole."""
        (self.partial / "resume.json").unlink(missing_ok=True)
        (self.partial / "done.jsonl").unlink(missing_ok=True)
        store = self.partial / "store"
        if store.exists():
            shutil.rmtree(store)
        self.layout.create(LocalStore(store), self.attributes)
        for name in self.arrays:
            sync(store / name / "zarr.json")
        sync(store / "zarr.json")
        write_record(self.partial / "resume.json", self._description)
        return {}

    def _resume(self) -> dict[int, dict]:
        """The records of units that are done; all that a killed writer left of others is deleted."""
        store = self.partial / "store"
        _sweep(store)
        group = zarr.open_group(LocalStore(store), mode="r+", zarr_format=3)
        recorded = {record.get("unit"): record for record in read_records(self.partial / "done.jsonl")}
        # A line is written after its chunks; only what came from outside (a cleaner, a copy) takes them away again.
        done = {unit: recorded[unit] for unit in range(self.units) if unit in recorded and self._has_chunks(unit)}
        for array in self._zarrays.values():
            for unit in set(range(self.units)) - done.keys():
                (store / _chunk_key(array, unit)).unlink(missing_ok=True)
        group.attrs.pop("complete", None)
        self.note = f"resumed: {len(done)} of {self.units} units were done"
        return done

    @cached_property
    def _zarrays(self) -> dict[str, zarr.Array]:
        return self.layout.open(LocalStore(self.partial / "store"))

    def _has_chunks(self, unit: int) -> bool:
        """Whether the chunks of a unit are there with their full size, in every array."""
        for array in self._zarrays.values():
            file = self.partial / "store" / _chunk_key(array, unit)
            if not file.is_file() or file.stat().st_size != _chunk_bytes(array):
                return False
        return True

    def _await_chunks(self, unit: int) -> None:
        """Waits until the chunks of a unit are seen here: network file systems show other machines' files late."""
        patience = time.monotonic() + SEEN_WITHIN
        while not self._has_chunks(unit):
            if time.monotonic() > patience:
                raise OutOfReach(
                    f"{self.partial} shows no chunks of unit {unit}, which another process wrote; it must lie on a file "
                    "system that all workers share, or the store on object storage (s3://…)"
                )
            for array in self._zarrays.values():
                os.listdir(self.partial / "store" / array.basename)  # asks the server anew what there is
            time.sleep(0.1)

    def _require_lock(self) -> None:
        if self._lock is None:
            raise RuntimeError("the writer is not open; use it in a `with` block")

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _places(self, final: Path | str, partial: Path | str) -> tuple[Path, Path]:
        return Path(final), Path(partial)


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


def _chunk_key(array: zarr.Array, unit: int) -> str:
    """Path, inside the store, of the chunk of one unit."""
    return f"{array.basename}/{array.metadata.encode_chunk_key((unit,) + (0,) * (array.ndim - 1))}"


def _chunk_bytes(array: zarr.Array) -> int:
    """Size of the file of a whole chunk, checksum included; those at the end are padded."""
    return math.prod(array.chunks) * DTYPE.itemsize + CHECKSUM_BYTES


def _differences(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """One phrase for each value that differs between two descriptions."""
    phrases = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            phrases += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            phrases.append(f"{prefix}{key} was {_short(before)} and is {_short(now)}")
    return phrases


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:12]}…{text[-4:]}"


def _sweep(folder: Path) -> None:
    """Deletes the temporary files that a killed zarr writer leaves."""
    for file in sorted(folder.rglob("*.partial")):
        file.unlink()
