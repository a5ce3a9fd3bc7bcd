"""NYU Depth v2: indoor photographs with depth (Silberman et al. 2012), read in place.

`nyu:<folder>` reads the layout that BTS, AdaBins and their successors use, with the official splits:

    <folder>/train/<scene>/rgb_<i>.jpg  sync_depth_<i>.png      795 images, a tenth of every scene's becomes val
    <folder>/test/<scene>/rgb_<i>.jpg   sync_depth_<i>.png      654 images

It is made of `nyu_depth_v2_labeled.mat` and `splits.mat` by BTS's `extract_official_train_test_set_from_mat.py`. Depth is a
16-bit PNG in millimetres, 0 where the sensor saw nothing. BTS's larger training set (24,231 synchronised frames, folder
`sync`) has the same layout: put it, or a link to it, in the place of `train`.

The usual evaluation crops as Eigen et al. (2014) and caps at 10 m: `depth: {crop: eigen, max_depth: 10.0}`.
"""

from __future__ import annotations

from pathlib import Path

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.dense_labels import depth_problem
from regvit.data.manifest import Row
from regvit.data.splits import stratified_splits

VAL_SHARE = 0.1
SUFFIXES = (".jpg", ".png")


def nyu(builder: DatasetBuilder, rest: str) -> None:
    """Builds the source `nyu:<folder>`.

    Raises:
        FileNotFoundError: the folder, one of its splits, or every image of a split is missing.
    """
    root = Path(rest).expanduser()
    names = {split: _images(root, split) for split in ("train", "test")}
    scenes = {name: str(Path(name).parent) for name in names["train"]}
    splits = stratified_splits(scenes, builder.seed, (1 - VAL_SHARE, VAL_SHARE, 0.0)) | dict.fromkeys(
        names["test"], "test"
    )
    builder.credit_to(
        "images and depth", "NYU Depth Dataset V2", "see its owner", "Silberman et al. 2012, Indoor Segmentation, ECCV"
    )
    rows = [Row(name, name, "", split, depth=depth_name(name)) for name, split in splits.items()]
    builder.read_in_place(root, builder.limit(rows), lambda row: depth_problem(root / row.depth, root / row.path))


def depth_name(name: str) -> str:
    """`test/office/sync_depth_00012.png` of `test/office/rgb_00012.jpg`."""
    path = Path(name)
    return path.with_name(f"sync_depth_{path.stem.removeprefix('rgb_')}.png").as_posix()


def _images(root: Path, split: str) -> list[str]:
    """Photographs of a split, relative to the root, sorted."""
    found = sorted(path for path in (root / split).glob("*/rgb_*") if path.suffix in SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"{root / split} holds no <scene>/rgb_<number>.jpg; expected {root}/train and {root}/test as BTS's "
            "extract_official_train_test_set_from_mat.py makes them of nyu_depth_v2_labeled.mat"
        )
    return [path.relative_to(root).as_posix() for path in found]
