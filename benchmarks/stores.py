"""Files, bytes, reading, writing and hashing of feature stores, against NumPy: `python -m benchmarks.stores`.

Writes float16 features as a feature store and with `np.save`, reads both whole, and hashes both as DVC does (MD5 of every
file). CPU seconds, the least of five; the disk is left out by reading what the system has cached. Rows of sizes that were not
measured say so: files and bytes follow from the format, seconds are extrapolated in proportion to the bytes.

Two kinds of stores, of a ViT-L/14 with four registers at 224 px: `features`, the three arrays that extraction leaves by
default (CLS, registers, patch mean; 12 KiB an image), and `patches`, all patch tokens (512 KiB an image), as segmentation
and depth read them.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.machine import ROUNDS, describe, in_turn, seconds_of
from regvit.features.store import ArraySpec, FeatureStore, Layout, default_rows_per_unit
from regvit.features.store_writer import write_store

CHANNELS, REGISTERS, PATCHES = 1024, 4, 256
KINDS: dict[str, dict[str, ArraySpec]] = {
    "features": {
        "cls": ArraySpec((CHANNELS,)),
        "registers": ArraySpec((REGISTERS, CHANNELS)),
        "patch_mean": ArraySpec((CHANNELS,)),
    },
    "patches": {"patches": ArraySpec((PATCHES, CHANNELS))},
}
MEASURED = {"features": (10_000, 30_000), "patches": (512,)}  # images; about 400 MB at most
IMAGENET = 1_281_167
Arrays = Mapping[str, ArraySpec]

# NumPy copies memory into the system's cache. A store is checked for overflow and NaN, gets checksums, is synced to disk unit
# by unit, and is read through its checksums with a look for NaN. The ratio is the price of that, and no aim: at 0.5 GB a
# second of the CPU and more it is far from what limits extraction.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "stores.json")
    given = parser.parse_args()
    rows = []
    for kind in given.kinds:
        found = [measured(size, KINDS[kind]) for size in MEASURED[kind]]
        found.append(extrapolated(IMAGENET, KINDS[kind], found[-1]))
        rows += [{"kind": kind} | row for row in found]
    print("| store | images | | files | MB | store: write | read | hash | numpy: write | read | hash |\n"
          "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for row in rows:
        print(f"| {row['kind']} | {row['rows']:,} | {row['how']} | {row['files']:,} | {row['bytes'] / 1e6:,.0f} | "
              + " | ".join(f"{row[key]:.2f} s" for key in KEYS) + " |")  # fmt: skip
    given.out.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")


KEYS = ("store_write", "store_read", "store_hash", "numpy_write", "numpy_read", "numpy_hash")


def measure(quick: bool = False) -> list[dict]:
    """Rows of the table of all benchmarks: writing and reading a store against NumPy."""
    n, channels = (2_000, 32) if quick else (50_000, CHANNELS)
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(Path(folder), n, {"cls": ArraySpec((channels,))})
        rounds = 1 if quick else ROUNDS
        write = in_turn(work.store_write, work.numpy_write, rounds)
        read = in_turn(work.store_read, work.numpy_read, rounds)
    detail = f"{n:,} × {channels} float16, {2 * n * channels / 1e6:,.0f} MB; CPU seconds, synced and checked"
    return [
        write.row("store write / np.save", None, detail),
        read.row("store read / np.load", None, detail),
    ]


def measured(rows: int, arrays: Arrays) -> dict:
    """Seconds, files and bytes of one size."""
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(Path(folder), rows, arrays)
        took = {key: min(seconds_of(getattr(work, key)) for _ in range(5)) for key in KEYS}
        files = [path for path in work.store.rglob("*") if path.is_file()]
        found = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    assert found["files"] == n_files(rows, arrays), "the format has changed: correct n_files"
    return {"rows": rows, "how": "measured", **found, **took}


def extrapolated(rows: int, arrays: Arrays, known: dict) -> dict:
    """The same of a size that is not made."""
    layout = Layout(rows, default_rows_per_unit(rows, arrays), arrays)
    size = layout.units * sum(layout.chunk_bytes(name) for name in arrays)
    took = {key: known[key] * size / known["bytes"] for key in KEYS}
    return {"rows": rows, "how": "extrapolated", "files": n_files(rows, arrays), "bytes": size, **took}


def n_files(rows: int, arrays: Arrays) -> int:
    """Files of a store: for each array a chunk a unit and its metadata, and the metadata of the group."""
    return len(arrays) * (-(-rows // default_rows_per_unit(rows, arrays)) + 1) + 1


class _Work:
    """Some arrays, written, read and hashed both ways."""

    def __init__(self, folder: Path, rows: int, arrays: Arrays):
        self.folder, self.store = folder, folder / "x.zarr"
        rng = np.random.default_rng(0)
        self.values = {}
        for name, spec in arrays.items():
            block = rng.standard_normal((min(rows, 1_000), *spec.shape), dtype=np.float32).astype(spec.dtype)
            self.values[name] = np.resize(block, (rows, *spec.shape))
        self.made = 0

    def store_write(self) -> None:
        self.made += 1
        final = self.folder / f"{self.made}.zarr"
        write_store(final, self.values, {})
        if self.made > 1:
            shutil.rmtree(self.store)
        self.store = final

    def store_read(self) -> None:
        store = FeatureStore.open(self.store)
        for name in self.values:
            store.read_rows(name, 0, len(store))

    def store_hash(self) -> None:
        for path in sorted(self.store.rglob("*")):
            if path.is_file():
                with open(path, "rb") as file:
                    hashlib.file_digest(file, "md5")

    def numpy_write(self) -> None:
        for name, values in self.values.items():
            np.save(self.folder / f"{name}.npy", values)

    def numpy_read(self) -> None:
        for name in self.values:
            np.load(self.folder / f"{name}.npy")

    def numpy_hash(self) -> None:
        for name in self.values:
            with open(self.folder / f"{name}.npy", "rb") as file:
                hashlib.file_digest(file, "md5")


if __name__ == "__main__":
    main()
