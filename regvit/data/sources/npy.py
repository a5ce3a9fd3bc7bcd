"""Images in arrays: one `.npy` file with its labels beside it, as CIFAR-10.1 and CIFAR-10-C are published.

| file | labels | what it is |
|---|---|---|
| `cifar10.1_v6_data.npy` | `cifar10.1_v6_labels.npy` | images (b, h, w, 3) uint8, labels (b,) |
| `CIFAR-10-C/fog.npy` | `CIFAR-10-C/labels.npy` | severities 1 to 5 one after the other: b = 5 × images; `:3` takes one |

Labels are whole numbers, and classes are called by them: `classes: {airplane: [0], …}` gives them names.
Arrays of Python objects are refused, as they are pickles.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.manifest import Row

SEVERITIES = 5


def npy(builder: DatasetBuilder, rest: str) -> None:
    """`<file>.npy[:severity]`: images written as PNG."""
    path, _, severity = rest.rpartition(":") if rest.rpartition(":")[2].isdigit() else (rest, "", "")
    file = Path(path).expanduser()
    images, labels = _load(file), _load(_labels_beside(file))
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"{file} is {images.dtype} {images.shape}; expected uint8 images of shape (b, h, w, 3)")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) != len(images):
        raise ValueError(f"the labels beside {file} are {labels.dtype} {labels.shape}; expected {len(images)} integers")
    numbers = range(len(images))
    if severity:
        size = len(images) // SEVERITIES
        if not 1 <= int(severity) <= SEVERITIES or len(images) % SEVERITIES:
            raise ValueError(f"severity {severity} of {file}, which has {len(images)} images: severities are 1 to "
                             f"{SEVERITIES}, in as many equal parts; leave `:{severity}` out to take all")  # fmt: skip
        numbers = numbers[(int(severity) - 1) * size : int(severity) * size]
    builder.credit_to("images", file.name)
    add_arrays(
        builder, [Row(f"{file.stem}_{i:06}", "", str(labels[i]), "") for i in numbers], [images[i] for i in numbers]
    )


def add_arrays(builder: DatasetBuilder, rows: Sequence[Row], images: Sequence[np.ndarray]) -> None:
    """Write images that have no files of their own as PNG.

    Args:
        images: of each row, uint8 (h, w, 3).
    """
    place = {row.image_id: i for i, row in enumerate(rows)}
    for row in builder.watched(builder.plan(rows)):
        builder.add(row, Image.fromarray(np.ascontiguousarray(images[place[row.image_id]])))


def _load(file: Path) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; `npy:` takes <file>.npy with <file>_labels.npy (for "
                                "<file>_data.npy) or labels.npy beside it")  # fmt: skip
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{file} is not a plain .npy array ({error}); save it with np.save, of numbers") from error


def _labels_beside(file: Path) -> Path:
    own = file.with_name(file.name.removesuffix("_data.npy") + "_labels.npy")
    return own if file.name.endswith("_data.npy") else file.with_name("labels.npy")
