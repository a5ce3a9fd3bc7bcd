"""Published sets with boxes or masks, read in place in the layout that their archives unpack to.

| source | rows | splits | boxes, masks |
|---|---|---|---|
| `voc07:<VOCdevkit>`, `voc12:<VOCdevkit>` | `ImageSets/Main/trainval.txt` | a tenth val, the rest test | every object |
| `coco20k:<folder>` | `coco_20k_filenames.txt`, the user's list | a tenth val, the rest test | every object but crowds |
| `voc_segmentation:<VOCdevkit>` | `ImageSets/Segmentation/{train,val}.txt` of VOC2012 | train (a tenth of it val), val is test | both |
| `ade20k:<ADEChallengeData2016>` | `images/{training,validation}` | training (a tenth of it val), validation is test | masks |

Object discovery follows the published code of LOST (Siméoni et al. 2021, arXiv:2109.14279): difficult and truncated
objects of VOC count, its 1-based inclusive corners (x, y, X, Y) become [x − 1, y − 1, X, Y]; crowds of COCO are left out,
and its [x, y, width, height] is rounded to whole pixels. LOST reports on all images; here a tenth of them, drawn by the
seed, is kept for choosing, and it is for the discover stage to report on the others.

Masks hold 0 for background, class index + 1, and 255 for what counts as neither (VOC's void). VOC's palette PNGs are so
already. In ADE20k 0 means "none of the 150 classes" and is not measured: `about.mask.zero` in `dataset.json` says `ignore`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from regvit.data.dataset_builder import Workbench
from regvit.data.decoding import UnreadableImage
from regvit.data.manifest import Row, stratified_splits
from regvit.data.whole_images import IGNORE, original_size, read_mask

VAL_SHARE = 0.1  # of the images that a published protocol trains or chooses on
COCO_LIST = "coco_20k_filenames.txt"
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
ADE_CLASSES = 150


@dataclass(frozen=True)
class Listed:
    """One image of a published set, before it is looked at; paths are relative to the set's root."""

    image_id: str
    path: str
    split: str
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    mask: str = ""


def voc07(bench: Workbench, rest: str) -> None:
    """PASCAL VOC 2007 trainval (5,011 images) with the boxes of all objects."""
    _voc_detection(bench, rest, "2007")


def voc12(bench: Workbench, rest: str) -> None:
    """PASCAL VOC 2012 trainval (11,540 images) with the boxes of all objects."""
    _voc_detection(bench, rest, "2012")


def voc_segmentation(bench: Workbench, rest: str) -> None:
    """PASCAL VOC 2012 segmentation (1,464 + 1,449 images): class masks, and boxes where the image has a file of them."""
    root = _voc_root(rest, "2012")
    lists = {name: _lines(root / f"ImageSets/Segmentation/{name}.txt") for name in ("train", "val")}
    splits = _with_val(lists["train"], bench.seed) | dict.fromkeys(lists["val"], "test")
    listed = []
    for name, split in splits.items():
        annotation = root / f"Annotations/{name}.xml"
        boxes = voc_boxes(annotation) if annotation.is_file() else ()
        listed.append(Listed(name, f"JPEGImages/{name}.jpg", split, boxes, f"SegmentationClass/{name}.png"))
    bench.classes = VOC_CLASSES
    _credit_voc(bench, "2012")
    _take(bench, root, listed)


def coco20k(bench: Workbench, rest: str) -> None:
    """The images of COCO 2014 that a list names (the COCO20k of LOST: 19,817 of train2014), with the boxes of all objects.

    `<folder>` holds the list, `annotations/instances_train2014.json` (and `…_val2014.json` if the list names some of
    val2014), and the images in `train2014/` or `images/train2014/`.
    """
    root = _folder(rest, "coco20k:<folder>")
    names = [Path(line).name for line in _lines(root / COCO_LIST)]
    wanted = dict.fromkeys(_coco_number(name) for name in names)
    found: dict[int, tuple[str, list]] = {}
    for part in ("train2014", "val2014"):
        if missing := wanted.keys() - found.keys():
            found |= _coco_boxes(root / f"annotations/instances_{part}.json", missing, _coco_images(root, part))
    if missing := [number for number in wanted if number not in found]:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} images of {root / COCO_LIST} are not in the annotations of COCO 2014 "
            f"(the first is {missing[0]}); the list must name images of train2014 or val2014"
        )
    splits = _held_out({Path(found[number][0]).stem: number for number in wanted}, bench.seed)
    listed = [
        Listed(Path(path).stem, path, splits[Path(path).stem], tuple(boxes))
        for path, boxes in (found[number] for number in wanted)
    ]
    bench.credit_to("images", "COCO 2014, cocodataset.org", "Flickr terms of use", "Lin et al. 2014, arXiv:1405.0312")
    bench.credit_to("boxes", "COCO 2014, cocodataset.org", "CC-BY-4.0", "Lin et al. 2014, arXiv:1405.0312")
    _take(bench, root, listed)


def ade20k(bench: Workbench, rest: str) -> None:
    """ADE20K as the scene parsing challenge of 2016 has it (20,210 + 2,000 images, 150 classes), with class masks."""
    root = _folder(rest, "ade20k:<ADEChallengeData2016>")
    bench.classes = ade_classes(root / "objectInfo150.txt")
    bench.about["mask"] = {"zero": "ignore"}
    names = {part: _stems(root / "images" / part, ".jpg") for part in ("training", "validation")}
    splits = _with_val(names["training"], bench.seed) | dict.fromkeys(names["validation"], "test")
    listed = [
        Listed(name, f"images/{part}/{name}.jpg", splits[name], mask=f"annotations/{part}/{name}.png")
        for part in names
        for name in names[part]
    ]
    bench.credit_to(
        "images", "ADE20K, MIT Scene Parsing Benchmark", "for research and education only", "Zhou et al. 2017, CVPR"
    )
    bench.credit_to("masks", "ADE20K, MIT Scene Parsing Benchmark", "BSD-3-Clause", "Zhou et al. 2017, CVPR")
    _take(bench, root, listed)


def zero_is_ignored(folder: Path | str) -> bool:
    """Whether 0 in the masks of a data set's folder means "not annotated" rather than background."""
    about = json.loads((Path(folder) / "dataset.json").read_text(encoding="utf-8"))["about"]
    return about.get("mask", {}).get("zero") == "ignore"


def voc_boxes(annotation: Path) -> tuple[tuple[int, int, int, int], ...]:
    """[x0, y0, x1, y1] of every object of a VOC annotation, difficult and truncated ones included.

    The file counts pixels from 1 and includes the last one. Parts of persons (hands, feet) are no objects of their own.

    Raises:
        ValueError: the file is no VOC annotation.
    """
    try:
        objects = ElementTree.parse(annotation).getroot().findall("object")
        corners = [
            [round(float(each.find("bndbox").find(side).text)) for side in ("xmin", "ymin", "xmax", "ymax")]
            for each in objects
        ]
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{annotation} is no VOC annotation ({error}); expected <object><bndbox> with xmin, ymin, xmax, ymax: "
            "unpack the archive again"
        ) from error
    return _sound((x0 - 1, y0 - 1, x1, y1) for x0, y0, x1, y1 in corners)


def ade_classes(table: Path) -> tuple[str, ...]:
    """The 150 names of `objectInfo150.txt`, in the order of their index.

    Raises:
        FileNotFoundError, ValueError: the table is missing, or is not one of 150 classes.
    """
    lines = _lines(table)[1:]  # Idx, Ratio, Train, Val, Name
    fields = [[part.strip() for part in line.split("\t")] for line in lines]
    if [row[0] for row in fields] != [str(i + 1) for i in range(ADE_CLASSES)]:
        raise ValueError(f"{table} has {len(fields)} rows; expected a header and the classes 1 to {ADE_CLASSES}")
    return tuple(row[-1] for row in fields)


# --- what the sets share ---------------------------------------------------------------------------------------------


def _voc_detection(bench: Workbench, rest: str, year: str) -> None:
    root = _voc_root(rest, year)
    names = _lines(root / "ImageSets/Main/trainval.txt")
    splits = _held_out(names, bench.seed)
    listed = [
        Listed(name, f"JPEGImages/{name}.jpg", splits[name], voc_boxes(root / f"Annotations/{name}.xml"))
        for name in names
    ]
    _credit_voc(bench, year)
    _take(bench, root, listed)


def _take(bench: Workbench, root: Path, listed: list[Listed]) -> None:
    """A row for every image that can be decoded, and whose mask fits it; the others are rejected."""
    bench.read_in_place(root)
    by_path = {one.path: one for one in listed}
    for path, digest, reason in bench.examined(root, list(by_path)):
        one = by_path[path]
        reason = reason or (one.mask and mask_problem(root / one.mask, root / path, len(bench.classes)))
        if reason:
            bench.reject(one.image_id, path, reason)
        else:
            boxes = json.dumps([list(box) for box in one.boxes]) if one.boxes else ""
            bench.rows.append(Row(one.image_id, path, "", one.split, boxes, one.mask, digest))


def mask_problem(mask: Path, image: Path, n_classes: int) -> str:
    """Why a mask cannot be used with its image, or ""."""
    try:
        values, size = read_mask(mask), original_size(image)
    except UnreadableImage as error:
        return str(error)
    if values.shape != size[::-1]:
        return f"its mask {mask.name} has {values.shape[1]} x {values.shape[0]} pixels, the image {size[0]} x {size[1]}"
    strange = sorted(set(np.unique(values).tolist()) - {*range(n_classes + 1), IGNORE})
    return f"its mask {mask.name} holds {strange[0]}, beyond {n_classes} classes; {IGNORE} is void" if strange else ""


def _coco_boxes(file: Path, wanted: Iterable[int], images: Path) -> dict[int, tuple[str, list]]:
    """Path and boxes of the wanted images of one annotation file (half a gigabyte, read as a whole)."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; unpack annotations_trainval2014.zip there")
    content, wanted = json.loads(file.read_text(encoding="utf-8")), set(wanted)
    files = {one["id"]: (images / one["file_name"]).as_posix() for one in content["images"] if one["id"] in wanted}
    boxes: dict[int, list] = {number: [] for number in files}
    for one in content["annotations"]:
        if one["image_id"] in boxes and not one.get("iscrowd"):
            x, y, width, height = one["bbox"]
            boxes[one["image_id"]].append(tuple(round(value) for value in (x, y, x + width, y + height)))
    return {number: (path, list(_sound(boxes[number]))) for number, path in files.items()}


def _coco_images(root: Path, part: str) -> Path:
    """Folder of a part's images, relative to the root."""
    return Path("images", part) if (root / "images" / part).is_dir() else Path(part)


def _coco_number(name: str) -> int:
    if not (match := re.search(r"(\d+)\.jpg$", name)):
        raise ValueError(
            f"{name!r} in {COCO_LIST} is no image of COCO; expected one as COCO_train2014_000000000009.jpg"
        )
    return int(match[1])


def _sound(boxes: Iterable[tuple]) -> tuple[tuple[int, int, int, int], ...]:
    """Boxes without those that rounding left empty: no prediction could overlap them."""
    return tuple(box for box in boxes if box[0] < box[2] and box[1] < box[3])


def _held_out(names: Iterable[str], seed: int) -> dict[str, str]:
    """val for a tenth, test for the rest."""
    return stratified_splits(dict.fromkeys(names, ""), seed, (0.0, VAL_SHARE, 1 - VAL_SHARE))


def _with_val(names: Iterable[str], seed: int) -> dict[str, str]:
    """train, but for a tenth that is val."""
    return stratified_splits(dict.fromkeys(names, ""), seed, (1 - VAL_SHARE, VAL_SHARE, 0.0))


def _voc_root(rest: str, year: str) -> Path:
    """`VOC<year>` in a VOCdevkit, in a folder that holds one, or the folder itself."""
    given = _folder(rest, f"voc{year[2:]}:<VOCdevkit>")
    for root in (given / f"VOC{year}", given / "VOCdevkit" / f"VOC{year}", given):
        if (root / "JPEGImages").is_dir() and (root / "ImageSets").is_dir():
            return root
    raise FileNotFoundError(
        f"{given} holds no VOC{year} with JPEGImages and ImageSets; give the VOCdevkit that VOCtrainval unpacks to"
    )


def _folder(rest: str, usage: str) -> Path:
    path = Path(rest).expanduser()
    if not rest or not path.is_dir():
        raise FileNotFoundError(f"{rest!r} is no folder; write the source as {usage}, with the path of its folder")
    return path


def _lines(file: Path) -> list[str]:
    """Lines of a list, without repetition or blanks, in their order."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; it belongs to the data set's archive (or is the user's own list)")
    return list(dict.fromkeys(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()))


def _stems(folder: Path, suffix: str) -> list[str]:
    """Names without suffix of the files of a folder, sorted."""
    names = sorted(path.stem for path in folder.glob(f"*{suffix}")) if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(f"{folder} holds no {suffix} file; unpack the archive again, or give its top folder")
    return names


def _credit_voc(bench: Workbench, year: str) -> None:
    bench.credit_to(
        "images", f"PASCAL VOC {year}", "Flickr terms of use", "Everingham et al. 2010, doi:10.1007/s11263-009-0275-4"
    )
