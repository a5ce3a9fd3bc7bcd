"""Small feature stores of made values, whole and interrupted, for the tests of reading and of writing them."""

from pathlib import Path

import numpy as np

from regvit.features.store import ArraySpec, FeatureStore
from regvit.features.store_writer import StoreWriter, write_store

ARRAYS = {"cls": ArraySpec((8,)), "registers": ArraySpec((2, 8)), "far": ArraySpec((3,), "bool")}
MADE_BY = {"backbone": "tiny", "weights_sha256": "ab", "transform": {"size": 32, "crop_pct": 1.0}}


def features(rows, start=0, stop=None):
    """Values that tell row, array and place apart."""
    rng = np.random.default_rng(0)
    whole = {name: rng.standard_normal((rows, *spec.shape)).astype(np.float32) for name, spec in ARRAYS.items()}
    return {name: (v > 0 if name == "far" else v)[start:stop] for name, v in whole.items()}


def fill(writer, units=None):
    for unit in writer.missing_units() if units is None else units:
        writer.write(unit, features(writer.layout.rows, *writer.layout.unit_rows(unit)))


def writer_of(folder, rows=10, per_unit=4, attributes=MADE_BY, arrays=ARRAYS, **more):
    return StoreWriter(folder / "made.zarr", folder / "made.partial", rows, arrays, attributes, per_unit, **more)


def make(folder, rows=10, per_unit=4, **changes):
    with writer_of(folder, rows, per_unit, MADE_BY | changes) as writer:
        fill(writer)
        writer.finish()
    return folder / "made.zarr"


def interrupted(folder, units=(0, 1), **more):
    """A store of three units of which some are done."""
    with writer_of(folder, **more) as writer:
        fill(writer, units)


# Readouts of every kind, and a store that has the arrays for them.

READOUTS = ("cls", "reg_mean", "patch_mean", "cls_reg", "cls_patch", "cls_reg_max", "cls_reg_1", "cls_reg_learned",
            "cls_reg_attn", "cls_noise")  # fmt: skip


def of_two_classes(path: Path) -> FeatureStore:
    """100 rows in units of 16, the class in CLS and in every register."""
    rng = np.random.default_rng(0)
    centre = np.repeat(np.eye(2, 6), 50, axis=0)  # sorted by class, as folders are
    arrays = {"cls": centre + 0.8 * rng.normal(size=(100, 6)), "patch_mean": rng.normal(size=(100, 6)),
              "registers": centre[:, None] + rng.normal(size=(100, 3, 6))}  # fmt: skip
    write_store(path, arrays, {"run": "r"}, 16)
    return FeatureStore.open(path)
