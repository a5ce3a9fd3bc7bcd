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

A unit is done when its line is there, and its chunks with it; whatever a killed writer left of other units is deleted
and done again. The writer (`store_writer`) needs a POSIX system (flock). Chunks may be written by other processes
(`StoreWriter.unit_writer`), on other machines too where they share the folder; the one writer alone records them. Stores
on object storage, which has no rename, no lock and no appending, are written by `bucket_writer` and read here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Float

from regvit.features.float16 import DTYPE, INFINITY, largest_bits, to_float
from regvit.features.storage import Bucket, Folder, place_of
from regvit.features.store_layout import FORMAT, FORMAT_VERSION, chunk_bytes, chunk_key


class InvalidStore(ValueError):
    """A feature store that is incomplete, damaged, or of other data than expected; the message names the cure."""


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
            size = chunk_bytes(array)
            keys = [chunk_key(array, u) for u in range(-(-rows // unit))]
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
