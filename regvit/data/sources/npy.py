"""Images in arrays: one `.npy` file with its labels beside it, as CIFAR-10.1 and CIFAR-10-C are published.

| file | labels | what it is |
|---|---|---|
| `cifar10.1_v6_data.npy` | `cifar10.1_v6_labels.npy` | images (b, h, w, 3) uint8, labels (b,) |
| `CIFAR-10-C/fog.npy` | `CIFAR-10-C/labels.npy` | severities 1 to 5 one after the other: b = 5 × images; `:3` takes one |

Labels are whole numbers, and classes are called by them: `classes: {airplane: [0], …}` gives them names.
Arrays of Python objects are refused, as they are pickles.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from regvit.data.dataset_builder import Workbench
from regvit.data.sources.folder import Listed, assign_splits

SEVERITIES = 5


def npy(bench: Workbench, rest: str) -> None:
    """`<file>.npy[:severity]`: images written as PNG."""
    path, _, severity = rest.rpartition(":") if rest.rpartition(":")[2].isdigit() else (rest, "", "")
    file = Path(path).expanduser()
    images, labels = _load(file), _load(_labels_beside(file))
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"{file} is {images.dtype} {images.shape}; expected uint8 images of shape (b, h, w, 3)")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) != len(images):
        raise ValueError(f"the labels beside {file} are {labels.dtype} {labels.shape}; expected {len(images)} integers")
    rows = range(len(images))
    if severity:
        size = len(images) // SEVERITIES
        if not 1 <= int(severity) <= SEVERITIES or len(images) % SEVERITIES:
            raise ValueError(f"severity {severity} of {file}, which has {len(images)} images: severities are 1 to "
                             f"{SEVERITIES}, in as many equal parts; leave `:{severity}` out to take all")  # fmt: skip
        rows = rows[(int(severity) - 1) * size : int(severity) * size]
    bench.credit_to("images", file.name, "see its publisher", "see its publisher")
    add_packed(bench, {f"{file.stem}_{i:06}": ("", str(labels[i])) for i in rows}, lambda i: images[rows[i]])


def add_packed(bench: Workbench, images: dict[str, tuple[str, str]], pixels) -> None:
    """Write images that have no files of their own as PNG.

    Args:
        images: (split or "", class or "") by image_id.
        pixels: from the place of an image in `images` to its uint8 pixels (h, w, 3).
    """
    bench.check_classes(label for _, label in images.values())
    splits = assign_splits(
        {image_id: Listed(image_id, label, split) for image_id, (split, label) in images.items()}, bench.seed, bench.role
    )  # fmt: skip
    bench.classes = tuple(sorted({label for _, label in images.values()} - {""}))
    for i, (image_id, (_, label)) in enumerate(bench.watched(images.items(), len(images))):
        if bench.wants(label):
            bench.add(image_id, Image.fromarray(np.ascontiguousarray(pixels(i))), label, splits[image_id])


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
