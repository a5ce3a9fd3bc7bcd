"""Sets that training-free segmentation is measured on, read in place; their images are test rows.

| source | images | masks |
|---|---|---|
| `context60:<VOCdevkit>` | `VOC2010/JPEGImages/<name>.jpg` of `ImageSets/SegmentationContext/val.txt` | `VOC2010/SegmentationClassContext/<name>.png`, 0 background, 1 to 59 |
| `coco_object:<folder>` | `images/val2017/<name>.jpg` | `annotations/val2017/<name>_instanceTrainIds.png`, 0 background, 1 to 80, names from `annotations/instances_val2017.json` |
| `imagenet_seg:<folder>` | `images/<name>.png` | `masks/<name>.png`, 1 on the object |

The first two are laid out as mmsegmentation wants them. ImageNet-Segmentation is published as `gtsegs_ijcv.mat`; with h5py:

    with h5py.File("gtsegs_ijcv.mat") as f:
        for i, (image, mask) in enumerate(zip(f["/value/img"][:, 0], f["/value/gt"][:, 0])):
            Image.fromarray(f[image][:].transpose(2, 1, 0)).save(f"images/{i:05}.png")
            Image.fromarray(f[f[mask][0, 0]][:].T).save(f"masks/{i:05}.png")
"""

from __future__ import annotations

import json
from pathlib import Path

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.manifest import Row
from regvit.data.sources.published_sets import read_images

CONTEXT_CLASSES = (
    "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle", "building", "bus",
    "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow", "cup", "curtain", "dog", "door", "fence",
    "floor", "flower", "food", "grass", "ground", "horse", "keyboard", "light", "motorbike", "mountain", "mouse", "person",
    "plate", "platform", "pottedplant", "road", "rock", "sheep", "shelves", "sidewalk", "sign", "sky", "snow", "sofa",
    "table", "track", "train", "tree", "truck", "tvmonitor", "wall", "water", "window", "wood",
)  # fmt: skip


def context60(builder: DatasetBuilder, rest: str) -> None:
    """PASCAL Context (Mottaghi et al. 2014) with 59 classes and background."""
    root = Path(rest).expanduser() / "VOC2010"
    names = _existing(root / "ImageSets/SegmentationContext/val.txt").read_text(encoding="utf-8").split()
    files = [(f"JPEGImages/{name}.jpg", f"SegmentationClassContext/{name}.png") for name in names]
    _take(builder, root, files, CONTEXT_CLASSES, "PASCAL Context", "Mottaghi et al. 2014, CVPR")


def coco_object(builder: DatasetBuilder, rest: str) -> None:
    """COCO 2017's val images with the 80 kinds of objects, and background."""
    root = Path(rest).expanduser()
    about = json.loads(_existing(root / "annotations/instances_val2017.json").read_text(encoding="utf-8"))
    classes = tuple(one["name"] for one in sorted(about["categories"], key=lambda one: one["id"]))
    masks = sorted((root / "annotations/val2017").glob("*_instanceTrainIds.png"))
    names = [path.name.removesuffix("_instanceTrainIds.png") for path in masks]
    files = [(f"images/val2017/{name}.jpg", f"annotations/val2017/{name}_instanceTrainIds.png") for name in names]
    _take(builder, root, files, classes, "COCO 2017, cocodataset.org", "Lin et al. 2014, arXiv:1405.0312")


def imagenet_seg(builder: DatasetBuilder, rest: str) -> None:
    """ImageNet-Segmentation (Guillaumin et al. 2014): 4,276 images with the mask of their object."""
    root = Path(rest).expanduser()
    names = sorted(path.stem for path in (root / "masks").glob("*.png"))
    files = [(f"images/{name}.png", f"masks/{name}.png") for name in names]
    _take(builder, root, files, ("object",), "ImageNet-Segmentation", "Guillaumin et al. 2014, IJCV")


def _take(
    builder: DatasetBuilder, root: Path, files: list[tuple[str, str]], classes: tuple[str, ...], *credit: str
) -> None:
    if not files:
        raise FileNotFoundError(
            f"there are no masks below {root}: lay the set out as regvit/data/sources/mask_sets.py says"
        )
    builder.classes = classes
    builder.credit_to("images and masks", credit[0], "for research and education only", credit[1])
    read_images(builder, root, [Row(Path(image).stem, image, "", "test", mask=mask) for image, mask in files])


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: lay the set out as regvit/data/sources/mask_sets.py says")
    return path
