"""Writing a feature store unit by unit, so that whatever dies, nothing is lost but the units at work.

While it is written, a store lives in another folder, `<…>.partial`:

    lock, holder  held by the one writer (filelock); who that is
    resume.json   all that must agree for the work to be resumed
    done/<unit>   there when all chunks of the unit are on disk; says which device computed it
    store/        the zarr group, renamed to its final name at the end

A unit is done when its record is there, and its chunks with it; whatever a killed writer left of other units is deleted
and done again. Chunks may be written by other processes (`StoreWriter.unit_writer`), on other machines too where they
share the folder; the one writer alone records them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.storage import LocalStore

from regvit.features.store import DTYPES, FORMAT, FORMAT_VERSION, ArraySpec, Layout, default_rows_per_unit
from regvit.files import locked, sync, sync_folder, write_json


class UnstorableFeature(ValueError):
    """A feature that its array cannot hold: NaN, infinity, or beyond ±65504 in float16.

    Attributes: array (its name), row (of the whole store).
    """

    def __init__(self, array: str, row: int, value: float):
        super().__init__(f"array {array!r}, row {row}: {value:g} is no finite number, or was beyond float16 (±65504)")
        self.array, self.row, self.value = array, row, value

    def __reduce__(self) -> tuple:
        return type(self), (self.array, self.row, self.value)  # it comes from other processes too


class OutOfReach(RuntimeError):
    """A process that should write units does not see the unfinished store, or sees another."""


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

    def write(self, unit: int, arrays: Mapping[str, Shaped[np.ndarray, "b ..."]]) -> None:
        """Writes one unit of every array; on return it is on disk.

        Args:
            arrays: values of the rows `layout.unit_rows(unit)`; floats are rounded to the type of the array.
        Raises:
            ValueError: an array is missing, unknown, or of another shape than (rows of the unit, …) or of another kind.
            UnstorableFeature: a value is not finite or beyond float16; nothing of the unit is written.
            OutOfReach: the unfinished store is not there, or is another by now.
        """
        start, stop = self.layout.unit_rows(unit)
        if arrays.keys() != self.layout.arrays.keys():
            raise ValueError(f"unit {unit} has the arrays {sorted(arrays)}, expected {list(self.layout.arrays)}")
        stored = {name: _fitting(name, arrays[name], spec, start, stop) for name, spec in self.layout.arrays.items()}
        self.check_place()
        for name, values in stored.items():
            self._zarrays[name][start:stop] = values
            sync(self.partial / "store" / self.layout.chunk(name, unit))

    @cached_property
    def _zarrays(self) -> dict[str, zarr.Array]:
        return self.layout.open(self.partial / "store")

    def check_place(self) -> None:
        """Raises OutOfReach where the unfinished store is not there, or is another by now."""
        me = f"process {os.getpid()} on {socket.gethostname()}"
        try:
            found = hashlib.sha256((self.partial / "resume.json").read_bytes()).hexdigest()
        except FileNotFoundError:
            raise OutOfReach(
                f"{self.partial} is no unfinished store as {me} sees it; it must lie on a file system that all workers "
                "share"
            ) from None
        if found != self.resume_sha256:
            raise OutOfReach(f"{self.partial} was begun anew with other settings; {me} gives up its unit")


def _fitting(
    name: str, values: Shaped[np.ndarray, "b ..."], spec: ArraySpec, start: int, stop: int
) -> Shaped[np.ndarray, "b ..."]:
    """The values in the type of their array, after a look at shape, kind and range."""
    if values.shape != (stop - start, *spec.shape):
        raise ValueError(f"rows {start} to {stop}, array {name!r} has shape {values.shape}, expected "
                         f"{(stop - start, *spec.shape)}")  # fmt: skip
    wanted = np.dtype(spec.dtype)
    if values.dtype.kind != wanted.kind:
        raise ValueError(f"array {name!r} is to hold {wanted} and was given {values.dtype}")
    with np.errstate(over="ignore"):
        stored = np.asarray(values, dtype=wanted)
    if wanted.kind == "f" and not np.isfinite(stored).all():
        place = np.unravel_index((~np.isfinite(stored)).argmax(), stored.shape)
        raise UnstorableFeature(name, start + int(place[0]), float(values[place]))
    return stored


class StoreWriter:
    """Writes a feature store unit by unit, and goes on where a killed writer stopped; use it in a `with` block.

    Args:
        final: where the store goes when it is finished; must not exist.
        partial: folder to work in, on the same file system; kept when the block ends early, removed by `finish`.
        rows: images.
        arrays: what each holds of one image.
        attributes: plain JSON values that say what made the features; stored, and compared before resuming.
        rows_per_unit: rows of a unit; the default depends on `rows` and the arrays alone.
        resume_key: plain JSON values that must also agree before resuming, and are not stored: code digest, versions.
    Attributes:
        layout: arrays and units.
        done: units that are recorded, and on which device each was computed.
        note: one sentence on what was found in `partial`, "" where there was nothing.
    Raises:
        ValueError: no rows, no arrays, an unknown type, or a reserved attribute.
        FileExistsError: on entering the block, `final` exists.
        FolderLocked: on entering the block, another process is at work in `partial`.
    """

    def __init__(
        self,
        final: Path | str,
        partial: Path | str,
        rows: int,
        arrays: Mapping[str, ArraySpec],
        attributes: Mapping,
        rows_per_unit: int | None = None,
        resume_key: Mapping | None = None,
    ):
        self.final, self.partial = Path(final), Path(partial)
        if rows < 1 or not arrays or (rows_per_unit is not None and rows_per_unit < 1):
            raise ValueError(
                f"rows {rows} and rows_per_unit {rows_per_unit} must be at least 1, and there must be an array "
                f"(given: {', '.join(arrays) or 'none'})"
            )
        specs = {name: ArraySpec(tuple(map(int, shape)), dtype) for name, (shape, dtype) in sorted(arrays.items())}
        if unknown := [spec.dtype for spec in specs.values() if spec.dtype not in DTYPES]:
            raise ValueError(f"type {unknown[0]} cannot be stored; expected one of {', '.join(DTYPES)}")
        self.layout = Layout(rows, rows_per_unit or default_rows_per_unit(rows, specs), specs)
        own = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "rows": rows,
            "rows_per_unit": self.layout.rows_per_unit,
            "units": self.layout.units,
            "arrays": list(specs),
        }
        if taken := sorted(attributes.keys() & {*own, "complete"}):
            raise ValueError(f"attribute {taken[0]!r} is the store's own; name it otherwise")
        # Sorted, so that the bytes do not depend on the order in which a caller builds the dict.
        self.attributes = json.loads(json.dumps({**attributes, **own}, sort_keys=True, allow_nan=False))
        description = {"attributes": self.attributes, "arrays": specs, "resume_key": resume_key or {}}
        self._description = json.loads(json.dumps(description, allow_nan=False))
        self.note, self.done = "", {}
        self._held: ExitStack | None = None
        self._store = self.partial / "store"

    def __enter__(self) -> StoreWriter:
        with ExitStack() as stack:
            stack.enter_context(locked(self.partial))
            if self.final.exists():
                raise FileExistsError(f"{self.final} exists; delete it to extract it again")
            self.done = self._resume() if self._agrees() else self._start()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            self._held.close()
        self._held = None

    def missing_units(self) -> list[int]:
        """Units still to be written, in order."""
        return [unit for unit in range(self.layout.units) if unit not in self.done]

    def write(self, unit: int, arrays: Mapping[str, Shaped[np.ndarray, "b ..."]]) -> None:
        """Writes one unit of every array and records it as done; on return it is on disk. Raises as `UnitWriter.write`.

        Threads may write different units at the same time; nobody may change the arrays meanwhile.
        """
        self._own_writer.write(unit, arrays)
        self.record(unit)

    def unit_writer(self) -> UnitWriter:
        """What writes the chunks of this store in another process; its units are done when they are recorded here."""
        self._require_lock()
        digest = hashlib.sha256((self.partial / "resume.json").read_bytes()).hexdigest()
        return UnitWriter(self.partial.absolute(), self.layout, digest)

    @cached_property
    def _own_writer(self) -> UnitWriter:
        return self.unit_writer()

    def record(self, unit: int, device: str = "") -> None:
        """Records a unit as done whose chunks were written by a `unit_writer`; on return the record is on disk."""
        self._require_lock()
        path = self.partial / "done" / str(unit)
        path.write_text(device, encoding="utf-8")
        sync(path)
        self.done[unit] = device

    def finish(self) -> None:
        """Marks the store complete, renames it to its final name and removes the working folder.

        Raises:
            ValueError: units are missing.
            FileExistsError: `final` has come into being meanwhile.
        """
        self._require_lock()
        if missing := self.missing_units():
            found = f"{len(missing)} of {self.layout.units} units (the first is {missing[0]})"
            raise ValueError(f"{self.partial} lacks {found}; write them first")
        if self.final.exists():
            raise FileExistsError(f"{self.final} exists; delete it, the finished work is in {self.partial}")
        _sweep(self._store)
        zarr.open_group(LocalStore(self._store), mode="r+", zarr_format=3).attrs["complete"] = True
        sync(self._store / "zarr.json")
        self.final.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self._store, self.final)
        sync_folder(self.final.parent)
        shutil.rmtree(self.partial)

    def _agrees(self) -> bool:
        """Whether what is in `partial` is the beginning of this very store; `note` says why where it is not."""
        file = self.partial / "resume.json"
        if not file.exists():
            return False
        try:
            old = json.loads(file.read_bytes())
        except ValueError:  # of JSON or of UTF-8
            old = None
        if not isinstance(old, dict):
            self.note = f"started anew: {file} is damaged"
        elif differing := _differences(old, self._description):
            self.note = f"started anew, as the unfinished store differs: {', '.join(differing)}"
        elif not all((self._store / name / "zarr.json").exists() for name in (".", *self.layout.arrays)):
            self.note = f"started anew: {self.partial} has lost its store"
        return not self.note

    def _start(self) -> dict[int, str]:
        """An empty store. `resume.json` goes first and comes last: where it is, the rest is whole."""
        (self.partial / "resume.json").unlink(missing_ok=True)
        for folder in (self.partial / "done", self._store):
            if folder.exists():
                shutil.rmtree(folder)
        (self.partial / "done").mkdir()
        self.layout.create(self._store, self.attributes)
        for name in (*self.layout.arrays, "."):
            sync(self._store / name / "zarr.json")
        write_json(self.partial / "resume.json", self._description)
        return {}

    def _resume(self) -> dict[int, str]:
        """The units that are done; all that a killed writer left of others is deleted."""
        _sweep(self._store)
        (self.partial / "done").mkdir(exist_ok=True)
        recorded = {file.name: file for file in (self.partial / "done").iterdir()}
        done = {}
        for unit in range(self.layout.units):
            # A record is written after its chunks; only what came from outside (a cleaner, a copy) takes them away again.
            if str(unit) in recorded and self._has_chunks(unit):
                done[unit] = recorded[str(unit)].read_text(encoding="utf-8", errors="replace")
                continue
            for name in self.layout.arrays:
                (self._store / self.layout.chunk(name, unit)).unlink(missing_ok=True)
        zarr.open_group(LocalStore(self._store), mode="r+", zarr_format=3).attrs.pop("complete", None)
        self.note = f"resumed: {len(done)} of {self.layout.units} units were done"
        return done

    def _has_chunks(self, unit: int) -> bool:
        """Whether the chunks of a unit are there with their full size, in every array."""
        for name in self.layout.arrays:
            file = self._store / self.layout.chunk(name, unit)
            if not file.is_file() or file.stat().st_size != self.layout.chunk_bytes(name):
                return False
        return True

    def _require_lock(self) -> None:
        if self._held is None:
            raise RuntimeError("the writer is not open; use it in a `with` block")


def write_store(
    path: Path | str,
    values: Mapping[str, Shaped[np.ndarray, "b ..."]],
    attributes: Mapping,
    rows_per_unit: int | None = None,
) -> None:
    """Arrays in memory as a feature store: floats as float16, other types as they are."""
    arrays = {
        name: ArraySpec(array.shape[1:], "float16" if array.dtype.kind == "f" else str(array.dtype))
        for name, array in values.items()
    }
    rows = len(next(iter(values.values())))
    with StoreWriter(path, f"{path}.partial", rows, arrays, attributes, rows_per_unit) as writer:
        for unit in writer.missing_units():
            start, stop = writer.layout.unit_rows(unit)
            writer.write(unit, {name: array[start:stop] for name, array in values.items()})
        writer.finish()


def _differences(old: Mapping, new: Mapping) -> list[str]:
    """The names of the values that differ between two descriptions, of the inner ones where both are blocks."""
    names = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            names += _differences(before, now)
        elif before != now:
            names.append(key)
    return names


def _sweep(folder: Path) -> None:
    """Deletes the temporary files that a killed zarr writer leaves."""
    for file in sorted(folder.rglob("*.partial")):
        file.unlink()
