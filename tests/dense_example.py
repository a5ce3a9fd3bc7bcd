"""A data set of drawn images with arrays of each in a store, as `extract_dense` would leave them."""

from pathlib import Path

import numpy as np
from PIL import Image

from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.transform import Transform
from regvit.features.dense_set import DenseSet
from regvit.features.store import FeatureStore
from regvit.features.store_writer import write_store


def patch_store(folder: Path, patches: np.ndarray, rows_per_unit: int = 4) -> FeatureStore:
    """A store of patch tokens alone."""
    write_store(folder / "made.zarr", {"patches": patches}, {}, rows_per_unit)
    return FeatureStore.open(folder / "made.zarr")


def dense_set(
    folder: Path,
    arrays: dict[str, np.ndarray],
    rows: list[Row] | None = None,
    sizes: list[tuple[int, int]] | None = None,
    side: int = 4,
    **attributes: object,
) -> DenseSet:
    """Noise images of the sizes given, and their arrays; `outliers` are nowhere unless given.

    Args:
        rows: of the manifest, by default test images `0.png`, `1.png`, ….
        side: patches along a side; of 4 px each.
        attributes: in place of those of a model with CLS and one test-time register.
    """
    n, rng = len(next(iter(arrays.values()))), np.random.default_rng(0)
    rows = rows or [Row(f"{i}", f"{i}.png", "", "test") for i in range(n)]
    folder.mkdir(exist_ok=True)
    for row, (width, height) in zip(rows, sizes or [(4 * side, 4 * side)] * n, strict=True):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / row.path)
    write_dataset(folder, folder.name, rows, sorted({row.label for row in rows} - {""}), {})
    dataset = read_dataset(folder)
    about = {
        "images": None,
        "seed": 0,
        "layout": {"cls": 1, "trained": 0, "test_time": 1},
        "inside_layers": [],
        "detection": None,
        "transform": Transform(4 * side, (0.5,) * 3, (0.5,) * 3).whole().to_dict(),
        "manifest_sha256": dataset.digest,
    }
    arrays = {"outliers": np.zeros((n, side**2), dtype=bool), **arrays}
    write_store(folder / "made.zarr", arrays, about | attributes, rows_per_unit=4)
    return DenseSet.open(folder, folder / "made.zarr")
