"""What the stages of dense prediction share: the store with its splits, outliers of the untreated model, tables."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool

from regvit import files
from regvit.data.batches import Batches
from regvit.data.manifest import SPLITS, Dataset, read_dataset
from regvit.data.rows import Rows
from regvit.data.whole_images import WholeTransform
from regvit.features.store import FeatureStore, image_ids_digest
from regvit.measures.anatomy import open_subject
from regvit.measures.dense import PatchTokens
from regvit.pipeline.runtime import Runtime
from regvit.registers.outliers import patch_norms


@dataclass(frozen=True)
class DenseSet:
    """A data set with the patch tokens of the images that have ground truth, by split."""

    dataset: Dataset
    store: FeatureStore
    tokens: dict[str, PatchTokens]

    @property
    def tested(self) -> Rows:
        """Rows of the test split, in the order in which they are measured."""
        return self.dataset.rows.select(self.tokens["test"].rows)


def open_set(run: str, name: str, truth: str, stage: str) -> DenseSet:
    """The patch tokens that `extract_patches` left.

    Args:
        truth: the manifest's column with the ground truth: `mask` or `depth`.
        stage: that asks, for the message.
    Raises:
        ValueError: a split has no image with ground truth.
    """
    dataset = read_dataset(Path("data") / name)
    path = Path("features") / run / "patches" / f"{name}.zarr"
    store = FeatureStore.open(path, dataset.digest, dataset.rows.column("image_id"))
    truths = dataset.rows.column(truth)
    rows = {split: [i for i in dataset.split_rows(split).tolist() if truths[i]] for split in SPLITS}
    if lacking := [split for split in SPLITS if not rows[split]]:
        raise ValueError(f"data set {name} has no {lacking[0]} image with a {truth}; {stage} needs some in every split")
    return DenseSet(dataset, store, {split: PatchTokens(store, rows[split]) for split in SPLITS})


def untreated_outliers(
    run: str, of: DenseSet, img_size: int | None, runtime: Runtime
) -> Bool[np.ndarray, "b p"] | None:
    """Outliers of the test images in the run's backbone without registers; None where it has none."""
    torch.set_float32_matmul_precision("medium")  # norms differ by some 1e-4 of themselves
    subject = open_subject(Path(f"features/runs/{run}.json"), Path("data/backbones"), img_size, runtime.device)
    if subject.detection is None:
        return None
    batches = Batches(
        dataclasses.replace(of.dataset, rows=of.tested),
        WholeTransform.of(subject.untreated.transform),
        runtime.batch_size,
        runtime.workers,
        runtime.device,
        f"outliers {run}/{of.dataset.name}",
    )
    return patch_norms(subject.untreated.model, batches, [subject.detection.layer])[0] > subject.detection.threshold


def about(run: str, of: DenseSet) -> dict:
    """What the values of each image were measured on."""
    ids = image_ids_digest(of.tested.column("image_id"))
    return {"run": run, "dataset": of.dataset.name, "manifest_sha256": of.dataset.digest, "image_ids_sha256": ids}


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Iterable]) -> None:
    """A CSV; numbers with six digits, nothing where there is no value."""
    files.write_table(path, columns, ([_cell(value) for value in row] for row in rows))


def _cell(value: object) -> object:
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else round(float(value), 6)
    return "" if value is None else value
