"""A small feature store whose readouts tell two classes apart."""

from pathlib import Path

import numpy as np

from regvit.features.store import FeatureStore
from regvit.features.store_writer import write_store

NAMES = ("cls", "reg_mean", "patch_mean", "cls_reg", "cls_patch", "cls_reg_max", "cls_reg_1", "cls_reg_learned",
         "cls_reg_attn", "cls_noise")  # fmt: skip


def stored(folder: Path) -> FeatureStore:
    """100 rows in units of 16, the class in every array; sorted by class, as folders are."""
    rng = np.random.default_rng(0)
    centre = np.repeat(np.eye(2, 6), 50, axis=0)
    arrays = {"cls": centre + 0.8 * rng.normal(size=(100, 6)), "patch_mean": rng.normal(size=(100, 6)),
              "registers": centre[:, None] + rng.normal(size=(100, 3, 6))}  # fmt: skip
    write_store(folder / "x.zarr", arrays, {"run": "r"}, 16)
    return FeatureStore.open(folder / "x.zarr")
