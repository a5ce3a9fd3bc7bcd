"""A data set with what `dense_features` kept of its images under a run: the reading half, which needs no model.

Row i of the store is row i of `dataset`, the images that were drawn (`drawn_images`) in the manifest's order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from regvit.data.manifest import SPLITS, Dataset, read_dataset
from regvit.data.transform import Transform
from regvit.features.store import FeatureStore
from regvit.models.tokens import TokenLayout
from regvit.registers.outliers import Detection

GROUPS = ("patches", "norms", "attention", "inside")


@dataclass(frozen=True)
class DenseSet:
    """Images of a data set and the arrays of each, by row.

    Attributes:
        device: that arrays are handed out on.
    """

    dataset: Dataset
    store: FeatureStore
    device: str = "cpu"

    @classmethod
    def open(cls, data: Path, store: Path, device: str = "cpu") -> DenseSet:
        """Args: data: folder of the data set. store: made from it.

        Raises:
            FileNotFoundError, InvalidStore: the store is missing, unfinished, or of other images.
        """
        dataset, about = read_dataset(data), FeatureStore.open(store).attributes
        dataset = drawn_images(dataset, about["images"], about["seed"])
        return cls(dataset, FeatureStore.open(store, dataset.digest), device)

    @property
    def layout(self) -> TokenLayout:
        """Where CLS and registers stand in the run's model."""
        return TokenLayout(**self.store.attributes["layout"])

    @property
    def detection(self) -> Detection | None:
        """How outliers of the untreated model were told; None where it has none."""
        found = self.store.attributes["detection"]
        return found and Detection(found["layer"], found["threshold"], float("nan"))

    @property
    def transform(self) -> Transform:
        """What made an image the model's input."""
        return Transform.from_dict(self.store.attributes["transform"])

    @property
    def side(self) -> int:
        """Patches along a side of the grid."""
        return grid_side(self.store.arrays["outliers"][0])

    def rows(self, *splits: str, having: str = "") -> list[int]:
        """Rows of some splits, ascending; see `rows_having`."""
        return rows_having(self.dataset, splits, having)

    def image_ids(self, rows: Sequence[int]) -> list[str]:
        """Of some rows, in their order."""
        return list(self.dataset.rows.select(rows).column("image_id"))

    def batches(self, rows: Sequence[int], *names: str) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Arrays of ascending rows as float32, a unit of the store at a time, with their rows.

        Raises:
            KeyError: the store has not kept such an array.
        """
        if lacking := [name for name in names if name not in self.store.arrays]:
            raise KeyError(
                f"{self.store.path} has no {lacking[0]}; add its group to extract_dense.datasets.{self.dataset.name}.arrays"
            )
        layout = self.store.layout
        for unit, own in layout.by_unit(rows).items():
            first, last = layout.unit_rows(unit)
            held = {name: self.store.read_rows(name, first, last)[np.array(own) - first] for name in names}
            yield own, {name: torch.from_numpy(values).to(self.device).float() for name, values in held.items()}

    def read(self, name: str, rows: Sequence[int]) -> Float[np.ndarray, "b ..."]:
        """An array of ascending rows as float32."""
        return np.concatenate([arrays[name].cpu().numpy() for _, arrays in self.batches(rows, name)])

    def outliers(self, rows: Sequence[int]) -> Bool[np.ndarray, "b p"]:
        """Which patches are outliers in the untreated model."""
        return self.read("outliers", rows) > 0

    def images(self, rows: Sequence[int]) -> Float[Tensor, "b 3 s s"]:
        """The normalised images, as the model saw them."""
        return self.transform.normalise(load_images(self.dataset, self.transform, rows))

    def pictures(self, rows: Sequence[int]) -> Float[np.ndarray, "b s s 3"]:
        """The same with values from 0 to 1 and the channel last, as they are drawn."""
        return as_pictures(load_images(self.dataset, self.transform, rows))


def load_images(dataset: Dataset, transform: Transform, rows: Iterable[int]) -> UInt8[Tensor, "b 3 s s"]:
    """Some images of a data set, as they are normalised or drawn."""
    return torch.stack([transform.load(dataset.image_path(row)) for row in rows])


def as_pictures(pixels: UInt8[Tensor, "b 3 s s"]) -> Float[np.ndarray, "b s s 3"]:
    """Images with values from 0 to 1 and the channel last, as they are drawn."""
    return pixels.permute(0, 2, 3, 1).numpy() / 255


def rows_having(dataset: Dataset, splits: Sequence[str], column: str = "") -> list[int]:
    """Rows of some splits, ascending.

    Args:
        column: of the manifest, that must not be empty: `boxes`, `mask`, `depth` or `label`.
    Raises:
        ValueError: there are none.
    """
    rows = np.sort(np.concatenate([dataset.split_rows(split) for split in splits])).tolist()
    if column:
        values = dataset.rows.column(column)
        rows = [row for row in rows if values[row] not in ("", "[]")]
    if not rows:
        what = f"images with {column if column == 'boxes' else f'a {column}'}" if column else "images"
        raise ValueError(
            f"data set {dataset.name} has no {' or '.join(splits)} {what}; this measurement needs some: leave the set out of it"
        )
    return rows


def images_having(dataset: Dataset, splits: Sequence[str], column: str) -> Dataset:
    """The data set with the images of `rows_having` only."""
    return dataclasses.replace(dataset, rows=dataset.rows.select(rows_having(dataset, splits, column)))


def drawn_images(dataset: Dataset, images: int | None, seed: int) -> Dataset:
    """At most so many images of each split, drawn by the seed, in the manifest's order; all where None."""
    if images is None:
        return dataset
    generator = np.random.default_rng(seed)
    rows = [generator.permutation(dataset.split_rows(split))[:images] for split in SPLITS]
    return dataclasses.replace(dataset, rows=dataset.rows.select(np.sort(np.concatenate(rows))))


def grid_side(patches: int) -> int:
    """Patches along a side of a square grid.

    Raises:
        ValueError: the number is no square.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches make no square grid; give the backbone a square img_size")
    return side
