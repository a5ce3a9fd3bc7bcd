"""Folders of images that stay where they are, as people have them: understood or refused, and no file vanishes."""

import csv
import json
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import pytest
from PIL import Image

from regvit.data.dataset_builder import TooManyRejects

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def splits(*tops: str) -> list[str]:
    return [f"{top}/{label}/{i}.png" for top in tops for label in ("cat", "dog") for i in range(2)]


def taken(*pairs: tuple[str, str]) -> dict[str, str]:
    return {name: f"{split}: {name.split('/')[1]}" for top, split in pairs for name in splits(top)}


SUFFIXES = [f"x/{i}{suffix}" for i, suffix in enumerate((".jfif", ".avif", ".jp2", ".tga", ".webp", ".PNG", ".Gif"))]
AGAIN = "links to folders that are here anyway"
BEHIND_LINKS = {
    "linked folders and files": 4,
    "two links to one folder": 3,
}  # files that are met, not those that are written
TREES = {  # files; what becomes of each image, "split: class" ("" where splits are drawn); rejected; counted
    "images without folders": (["1.png", "2.png"], {"1.png": "", "2.png": ""}, [], {}),
    "class folders": (["cat/1.png", "dog/2.png"], {"cat/1.png": "cat", "dog/2.png": "dog"}, [], {}),
    "folders within classes": (["cat/a/1.png", "dog/2.png"], {"cat/a/1.png": "cat", "dog/2.png": "dog"}, [], {}),
    **{
        " + ".join(tops): (splits(*tops), taken(*zip(tops, meaning, strict=True)), [], {})
        for *meaning, tops in (
            ("train", "test", ("Training", "Testing")),
            ("train", "val", "test", ("TRAIN", "VAL", "TEST")),
            ("train", "test", ("train", "eval")),  # val without test is the test split
            ("train", "test", ("Train Images", "Test Images")),
        )
    },
    "classes called like parts": (
        ["art_gallery/1.png", "car/2.png", "query/3.png"],
        {"art_gallery/1.png": "art_gallery", "car/2.png": "car", "query/3.png": "query"},
        [],
        {},
    ),
    "a class called train": (["train/1.png", "car/2.png"], {"train/1.png": "train", "car/2.png": "car"}, [], {}),
    "suffixes of all formats": (SUFFIXES, dict.fromkeys(SUFFIXES, "x"), [], {}),
    "other files": (
        ["cat/1.png", "cat/1.txt", "dog/labels.csv", "README", "b.txt", ".DS_Store", "cat/._1.png", ".git/objects/1.png"],
        {"cat/1.png": "cat"},
        [],
        {".txt": 2, ".csv": 1, "without a suffix": 1, "hidden": 3},
    ),
    "a folder called like an image": (["x/1.jpg/2.png", "x/3.png"], {"x/1.jpg/2.png": "x", "x/3.png": "x"}, [], {}),
    "broken images": (["x/1.png", "x/2.png (broken)"], {"x/1.png": "x"}, ["x/2.png"], {}),
    "images beside splits": (
        [*splits("train", "test"), "0.png"], taken(("train", "train"), ("test", "test")), ["0.png"], {},
    ),
    "linked folders and files": (
        ["../far/1.png", "../far/a/2.png", "cat/1.png", "cat/3.png -> ../far/1.png", "dog -> ../far"],
        {"cat/1.png": "cat", "cat/3.png": "cat", "dog/1.png": "dog", "dog/a/2.png": "dog"},
        [],
        {},
    ),
    "circles": (
        ["cat/1.png", "cat/up -> .", "cat/same -> cat", "a -> cat", "cat/me.png -> cat/me.png"],
        {"cat/1.png": "cat"},
        ["cat/me.png"],
        {AGAIN: 3},
    ),
    "links that lead nowhere": (
        ["cat/1.png", "cat/gone.png -> nowhere.png", "dog -> nowhere", "cat/gone.txt -> nowhere.txt", ".gone.png -> nowhere"],
        {"cat/1.png": "cat"},
        ["cat/gone.png"],
        {"without a suffix": 1, ".txt": 1, "hidden": 1},
    ),
    "links under other names": (
        ["cat/1.png", "cat/2.png -> cat/1.png", "cat/as -> cat/1.png", "cat/3.png -> cat/a.txt", "cat/a.txt", "x.png -> ."],
        {"cat/1.png": "cat", "cat/2.png": "cat"},
        ["cat/3.png"],
        {"without a suffix": 1, ".txt": 1, AGAIN: 1},
    ),
    "two links to one folder": (
        ["../far/1.png", "a -> ../far", "b -> ../far", "c/2.png"], {"a/1.png": "a", "c/2.png": "c"}, [], {AGAIN: 1},
    ),
    "Unicode forms of one class": (
        [f"train/{NFC}/1.png", "train/x/1.png", f"test/{NFD}/2.png"],
        {f"train/{NFC}/1.png": f"train: {NFC}", "train/x/1.png": "train: x", f"test/{NFD}/2.png": f"test: {NFC}"},
        [],
        {},
    ),
    "names that are no UTF-8": (
        ["x/1.png", os.fsdecode(b"x/caf\xe9.png"), os.fsdecode(b"caf\xe9/2.png")],
        {"x/1.png": "x"},
        [os.fsdecode(b"x/caf\xe9.png"), os.fsdecode(b"caf\xe9/2.png")],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TREES)
def test_every_file_of_a_tree_is_an_image_or_rejected_or_counted(make, photos, kind):
    files, images, rejected, left_out = TREES[kind]
    made = make(f"folder:{photos(*files)}", max_rejects=0.9)
    drawn = not any(":" in meaning for meaning in images.values())
    rows = {row.path: row.label if drawn else f"{row.split}: {row.label}" for row in made.dataset.rows}
    if not drawn:  # val is taken out of train where there is none
        rows = {path: meaning.replace("val:", "train:") if ": val" not in images[path] and images[path].startswith("train")
                else meaning for path, meaning in rows.items()}  # fmt: skip
    assert rows == images
    assert sorted(one.path for one in made.rejected) == sorted(rejected)
    assert made.left_out == left_out
    assert BEHIND_LINKS.get(kind, len(files)) == len(rows) + len(made.rejected) + made.left_out.total()
    if left_out:
        assert f"  {sum(left_out.values())} not taken: " in made.notes()


def test_images_of_classes_that_are_not_chosen_and_beyond_the_number_are_counted(make, photos):
    files = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("cat", "car") for i in range(4)]
    made = make(f"folder:{photos(*files)}", classes=["cat"], images={"test": 1})
    assert made.left_out == {"images of other classes": 8, "images beyond `images`": 3}
    assert len(made.dataset) == 5 and made.notes() == (
        "  11 not taken: images of other classes 8, images beyond `images` 3"
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["train/1.png", "test/2.png", "car/3.png"], r"has split folders \(test, train\) beside others \(car\)"),
        (["train/cat/1.png", "car/3.png"], r"has split folders \(train\) beside others \(car\)"),
        ([*splits("train", "Training")], r"has several folders of one split \(Training, train\); leave one of each"),
        (
            [*splits("data/train", "data/test")],
            r"has split folders \(test, train\) within data; give a folder in which",
        ),
        (["cat/train/1.png", "cat/val/2.png", "dog/train/3.png"], r"has split folders \(train, val\) within cat, dog"),
        (
            [*splits("pets_train", "pets_test")],
            r"folders that are called like splits \(pets_test, pets_train\), but not",
        ),
        *(
            ([*splits(*tops)], rf"called like splits \({', '.join(tops)}\), but .* or give a list of path,label,split")
            for tops in (
                ("fold1", "fold2"),
                ("Fold 1", "Fold 2"),
                ("gallery", "query"),
                ("bounding_box_test", "bounding_box_train", "query"),
            )
        ),
        (["gallery/1.png", "query/2.png", "train/3.png"], r"called like splits \(gallery, query, train\), but not"),
        (["train/Cat/1.png", "test/cat/2.png"], "classes 'Cat' and 'cat' differ only in case or spaces"),
        (["cat/1.png", "cat /2.png"], "classes 'cat' and 'cat ' differ only in case or spaces"),
        (["cat/1.txt", "dog/2.csv"], r"holds no image; looked for \.apng, "),
    ],
)
def test_a_tree_that_can_be_read_in_two_ways_is_refused(make, photos, files, said):
    with pytest.raises(ValueError, match=said):
        make(f"folder:{photos(*files)}")


def test_class_folders_are_split_by_the_seed_and_nothing_of_them_is_copied(make, photos, tmp_path):
    folder = photos(*(f"{label}/{i}.png" for label in ("cat", "dog") for i in range(20)))
    dataset = make(f"folder:{folder}", "mine").dataset
    assert dataset.classes == ("cat", "dog")
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [28, 6, 6]
    assert dataset.image_path(0) == folder / "cat/0.png"
    left = sorted(path.name for path in (tmp_path / "data/mine").iterdir())
    assert left == ["dataset.json", "manifest.csv", "rejected.csv"]


def test_a_relative_folder_starts_from_the_working_directory(make, photos, tmp_path, monkeypatch):
    photos("cat/1.png")
    monkeypatch.chdir(tmp_path)
    assert make("folder:photos", "mine").dataset.image_path(0) == tmp_path / "photos/cat/1.png"
    assert json.loads((tmp_path / "data/mine/dataset.json").read_text())["root"] == "../../photos"


def test_an_image_changed_in_place_changes_the_digest(make, photos):
    folder = photos("cat/1.png")
    before = make(f"folder:{folder}", "mine").dataset.digest
    Image.new("RGB", (4, 4), (1, 2, 3)).save(folder / "cat/1.png")
    assert make(f"folder:{folder}", "mine").dataset.digest != before


def test_a_folder_that_is_missing_or_all_broken_is_refused(make, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone, the folder of source 'folder:.*gone', does not exist"):
        make(f"folder:{tmp_path / 'gone'}", "mine")
    with pytest.raises(
        ValueError, match="gave no usable image; the first of 1 rejected: not an image of a known format"
    ):
        make(f"folder:{photos('x.png (broken)')}", "mine")
    assert not (tmp_path / "data/mine").exists()


# Splits and roles.


def test_a_set_that_is_not_trained_on_is_all_test_where_it_has_no_splits(make, photos):
    folder = photos(*(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(10)))
    for role in ("ood", "anomaly"):
        assert {row.split for row in make(f"folder:{folder}", role, role=role).dataset.rows} == {"test"}
    assert {row.split for row in make(f"folder:{folder}", "id", role="id").dataset.rows} == {"train", "val", "test"}


def test_val_is_the_test_split_where_there_is_no_other_as_in_imagenet(make, photos):
    pictures = [f"train/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(20)]
    folder = photos(*pictures, *(f"val/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(5)))
    dataset = make(f"folder:{folder}", role="id").dataset
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [34, 6, 10]
    assert {row.path.split("/")[0] for row in dataset.subset("test").rows} == {"val"}


@pytest.mark.parametrize(
    ("names", "role", "message"),
    [
        (["train/cat/0", "val/cat/1", "test/cat/2"], "id", r"its train split has 1 class\(es\) \['cat'\].*at least 2"),
        (["cat/0", "dog/1"], "id", "has no test images of 2|no val images to choose settings on"),
        (
            ["train/a/0", "train/b/1", "val/a/2", "test/3"],
            "id",
            r"1 of its 4 images have no class, such as test/3\.png",
        ),
        (["0", "1"], "ood", "has the role ood, but 2 of its 2 images have no class"),
    ],
)
def test_a_role_is_held_against_the_listing_before_any_image_is_read(make, photos, tmp_path, names, role, message):
    folder = photos(*(f"{name}.png (broken)" for name in names))
    with pytest.raises(ValueError, match=message):
        make(f"folder:{folder}", role=role, rejects="fail")
    assert not (tmp_path / "data/mine").exists()


# Choosing classes.


def test_class_folders_can_be_kept_renamed_and_merged(make, photos):
    folder = photos("tabby/1.png", "siamese/2.png", "beagle/3.png", "car/4.png", "stray.png", f"{NFD}/5.png")
    classes = {"dog": "beagle", "house": [NFD], "cat": ["tabby", "siamese"]}
    dataset = make(f"folder:{folder}", classes=classes, role="ood").dataset
    assert dataset.classes == ("dog", "house", "cat")
    expected = {"beagle/3.png": "dog", "siamese/2.png": "cat", "tabby/1.png": "cat", f"{NFD}/5.png": "house"}
    assert {row.path: row.label for row in dataset.rows} == expected
    assert make(f"folder:{folder}", classes=["car", "beagle"], role="ood").dataset.classes == ("car", "beagle")


def test_numbered_class_folders_get_their_names_from_a_file_and_others_are_not_even_read(make, photos, tmp_path):
    (tmp_path / "names.csv").write_text("# as the publisher numbers them\n0,tench\n1,goldfish\n")
    folder = photos("0/a.png", "1/b.png", "2/c.png (broken)")
    dataset = make(f"folder:{folder}", classes=str(tmp_path / "names.csv"), role="ood", rejects="fail").dataset
    assert dataset.classes == ("tench", "goldfish")
    assert [row.label for row in dataset.rows] == ["tench", "goldfish"]


def test_a_missing_class_folder_is_named_before_any_image_is_read(make, photos):
    folder = photos("cat/1.png", "dog/2.png", "cat/broken.png (broken)")
    said = r"2 of the 3 classes .* are not among the 2 of the source: dogs, bird; nearest to the first is 'dog'"
    with pytest.raises(ValueError, match=said):
        make(f"folder:{folder}", classes=["cat", "dogs", "bird"], rejects="fail")


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([], "names no class"),
        ({"cat": ["a"], "dog": ["a"]}, "names 'a' twice"),
        ({"": ["a"]}, "has an empty name"),
        ("gone.csv", "the file that `classes` names, does not exist"),
        ("x.yaml", "ends in '.yaml'"),
        ("x.csv", "'a,b,c' has 3 fields"),
        (["cloth"], "the source has no classes at all"),
    ],
)
def test_a_choice_of_classes_that_makes_no_sense_is_refused(make, photos, tmp_path, monkeypatch, classes, said):
    monkeypatch.chdir(tmp_path)
    for name in ("x.yaml", "x.csv"):
        (tmp_path / name).write_text("a,b,c\n")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        make(f"folder:{photos('1.png')}", classes=classes)


# Images that cannot be used (tests/trust/test_trust_images.py has what a file may hold).


def bomb() -> bytes:
    """A PNG of a few hundred bytes that declares 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.fixture
def wild(photos) -> Path:
    """Class folder `wild/x` of what browsers and broken disks leave behind beside nine images."""
    folder = photos(*(f"x/{i}.png" for i in range(8)), "x/日本 ü.png", "x/two\nlines.png", "x/page.jpg (broken)",
                    "x/dangling.png -> nowhere.png")  # fmt: skip
    (folder / "x/truncated.png").write_bytes((folder / "x/1.png").read_bytes()[:45])
    (folder / "x/zero.png").touch()
    (folder / "x/zero2.png").touch()
    (folder / "x/bomb.png").write_bytes(bomb())
    os.mkfifo(folder / "x/pipe.png")
    (folder / "x/folder.jpg").mkdir()
    return folder


REASONS = {
    "truncated.png": "truncated|broken", "zero.png": "empty file", "zero2.png": "empty file",
    "page.jpg": "not an image of a known format", "bomb.png": "DecompressionBombError",
    "dangling.png": "No such file or directory", "two\nlines.png": "control character", "pipe.png": "not a regular file",
}  # fmt: skip


def test_images_in_the_wild_are_used_or_rejected_with_their_reasons(make, wild, tmp_path):
    made = make(f"folder:{wild}", role="ood", max_rejects=0.5)
    assert len(made.dataset) == 9
    assert {one.path for one in made.rejected} == {f"x/{name}" for name in REASONS}
    for one in made.rejected:
        assert any(reason in one.reason for reason in REASONS[one.path.removeprefix("x/")].split("|"))
    with open(tmp_path / "data/mine/rejected.csv", newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {one.path for one in made.rejected}
    assert made.summary().endswith("8 rejected")
    lines = made.notes().splitlines()[1:]  # the most frequent reasons, each with an example
    assert lines[0] == "  2 x empty file, such as 'x/zero.png'"
    assert lines[-1] == "  … and 2 other reasons" and len(lines) == 6


def test_just_as_many_rejects_as_allowed_go_on(make, photos):
    folder = photos(*(f"x/{i}.png" for i in range(9)), "x/bad.png (broken)")
    assert len(make(f"folder:{folder}").rejected) == 1  # 1 of 10, and 0.1 is allowed
    said = (
        r"(?s)1 of 10 images cannot be used, more than max_rejects = 0\.09;.*1 x not an image .*, such as 'x/bad\.png'"
    )
    with pytest.raises(TooManyRejects, match=said):
        make(f"folder:{folder}", max_rejects=0.09)
    with pytest.raises(
        TooManyRejects, match=r"'x/bad\.png' cannot be used: not an image .*; replace or remove it, or set"
    ):
        make(f"folder:{folder}", rejects="fail")
