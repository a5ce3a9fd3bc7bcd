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

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from xml.etree import ElementTree

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.dense_labels import mask_problem
from regvit.data.manifest import Row
from regvit.data.splits import stratified_splits

VAL_SHARE = 0.1  # of the images that a published protocol trains or chooses on
COCO_LIST = "coco_20k_filenames.txt"
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
ADE_CLASSES = 150

Boxes = list[tuple[int, int, int, int]]


def voc_detection(builder: DatasetBuilder, rest: str, year: str) -> None:
    """PASCAL VOC trainval of 2007 (5,011 images) or 2012 (11,540) with the boxes of all objects."""
    root = _voc_root(rest, year)
    splits = _held_out(_lines(root / "ImageSets/Main/trainval.txt"), builder.seed)
    _credit_voc(builder, year)
    read_images(builder, root, [
        Row(name, f"JPEGImages/{name}.jpg", "", split, _boxes(voc_boxes(root / f"Annotations/{name}.xml")))
        for name, split in splits.items()
    ])  # fmt: skip


def voc_segmentation(builder: DatasetBuilder, rest: str) -> None:
    """PASCAL VOC 2012 segmentation (1,464 + 1,449 images): class masks, and boxes where the image has a file of them."""
    root = _voc_root(rest, "2012")
    lists = {name: _lines(root / f"ImageSets/Segmentation/{name}.txt") for name in ("train", "val")}
    rows = []
    for name, split in (_with_val(lists["train"], builder.seed) | dict.fromkeys(lists["val"], "test")).items():
        annotation = root / f"Annotations/{name}.xml"
        boxes = _boxes(voc_boxes(annotation)) if annotation.is_file() else ""
        rows.append(Row(name, f"JPEGImages/{name}.jpg", "", split, boxes, f"SegmentationClass/{name}.png"))
    builder.classes = VOC_CLASSES
    _credit_voc(builder, "2012")
    read_images(builder, root, rows)


def coco20k(builder: DatasetBuilder, rest: str) -> None:
    """The images of COCO 2014 that a list names (the COCO20k of LOST: 19,817 of train2014), with the boxes of all objects.

    `<folder>` holds the list, `annotations/instances_train2014.json` (and `…_val2014.json` if the list names some of
    val2014), and the images in `train2014/` or `images/train2014/`.
    """
    root = _folder(rest, "coco20k:<folder>")
    wanted = list(dict.fromkeys(_coco_number(Path(line).name) for line in _lines(root / COCO_LIST)))
    images: dict[int, tuple[str, str]] = {}
    for part in ("train2014", "val2014"):
        if missing := set(wanted) - images.keys():
            images |= _coco_boxes(root / f"annotations/instances_{part}.json", missing, _coco_images(root, part))
    if missing := [number for number in wanted if number not in images]:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} images of {root / COCO_LIST} are not in the annotations of COCO 2014 "
            f"(the first is {missing[0]}); the list must name images of train2014 or val2014"
        )
    paths = {Path(images[number][0]).stem: images[number] for number in wanted}
    splits = _held_out(paths, builder.seed)
    builder.credit_to("images", "COCO 2014, cocodataset.org", "Flickr terms of use", "Lin et al. 2014, arXiv:1405.0312")
    builder.credit_to("boxes", "COCO 2014, cocodataset.org", "CC-BY-4.0", "Lin et al. 2014, arXiv:1405.0312")
    read_images(builder, root, [Row(name, path, "", splits[name], boxes) for name, (path, boxes) in paths.items()])


def ade20k(builder: DatasetBuilder, rest: str) -> None:
    """ADE20K as the scene parsing challenge of 2016 has it (20,210 + 2,000 images, 150 classes), with class masks."""
    root = _folder(rest, "ade20k:<ADEChallengeData2016>")
    builder.classes = ade_classes(root / "objectInfo150.txt")
    builder.about["mask"] = {"zero": "ignore"}
    names = {part: _stems(root / "images" / part, ".jpg") for part in ("training", "validation")}
    splits = _with_val(names["training"], builder.seed) | dict.fromkeys(names["validation"], "test")
    builder.credit_to(
        "images", "ADE20K, MIT Scene Parsing Benchmark", "for research and education only", "Zhou et al. 2017, CVPR"
    )
    builder.credit_to("masks", "ADE20K, MIT Scene Parsing Benchmark", "BSD-3-Clause", "Zhou et al. 2017, CVPR")
    read_images(builder, root, [
        Row(name, f"images/{part}/{name}.jpg", "", splits[name], mask=f"annotations/{part}/{name}.png")
        for part in names
        for name in names[part]
    ])  # fmt: skip


def read_images(builder: DatasetBuilder, root: Path, rows: list[Row]) -> None:
    """Keep every image that can be decoded, and whose mask fits it; the others are rejected."""
    builder.refuse_classes()

    def problem(row: Row) -> str:
        return mask_problem(root / row.mask, root / row.path, len(builder.classes)) if row.mask else ""

    builder.read_in_place(root, builder.limit(rows), problem)


def voc_boxes(annotation: Path) -> Boxes:
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
    return [(x0 - 1, y0 - 1, x1, y1) for x0, y0, x1, y1 in corners]


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


def _coco_boxes(file: Path, wanted: Collection[int], images: Path) -> dict[int, tuple[str, str]]:
    """Path and boxes of the wanted images of one annotation file (half a gigabyte, read as a whole)."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; unpack annotations_trainval2014.zip there")
    content = json.loads(file.read_text(encoding="utf-8"))
    files = {one["id"]: (images / one["file_name"]).as_posix() for one in content["images"] if one["id"] in wanted}
    boxes: dict[int, Boxes] = {number: [] for number in files}
    for one in content["annotations"]:
        if one["image_id"] in boxes and not one.get("iscrowd"):
            x, y, width, height = one["bbox"]
            boxes[one["image_id"]].append(tuple(round(value) for value in (x, y, x + width, y + height)))
    return {number: (path, _boxes(boxes[number])) for number, path in files.items()}


def _coco_images(root: Path, part: str) -> Path:
    """Folder of a part's images, relative to the root."""
    return Path("images", part) if (root / "images" / part).is_dir() else Path(part)


def _coco_number(name: str) -> int:
    if not (match := re.search(r"(\d+)\.jpg$", name)):
        raise ValueError(
            f"{name!r} in {COCO_LIST} is no image of COCO; expected one as COCO_train2014_000000000009.jpg"
        )
    return int(match[1])


def _boxes(boxes: Boxes) -> str:
    """Boxes as the manifest has them, without those that rounding left empty: no prediction could overlap them."""
    kept = [list(box) for box in boxes if box[0] < box[2] and box[1] < box[3]]
    return json.dumps(kept) if kept else ""


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
    if not path.is_dir():
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


def _credit_voc(builder: DatasetBuilder, year: str) -> None:
    builder.credit_to(
        "images", f"PASCAL VOC {year}", "Flickr terms of use", "Everingham et al. 2010, doi:10.1007/s11263-009-0275-4"
    )
