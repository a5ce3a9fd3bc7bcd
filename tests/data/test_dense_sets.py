"""The published sets in small, in the layout and formats that their archives unpack to."""

import json
from zlib import crc32

import numpy as np
import pytest
from PIL import Image

from regvit.data.dense_labels import read_mask, zero_is_ignored
from regvit.data.sources.published_sets import VOC_CLASSES, ade_classes, voc_boxes

OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>{truncated}</truncated><difficult>{difficult}</difficult>
<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>{part}</object>"""
PART = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>"


def image(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(crc32(path.name.encode())).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def listing(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def mask(path, values, palette=True):
    """As VOC stores them (palette), or ADE20k (grey)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.fromarray(np.array(values, np.uint8))
    if palette:
        made = made.convert("P")
        made.putpalette([i * 5 % 256 for i in range(768)])
    made.save(path)


def annotation(path, *objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (OBJECT.format(**{"name": "dog", "truncated": 0, "difficult": 0, "part": ""} | one) for one in objects)
    path.write_text(f"<annotation><filename>x.jpg</filename>{''.join(texts)}</annotation>")


def make_devkit(folder):
    """A VOCdevkit with VOC2007 and VOC2012 of twenty images each."""
    names = [f"{i:06}" for i in range(1, 21)]
    for year in ("2007", "2012"):
        root = folder / "VOCdevkit" / f"VOC{year}"
        listing(root / "ImageSets/Main/trainval.txt", names)
        listing(root / "ImageSets/Main/test.txt", ["999999"])
        listing(root / "ImageSets/Segmentation/train.txt", names[:10])
        listing(root / "ImageSets/Segmentation/val.txt", names[10:14])
        for name in names:
            image(root / f"JPEGImages/{name}.jpg")
            annotation(
                root / f"Annotations/{name}.xml",
                {"x0": 1, "y0": 1, "x1": 40, "y1": 30, "difficult": 1},
                {"x0": 5, "y0": 6, "x1": 10, "y1": 12, "truncated": 1, "name": "person", "part": PART},
            )
        for name in names[:14]:
            values = np.zeros((30, 40), np.uint8)
            values[5:10, 5:10], values[4, 5:10] = 20, 255
            mask(root / f"SegmentationClass/{name}.png", values)
    return folder / "VOCdevkit"


@pytest.fixture
def devkit(tmp_path):
    return make_devkit(tmp_path)


@pytest.mark.parametrize("year", ["07", "12"])
def test_voc_detection_has_the_boxes_of_all_objects_also_difficult_and_truncated_ones(make, devkit, year):
    dataset = make(f"voc{year}:{devkit}").dataset
    assert len(dataset) == 20 and dataset.root == devkit / f"VOC20{year}"
    row = dataset.rows[0]
    assert (row.image_id, row.path, row.label) == ("000001", "JPEGImages/000001.jpg", "")
    # 1-based and inclusive in the file: the first covers the whole image of 40 x 30.
    assert json.loads(row.boxes) == [[0, 0, 40, 30], [4, 5, 10, 12]]
    assert len(dataset.subset("val")) == 2 and len(dataset.subset("test")) == 18 and len(row.sha256) == 64


def test_the_devkit_its_parent_and_the_year_itself_are_all_found(make, devkit):
    roots = {make(f"voc07:{given}").dataset.root for given in (devkit, devkit.parent, devkit / "VOC2007")}
    assert roots == {devkit / "VOC2007"}


def test_voc_segmentation_keeps_palette_masks_and_void(make, devkit, tmp_path):
    dataset = make(f"voc_segmentation:{devkit}").dataset
    assert dataset.classes == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [9, 1, 4]
    row = dataset.rows[0]
    assert row.mask == "SegmentationClass/000001.png" and json.loads(row.boxes)[1] == [4, 5, 10, 12]
    values = read_mask(dataset.root / row.mask)
    assert set(np.unique(values)) == {0, 20, 255} and dataset.classes[20 - 1] == "tvmonitor"
    assert not zero_is_ignored(tmp_path / "data/mine")


def test_masks_that_do_not_fit_are_rejected_with_the_reason(make, devkit):
    root = devkit / "VOC2012/SegmentationClass"
    mask(root / "000001.png", np.zeros((30, 39)))
    mask(root / "000002.png", np.full((30, 40), 21))
    (root / "000003.png").unlink()
    made = make(f"voc_segmentation:{devkit}", max_rejects=0.5)
    assert len(made.dataset) == 11
    reasons = {one.image_id: one.reason for one in made.rejected}
    assert reasons["000001"] == "its mask 000001.png has 39 x 30 pixels, the image 40 x 30"
    assert reasons["000002"] == "its mask 000002.png holds 21, beyond 20 classes; 255 is void"
    assert "SegmentationClass/000003.png cannot be read as an image" in reasons["000003"]


def make_coco(folder):
    """COCO 2014 with a list of 20 images, one of them of val2014; image 30 is not on the list."""
    root = folder / "coco"
    for part, numbers in (("train2014", [*range(1, 20), 30]), ("val2014", [20])):
        images, annotations = [], []
        for number in numbers:
            name = f"COCO_{part}_{number:012}.jpg"
            image(root / "images" / part / name)
            images.append({"id": number, "file_name": name, "width": 40, "height": 30})
            for box, crowd in (([1.4, 2.6, 10.0, 5.0], 0), ([0, 0, 40, 30], 1), ([3.0, 3.0, 0.2, 5.0], 0)):
                annotations.append({"image_id": number, "bbox": box, "iscrowd": crowd, "category_id": 1})
        file = root / f"annotations/instances_{part}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    lines = [f"train2014/COCO_train2014_{i:012}.jpg" for i in range(19, 0, -1)] + ["COCO_val2014_000000000020.jpg"]
    listing(root / "coco_20k_filenames.txt", lines)
    return root


def test_coco20k_follows_the_list_and_leaves_crowds_out(make, tmp_path):
    dataset = make(f"coco20k:{make_coco(tmp_path)}").dataset
    assert [row.path for row in dataset.rows[:1]] == ["images/train2014/COCO_train2014_000000000019.jpg"]
    assert dataset.rows[-1].path == "images/val2014/COCO_val2014_000000000020.jpg" and len(dataset) == 20
    # [1.4, 2.6, 11.4, 7.6] rounded; the crowd is left out, and what has no width after rounding.
    assert {row.boxes for row in dataset.rows} == {"[[1, 3, 11, 8]]"}
    assert [len(dataset.subset(split)) for split in ("val", "test")] == [2, 18]


def test_coco_says_what_is_missing(make, tmp_path):
    coco = make_coco(tmp_path)
    names = coco / "coco_20k_filenames.txt"
    listing(names, [*names.read_text().splitlines(), "COCO_train2014_000000000077.jpg"])
    said = r"1 of 21 images .* are not in the annotations of COCO 2014 \(the first is 77"
    with pytest.raises(ValueError, match=said):
        make(f"coco20k:{coco}")
    listing(names, ["cat.png"])
    with pytest.raises(ValueError, match=r"'cat.png' in coco_20k_filenames.txt is no image of COCO"):
        make(f"coco20k:{coco}")
    names.unlink()
    with pytest.raises(FileNotFoundError, match=r"coco_20k_filenames.txt is missing"):
        make(f"coco20k:{coco}")


def make_ade(folder):
    """ADEChallengeData2016 with ten images to train on and three to test."""
    root = folder / "ADEChallengeData2016"
    for part, prefix, count in (("training", "train", 10), ("validation", "val", 3)):
        for i in range(1, count + 1):
            image(root / f"images/{part}/ADE_{prefix}_{i:08}.jpg")
            mask(root / f"annotations/{part}/ADE_{prefix}_{i:08}.png", np.full((30, 40), [0, 150] * 20), palette=False)
    rows = [f"{i}\t0.1\t11664\t1172\tthing {i}, item {i}  " for i in range(1, 151)]
    listing(root / "objectInfo150.txt", ["Idx\tRatio\tTrain\tVal\tName", *rows])
    return root


def test_ade20k_has_150_classes_and_ignores_zero(make, tmp_path):
    dataset = make(f"ade20k:{make_ade(tmp_path)}").dataset
    assert len(dataset.classes) == 150 and dataset.classes[149] == "thing 150, item 150"
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [9, 1, 3]
    row, name = dataset.subset("test").rows[0], "validation/ADE_val_00000001"
    assert (row.path, row.mask) == (f"images/{name}.jpg", f"annotations/{name}.png")
    assert set(np.unique(read_mask(dataset.root / row.mask))) == {0, 150}
    assert zero_is_ignored(tmp_path / "data/mine")


def test_a_table_of_other_classes_is_refused(tmp_path):
    listing(tmp_path / "objectInfo150.txt", ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1\t1\t1\twall"])
    with pytest.raises(ValueError, match="has 1 rows; expected a header and the classes 1 to 150"):
        ade_classes(tmp_path / "objectInfo150.txt")


def test_fractions_of_pixels_in_voc_are_rounded_and_what_is_no_annotation_is_refused(tmp_path):
    annotation(tmp_path / "a.xml", {"x0": "45.70", "y0": "3", "x1": "60.2", "y1": "9"})
    assert voc_boxes(tmp_path / "a.xml") == [(45, 2, 60, 9)]
    for text in ("<annotation><object><name>dog</name></object></annotation>", "<annotation>"):
        (tmp_path / "a.xml").write_text(text)
        with pytest.raises(ValueError, match=r"a\.xml is no VOC annotation .* unpack the archive again"):
            voc_boxes(tmp_path / "a.xml")


@pytest.mark.parametrize("source", ["voc07", "voc12", "voc_segmentation", "coco20k", "ade20k"])
def test_a_folder_that_is_not_there_is_named(make, tmp_path, source):
    with pytest.raises(FileNotFoundError, match=r"nowhere' is no folder; write the source as"):
        make(f"{source}:{tmp_path}/nowhere")
    if source.startswith("voc"):
        with pytest.raises(FileNotFoundError, match=r"holds no VOC20.. with JPEGImages and ImageSets"):
            make(f"{source}:{tmp_path}")
