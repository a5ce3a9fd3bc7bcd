"""Writing a feature store to object storage, which has no rename, no lock that dies with its holder and no appending.

The finished store has the keys and the bytes of one in a folder. While it is written:

    <final>/…                     the zarr group, without `complete`: no reader opens it
    <partial>/owner               the lease of the one writer (`lease`)
    <partial>/resume.json         all that must agree for the work to be resumed
    <partial>/done/<unit>.json    the record of a finished unit, with the tag of each of its chunks

Guaranteed, as far as the storage keeps to S3's rules (objects are whole or absent; reads and lists see what was written;
puts conditional on `If-None-Match` and `If-Match`, which AWS has since 2024, MinIO, Ceph and R2 too):

- a store that opens is complete: `complete` is set by the last put of all, after every chunk of every record was found
  in the listing, under the tag that its writer got for it;
- a unit is done when its record is there; whoever is killed, at any moment, loses the units at work;
- one writer at a time: a second is refused, and may take over from one that was silent for a minute;
- a worker that outlived its writer writes nothing into a store begun anew with other settings, unless it was just then
  sending: such a chunk has another tag than the record and is done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.storage import MemoryStore

from regvit.features.lease import SECONDS, Lease
from regvit.features.storage import Bucket, Folder, place_of
from regvit.features.store import InvalidStore
from regvit.features.store_layout import FORMAT, Layout
from regvit.features.store_writer import OutOfReach, StoreWriter

RESUME = "resume.json"
REQUESTS = 16  # at the same time, where there is one for each unit


@dataclass(frozen=True)
class BucketUnitWriter:
    """Writes the chunks of units to object storage, and records nothing; it can be sent to another process.

    Attributes:
        final, partial: prefixes of the store and of the work.
        layout: of the store.
        resume_sha256: of `resume.json`, see `store_writer.UnitWriter`.
    """

    final: Bucket
    partial: Bucket
    layout: Layout
    resume_sha256: str

    def write(self, unit: int, arrays: Mapping[str, Shaped[np.ndarray, "b ..."]]) -> dict:
        """Puts the chunks of one unit.

        Args:
            arrays: features of the rows `layout.unit_rows(unit)`, any float type.
        Returns: what `record` is to be told: `{"chunks": {key: tag}}`.
        Raises:
            ValueError, UnstorableFeature: see `Layout.to_halves`; nothing of the unit is written.
            OutOfReach: the unfinished store is not there, or is another by now.
            StorageError: the storage refuses or cannot be reached.
        """
        halves = self.layout.to_halves(unit, arrays)
        start, stop = self.layout.unit_rows(unit)
        # zarr encodes into memory, so that each chunk is one put, whose answer has the tag.
        memory: dict = {}
        self.layout.create(MemoryStore(memory), {})
        for name, array in self.layout.open(MemoryStore(memory)).items():
            array[start:stop] = halves[name]
        self._check_place()
        chunks = {key: content for key, content in sorted(memory.items()) if not key.endswith("zarr.json")}
        return {"chunks": {key: self.final.put(key, content.to_bytes()) for key, content in chunks.items()}}

    def _check_place(self) -> None:
        try:
            found = hashlib.sha256(self.partial.read(RESUME)).hexdigest()
        except FileNotFoundError:
            raise OutOfReach(f"{self.partial} is no unfinished store any more; the unit is given up") from None
        if found != self.resume_sha256:
            raise OutOfReach(f"{self.partial} was begun anew with other settings; the unit is given up")


class BucketWriter(StoreWriter):
    """`StoreWriter` for object storage; use it in a `with` block.

    Args:
        final: URL of the store.
        partial: URL to work under; None is `<final>.partial`.
        storage_options: of the object storage, see `storage`. Workers on other machines get them too; what is not
            given, each takes from its own environment.
        lease: seconds of silence after which this writer counts as dead.
        The others: see `StoreWriter`.
    Raises:
        FileExistsError: on entering the block, `final` exists, or other objects lie under it.
        FolderLocked: on entering the block, another process is at work; later, another one took over.
        StorageError: the storage refuses or cannot be reached.
    """

    def __init__(
        self,
        final: str,
        partial: str | None,
        rows: int,
        arrays: Mapping[str, Sequence[int]],
        attributes: Mapping,
        rows_per_unit: int | None = None,
        resume_key: Mapping | None = None,
        storage_options: Mapping | None = None,
        lease: float = SECONDS,
    ):
        self._options, self._lease_seconds = dict(storage_options or {}), lease
        self._lease: Lease | None = None
        super().__init__(final, partial, rows, arrays, attributes, rows_per_unit, resume_key)

    def __enter__(self) -> BucketWriter:
        self._check_final()
        lease = Lease(self.partial, self._lease_seconds)
        lease.acquire()
        self._lease = lease
        try:
            self._check_final()  # its last writer may have finished since the first look
            self.records = self._resume() if self._resumable() else self._start()
        except BaseException:
            self._unlock()
            raise
        return self

    def unit_writer(self) -> BucketUnitWriter:
        """What writes the chunks of this store in another process; its units are done when they are recorded here."""
        self._require_lock()
        digest = hashlib.sha256(self._resume_bytes()).hexdigest()
        return BucketUnitWriter(self.final, self.partial, self.layout, digest)

    def record(self, unit: int, receipt: Mapping) -> None:
        """Records a unit as done whose chunks were put by a `unit_writer`.

        Args:
            receipt: what the `unit_writer` returned, and whatever else is to be known of the unit (plain JSON).
        """
        self._require_lock()
        record = {"unit": unit, **receipt}
        self.partial.put(_record_key(unit), json.dumps(record).encode() + b"\n")
        self.records[unit] = record

    def finish(self) -> None:
        """Marks the store complete and removes what was needed for the work.

        Raises:
            ValueError: units are missing.
            InvalidStore: a chunk is not the one that was recorded; its unit is missing from now on.
        """
        self._require_lock()
        if missing := self.missing_units():
            found = f"{len(missing)} of {self.units} units (the first is {missing[0]})"
            raise ValueError(f"{self.final} lacks {found}; write them first")
        if changed := self._drop_changed():
            raise InvalidStore(
                f"{self.final}: the chunks of {len(changed)} units (the first is {changed[0]}) are not those that were "
                "recorded; run the same again to do them anew"
            )
        group = self._metadata()
        zarr.open_group(MemoryStore(group), mode="r+", zarr_format=3).attrs["complete"] = True
        self._require_lock()
        self.final.put("zarr.json", group["zarr.json"].to_bytes())
        self._delete_records()
        self._unlock()

    def _check_final(self) -> None:
        """There is nothing under the final name but what an unfinished store of ours left."""
        objects = self.final.objects()
        if not objects:
            return
        try:
            attributes = json.loads(self.final.read("zarr.json")).get("attributes", {})
        except (FileNotFoundError, ValueError, AttributeError):
            attributes = {}
        if attributes.get("complete") is True:
            raise FileExistsError(f"{self.final} exists; delete it to extract it again")
        if attributes.get("format") != FORMAT:
            raise FileExistsError(
                f"{self.final} holds objects that are no feature store ({next(iter(objects))}); delete them or choose "
                "another URL"
            )

    def _resumable(self) -> bool:
        """Whether what is there is the beginning of this very store; `note` says why where it is not."""
        try:
            resume = self._resume_bytes()
        except FileNotFoundError:
            return False
        if not self._agrees(resume, f"{self.partial}/{RESUME}"):
            return False
        objects = self.final.objects()
        if not all(key in objects for key in self._metadata()):
            self.note = f"started anew: {self.final} has lost its arrays"
            return False
        return True

    def _start(self) -> dict[int, dict]:
        """An empty store. `resume.json` goes first and comes last: where it is, the rest is whole. The group's own
        `zarr.json`, by which the objects are known as ours, goes last and comes first."""
        self.partial.delete([RESUME])
        self._delete_records()
        self.final.delete(key for key in self.final.objects() if key != "zarr.json")
        metadata = self._metadata()
        for key in sorted(metadata, key=lambda key: key != "zarr.json"):
            self.final.put(key, metadata[key].to_bytes())
        self.partial.put(RESUME, json.dumps(self._description, indent=2).encode() + b"\n")
        return {}

    def _resume(self) -> dict[int, dict]:
        """The records of units whose chunks are there under the recorded tags; all other chunks are deleted."""
        keys = [key for key in self.partial.objects() if key.startswith("done/")]
        with ThreadPoolExecutor(REQUESTS) as pool:
            records = [json.loads(record) for record in pool.map(self.partial.read, keys)]
        self.records = {record["unit"]: record for record in records if record["unit"] in range(self.units)}
        self._drop_changed()
        kept = {key for record in self.records.values() for key in record["chunks"]} | set(self._metadata())
        self.final.delete(key for key in self.final.objects() if key not in kept)
        self.note = f"resumed: {len(self.records)} of {self.units} units were done"
        return self.records

    def _drop_changed(self) -> list[int]:
        """Units whose chunks are not those of their records; the records are taken back."""
        tags = {key: tag for key, (_, tag) in self.final.objects().items()}
        changed = [
            unit
            for unit, record in sorted(self.records.items())
            if any(tags.get(key) != tag for key, tag in record["chunks"].items())
        ]
        self.partial.delete(_record_key(unit) for unit in changed)
        for unit in changed:
            del self.records[unit]
        return changed

    def _delete_records(self) -> None:
        keys = [key for key in self.partial.objects() if key.startswith("done/")]
        self.partial.delete([*keys, RESUME])

    def _resume_bytes(self) -> bytes:
        return self.partial.read(RESUME)

    def _metadata(self) -> dict:
        """The empty store as zarr would lay it into a folder: buffers by key."""
        memory: dict = {}
        self.layout.create(MemoryStore(memory), self.attributes)
        return memory

    def _require_lock(self) -> None:
        if self._lease is None:
            raise RuntimeError("the writer is not open; use it in a `with` block")
        self._lease.check()

    def _unlock(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _places(self, final: str, partial: str | None) -> tuple[Bucket, Bucket]:
        final = place_of(final, self._options)
        partial = place_of(partial or f"{final}.partial", self._options)
        return final, partial


def store_writer(
    final: Path | str,
    partial: Path | str | None,
    rows: int,
    arrays: Mapping[str, Sequence[int]],
    attributes: Mapping,
    rows_per_unit: int | None = None,
    resume_key: Mapping | None = None,
    storage_options: Mapping | None = None,
) -> StoreWriter:
    """The writer of a store in a folder or on object storage, whichever `final` names.

    Args:
        final: path or URL of the store.
        partial: path or URL to work under; None is `<final>.partial`.
        storage_options: of the object storage; for a URL only.
        The others: see `StoreWriter`.
    Raises:
        ValueError: a URL of an unknown scheme, options for a folder, or `final` and `partial` are of different kinds.
    """
    arguments = rows, arrays, attributes, rows_per_unit, resume_key
    partial = f"{str(final).rstrip('/')}.partial" if partial is None else partial
    places = place_of(final, storage_options), place_of(partial, storage_options)
    if type(places[0]) is not type(places[1]):
        raise ValueError(f"final {final} and partial {partial} must both be folders or both be URLs")
    if isinstance(places[0], Folder):
        return StoreWriter(final, partial, *arguments)
    return BucketWriter(str(final), str(partial), *arguments, storage_options=storage_options)


def _record_key(unit: int) -> str:
    return f"done/{unit:08}.json"
