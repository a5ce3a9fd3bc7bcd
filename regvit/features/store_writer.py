"""Writing a feature store in a folder unit by unit, resumed where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.storage import LocalStore

from regvit.durable import append_record, lock_folder, move_folder, read_records, sync, write_record
from regvit.features.store_layout import FORMAT, FORMAT_VERSION, Layout, chunk_bytes, chunk_key, default_rows_per_unit

SEEN_WITHIN = 60.0  # seconds in which a network file system shows what another machine wrote


class OutOfReach(RuntimeError):
    """A process that should write units does not see the unfinished store, or others do not see what it wrote."""


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
            sync(self.partial / "store" / chunk_key(array, unit))
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
                (store / chunk_key(array, unit)).unlink(missing_ok=True)
        group.attrs.pop("complete", None)
        self.note = f"resumed: {len(done)} of {self.units} units were done"
        return done

    @cached_property
    def _zarrays(self) -> dict[str, zarr.Array]:
        return self.layout.open(LocalStore(self.partial / "store"))

    def _has_chunks(self, unit: int) -> bool:
        """Whether the chunks of a unit are there with their full size, in every array."""
        for array in self._zarrays.values():
            file = self.partial / "store" / chunk_key(array, unit)
            if not file.is_file() or file.stat().st_size != chunk_bytes(array):
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
