"""Files, bytes, reading, writing and hashing of feature stores, against NumPy: `python -m benchmarks.stores`.

Writes one array of float16 features as a feature store and with `np.save`, reads both whole, and hashes both as DVC does
(MD5 of every file). CPU seconds, in turn; the disk is left out by reading what the system has cached. Rows of sizes that
were not measured say so: files and bytes follow from the format, seconds are extrapolated in proportion to the bytes.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.machine import describe, in_turn, seconds_of
from regvit.store import CHECKSUM_BYTES, FeatureStore, StoreWriter, default_rows_per_unit

SIZES, CHANNELS = (10_000, 100_000, 1_281_167), 1024
METADATA = 2  # zarr.json of the group and of the array
# NumPy copies memory into the system's cache. A store is rounded and checked for overflow, gets checksums, is synced to
# disk unit by unit, and is read through its checksums with a look for NaN. The ratio is the price of that, and no aim: at
# some 100 MB a second of the CPU it is far from what limits extraction.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=int, default=100_000, help="rows of the largest store that is really made")
    parser.add_argument("--channels", type=int, default=CHANNELS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "stores.json")
    given = parser.parse_args()
    rows, last = [], None
    for size in SIZES:
        if size <= given.measured:
            last = measured(size, given.channels)
            rows.append(last)
        elif last is not None:
            rows.append(extrapolated(size, given.channels, last))
    print("| rows | | files | MB | store: write | read | hash | numpy: write | read | hash |\n"
          "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for row in rows:
        print(f"| {row['rows']:,} | {row['how']} | {row['files']} | {row['bytes'] / 1e6:,.0f} | "
              + " | ".join(f"{row[key]:.2f} s" for key in KEYS) + " |")  # fmt: skip
    given.out.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")


KEYS = ("store_write", "store_read", "store_hash", "numpy_write", "numpy_read", "numpy_hash")


def measure(quick: bool = False) -> list[dict]:
    """Rows of the table of all benchmarks: writing and reading a store against NumPy."""
    n, channels = (2_000, 32) if quick else (50_000, CHANNELS)
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(Path(folder), n, channels)
        rounds = 1 if quick else 5
        write = in_turn(work.store_write, work.numpy_write, rounds)
        read = in_turn(work.store_read, work.numpy_read, rounds)
    detail = f"{n:,} × {channels} float16, {2 * n * channels / 1e6:,.0f} MB; CPU seconds, synced and checked"
    return [
        {"name": "store write / np.save", "ratio": write.ratio, "wanted": None, "detail": detail},
        {"name": "store read / np.load", "ratio": read.ratio, "wanted": None, "detail": detail},
    ]


def measured(rows: int, channels: int) -> dict:
    """Seconds, files and bytes of one size."""
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(Path(folder), rows, channels)
        took = {key: min(seconds_of(getattr(work, key)) for _ in range(2)) for key in KEYS}
        files = [path for path in work.store.rglob("*") if path.is_file()]
        found = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    assert found["files"] == n_files(rows), "the format has changed: correct n_files"
    return {"rows": rows, "how": "measured", **found, **took}


def extrapolated(rows: int, channels: int, known: dict) -> dict:
    """The same of a size that is not made."""
    unit = default_rows_per_unit(rows)
    units = -(-rows // unit)
    size = units * (unit * channels * 2 + CHECKSUM_BYTES)
    took = {key: known[key] * size / known["bytes"] for key in KEYS}
    return {"rows": rows, "how": "extrapolated", "files": n_files(rows), "bytes": size, **took}


def n_files(rows: int) -> int:
    """Files of a store of one array."""
    return -(-rows // default_rows_per_unit(rows)) + METADATA


class _Work:
    """One array, written, read and hashed both ways."""

    def __init__(self, folder: Path, rows: int, channels: int):
        self.folder, self.store, self.array = folder, folder / "x.zarr", folder / "x.npy"
        rng = np.random.default_rng(0)
        block = rng.standard_normal((min(rows, 10_000), channels), dtype=np.float32).astype(np.float16)
        self.values = np.resize(block, (rows, channels))
        self.made = 0

    def store_write(self) -> None:
        self.made += 1
        final = self.folder / f"{self.made}.zarr"
        with StoreWriter(
            final, self.folder / "partial", len(self.values), {"cls": self.values.shape[1:]}, {}
        ) as writer:
            for unit in writer.missing_units():
                start, stop = writer.unit_rows(unit)
                writer.write(unit, {"cls": self.values[start:stop]})
            writer.finish()
        self.store = final

    def store_read(self) -> None:
        store = FeatureStore.open(self.store)
        store.read_rows("cls", 0, len(store))

    def store_hash(self) -> None:
        for path in sorted(self.store.rglob("*")):
            if path.is_file():
                with open(path, "rb") as file:
                    hashlib.file_digest(file, "md5")

    def numpy_write(self) -> None:
        np.save(self.array, self.values)

    def numpy_read(self) -> None:
        np.load(self.array)

    def numpy_hash(self) -> None:
        with open(self.array, "rb") as file:
            hashlib.file_digest(file, "md5")


if __name__ == "__main__":
    main()
