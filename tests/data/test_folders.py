"""Folders and lists of images that stay where they are, with what is found in the wild."""

import csv
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regvit.data.dataset_builder import TooManyRejects
from regvit.data.decoding import read_rgb
from regvit.data.sources import Made, make_dataset
from regvit.data.sources.folder import read_list


@pytest.fixture
def make(tmp_path):
    """Make a data set in tmp_path/data."""

    def make(source: str, name: str = "mine", seed: int = 0, **entry) -> Made:
        folder = tmp_path / "data" / name
        return make_dataset(source, name, folder, tmp_path / "packages", seed, show_progress=False, **entry)

    return make


@pytest.fixture
def photos(tmp_path):
    """Write images named like "cat/1.png" under tmp_path/photos and return that folder."""

    def photos(*names: str) -> Path:
        for i, name in enumerate(names):
            path = tmp_path / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
        return tmp_path / "photos"

    return photos


def test_class_folders_are_split_by_the_seed_and_read_in_place(make, photos):
    folder = photos(*(f"{label}/{i}.png" for label in ("cat", "dog") for i in range(20)))
    dataset = make(f"folder:{folder}", "mine").dataset
    assert dataset.classes == ("cat", "dog")
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [28, 6, 6]
    assert dataset.image_path(0) == folder / "cat/0.png"
    assert all(row.label == row.path.split("/")[0] for row in dataset.rows)


def test_nothing_of_a_folder_is_copied(make, photos, tmp_path):
    make(f"folder:{photos('cat/1.png')}", "mine")
    assert sorted(path.name for path in (tmp_path / "data/mine").iterdir()) == [
        "dataset.json",
        "manifest.csv",
        "rejected.csv",
    ]


def test_a_relative_folder_starts_from_the_working_directory(make, photos, tmp_path, monkeypatch):
    photos("cat/1.png")
    monkeypatch.chdir(tmp_path)
    assert make("folder:photos", "mine").dataset.image_path(0) == tmp_path / "photos/cat/1.png"
    assert json.loads((tmp_path / "data/mine/dataset.json").read_text())["root"] == "../../photos"


def test_split_folders_keep_their_splits(make, photos):
    dataset = make(f"folder:{photos('train/cat/1.png', 'validation/cat/2.png', 'test/dog/3.png')}", "mine").dataset
    assert {row.path: (row.split, row.label) for row in dataset.rows} == {
        "train/cat/1.png": ("train", "cat"),
        "validation/cat/2.png": ("val", "cat"),
        "test/dog/3.png": ("test", "dog"),
    }


def test_a_missing_val_split_is_taken_out_of_train(make, photos):
    folder = photos(*(f"train/cat/{i}.png" for i in range(20)), *(f"test/cat/{i}.png" for i in range(5)))
    dataset = make(f"folder:{folder}", "mine").dataset
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [17, 3, 5]


def test_a_class_called_train_is_a_class_and_a_mixture_is_refused(make, photos):
    dataset = make(f"folder:{photos('train/1.png', 'car/2.png')}", "vehicles").dataset
    assert dataset.classes == ("car", "train")
    with pytest.raises(ValueError, match=r"has split folders \(test, train\) beside others \(car\)"):
        make(f"folder:{photos('test/1.png')}", "mixture")


def test_images_without_a_class_folder_have_no_label(make, photos):
    dataset = make(f"folder:{photos('1.png', '2.png')}", "mine").dataset
    assert [row.label for row in dataset.rows] == ["", ""] and dataset.classes == ()


def test_unusable_images_are_listed_with_reasons_and_the_rest_is_kept(make, photos, tmp_path):
    folder = photos("train/cat/1.png", "train/cat/2.png", "stray.png", "train/cat/bad\\name.png")
    (folder / "train/cat/broken.jpg").write_text("no image")
    (folder / "train/cat/notes.txt").write_text("not even meant as one")
    (folder / "train/cat/.hidden.png").write_text("left by an operating system")
    made = make(f"folder:{folder}", "mine", max_rejects=0.6)
    assert {row.path for row in made.dataset.rows} == {"train/cat/1.png", "train/cat/2.png"}
    reasons = {one.path: one.reason for one in made.rejected}
    assert reasons.keys() == {"stray.png", "train/cat/bad\\name.png", "train/cat/broken.jpg"}
    assert reasons["train/cat/broken.jpg"] == "not an image of a known format"
    assert "beside the split folders" in reasons["stray.png"]
    assert len((tmp_path / "data/mine/rejected.csv").read_text().splitlines()) == 4


def test_linked_class_folders_are_followed_and_circles_are_not(make, photos, tmp_path):
    folder = photos("cat/1.png")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere/2.png")
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / "cat/loop").symlink_to(folder)
    assert [row.path for row in make(f"folder:{folder}", "mine").dataset.rows] == ["cat/1.png", "dog/2.png"]


def test_an_image_changed_in_place_changes_the_digest(make, photos):
    folder = photos("cat/1.png")
    before = make(f"folder:{folder}", "mine").dataset.digest
    Image.new("RGB", (4, 4), (1, 2, 3)).save(folder / "cat/1.png")
    assert make(f"folder:{folder}", "mine").dataset.digest != before


def test_a_folder_that_is_missing_or_empty_or_all_broken_is_refused(make, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone, the folder of source 'folder:.*gone', does not exist"):
        make(f"folder:{tmp_path / 'gone'}", "mine")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"holds no image; looked for \.apng, "):
        make(f"folder:{tmp_path / 'photos'}", "mine")
    (tmp_path / "photos/x.png").touch()
    with pytest.raises(ValueError, match="gave no usable image; the first of 1 rejected: empty file"):
        make(f"folder:{tmp_path / 'photos'}", "mine")
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


# Choosing classes.


def test_class_folders_can_be_kept_renamed_and_merged(make, photos):
    folder = photos("tabby/1.png", "siamese/2.png", "beagle/3.png", "car/4.png", "stray.png")
    dataset = make(f"folder:{folder}", classes={"dog": "beagle", "cat": ["tabby", "siamese"]}, role="ood").dataset
    assert dataset.classes == ("dog", "cat")
    assert {row.path: row.label for row in dataset.rows} == {
        "beagle/3.png": "dog",
        "siamese/2.png": "cat",
        "tabby/1.png": "cat",
    }
    assert make(f"folder:{folder}", classes=["car", "beagle"], role="ood").dataset.classes == ("car", "beagle")


def test_images_of_other_classes_are_not_even_read(make, photos):
    folder = photos("cat/1.png", "dog/2.png")
    (folder / "dog/broken.png").write_text("no image")
    assert make(f"folder:{folder}", classes=["cat"], rejects="fail").rejected == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.csv", "# as the publisher numbers them\n0,tench\n1,goldfish\n"),
        ("names.json", '{"tench": ["0"], "goldfish": "1"}'),
    ],
)
def test_numbered_class_folders_get_their_names_from_a_file(make, photos, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    dataset = make(
        f"folder:{photos('0/a.png', '1/b.png', '2/c.png')}", classes=str(tmp_path / name), role="ood"
    ).dataset
    assert dataset.classes == ("tench", "goldfish")
    assert [row.label for row in dataset.rows] == ["tench", "goldfish"]


def test_a_missing_class_folder_is_named_before_any_image_is_read(make, photos):
    folder = photos("cat/1.png", "dog/2.png")
    (folder / "cat/broken.png").write_text("no image")
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
    ],
)
def test_a_choice_of_classes_that_makes_no_sense_is_refused(make, photos, classes, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        make(f"folder:{photos('a/1.png')}", classes=classes)


def test_a_file_of_classes_with_another_suffix_or_too_many_fields_is_refused(make, photos, tmp_path):
    folder = photos("a/1.png")
    for name, said in (("x.yaml", "ends in '.yaml'"), ("x.csv", "'a,b,c' has 3 fields")):
        (tmp_path / name).write_text("a,b,c\n")
        with pytest.raises(ValueError, match=said):
            make(f"folder:{folder}", classes=str(tmp_path / name))


# Images in the wild.


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that declares 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.fixture
def wild(tmp_path) -> Path:
    """Class folder `wild/x` of whatever cameras, browsers and broken disks leave behind."""
    folder = tmp_path / "wild/x"
    folder.mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    # usable
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    noise.convert("L").save(folder / "grey.jpg")
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27).save(folder / "deep.png")
    palette = noise.quantize(16)
    palette.save(folder / "palette.png", transparency=3)
    noise.save(folder / "moving.gif", save_all=True, append_images=[noise.rotate(90), noise.rotate(180)])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    noise.save(folder / "turned.jpg", exif=exif)
    (folder / "really_a_png.jpg").write_bytes(png(noise))
    Image.new("RGB", (1, 1), (9, 8, 7)).save(folder / "dot.png")
    noise.save(folder / "日本 ü.png")
    # unusable
    content = io.BytesIO()
    noise.save(content, "JPEG")
    (folder / "truncated.jpg").write_bytes(content.getvalue()[:900])
    (folder / "zero.png").touch()
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    noise.save(folder / "two\nlines.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.jpg").mkdir()
    return folder.parent


USABLE = {
    "cmyk.jpg",
    "grey.jpg",
    "deep.png",
    "palette.png",
    "moving.gif",
    "turned.jpg",
    "really_a_png.jpg",
    "dot.png",
    "日本 ü.png",
}
REASONS = {
    "truncated.jpg": "truncated",
    "zero.png": "empty file",
    "page.jpg": "not an image of a known format",
    "bomb.png": "DecompressionBombError",
    "dangling.png": "No such file or directory",
    "two\nlines.png": "control character",
    "pipe.png": "not a regular file",
}


def test_images_in_the_wild_are_used_or_rejected_with_their_reasons(make, wild, tmp_path):
    made = make(f"folder:{wild}", role="ood", max_rejects=0.5)
    assert {row.path for row in made.dataset.rows} == {f"x/{name}" for name in USABLE}
    assert {one.path for one in made.rejected} == {f"x/{name}" for name in REASONS}
    for one in made.rejected:
        assert REASONS[one.path.removeprefix("x/")] in one.reason
    with open(tmp_path / "data/mine/rejected.csv", newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {one.path for one in made.rejected}
    assert made.summary().endswith("7 rejected")


def test_every_image_that_was_not_rejected_can_be_decoded_upright_as_rgb(make, wild):
    dataset = make(f"folder:{wild}", role="ood", max_rejects=0.5).dataset
    sizes = {row.path: read_rgb(dataset.image_path(i)).size for i, row in enumerate(dataset.rows)}
    assert sizes.pop("x/turned.jpg") == (40, 60)
    assert sizes.pop("x/dot.png") == (1, 1)
    assert set(sizes.values()) == {(60, 40)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_without_read_permission_is_rejected(make, photos):
    folder = photos("x/1.png", "x/2.png")
    (folder / "x/2.png").chmod(0)
    assert [one.reason for one in make(f"folder:{folder}", max_rejects=0.5).rejected] == ["Permission denied"]


def test_the_most_frequent_reasons_come_first_each_with_an_example(make, wild):
    (wild / "x/zero2.png").touch()
    (wild / "x/truncated2.jpg").write_bytes((wild / "x/truncated.jpg").read_bytes()[:-7])
    lines = make(f"folder:{wild}", role="ood", max_rejects=0.5).reasons().splitlines()
    assert lines[0].startswith("  2 x OSError: image file is truncated (# bytes not processed), such as 'x/trunc")
    assert lines[1] == "  2 x empty file, such as 'x/zero.png'"
    assert lines[-1] == "  … and 2 other reasons" and len(lines) == 6


def test_more_rejects_than_allowed_stop_with_a_summary_and_leave_nothing(make, wild, tmp_path):
    with pytest.raises(
        TooManyRejects,
        match=r"(?s)7 of 16 images cannot be used, more than max_rejects = 0\.1;.*1 x OSError: image file is trunc",
    ):
        make(f"folder:{wild}", role="ood")
    assert not (tmp_path / "data/mine").exists()


def test_just_as_many_rejects_as_allowed_go_on(make, photos):
    folder = photos(*(f"x/{i}.png" for i in range(9)))
    (folder / "x/bad.png").touch()
    assert len(make(f"folder:{folder}").rejected) == 1  # 1 of 10, and 0.1 is allowed
    with pytest.raises(TooManyRejects, match="1 of 10 images"):
        make(f"folder:{folder}", max_rejects=0.09)


def test_with_the_policy_fail_the_first_unusable_image_stops_it(make, photos):
    folder = photos("x/1.png")
    (folder / "x/bad.png").touch()
    with pytest.raises(TooManyRejects, match=r"'x/bad\.png' cannot be used: empty file; replace or remove it, or set"):
        make(f"folder:{folder}", rejects="fail")


# Lists of files.


def test_a_list_gives_paths_labels_and_splits_in_its_order(make, photos):
    folder = photos("b.png", "sub/a.png", "c.png")
    (folder / "list.csv").write_text(
        'split,path,label,note\ntest,sub/a.png,"cat, big",x\ntrain,b.png,dog,\nval,c.png,,\n'
    )
    dataset = make(f"folder:{folder / 'list.csv'}").dataset
    assert [(row.path, row.label, row.split) for row in dataset.rows] == [
        ("sub/a.png", "cat, big", "test"),
        ("b.png", "dog", "train"),
        ("c.png", "", "val"),
    ]
    assert dataset.image_path(1) == folder / "b.png"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "my b.png 3\nsub/a.png 4\n"),
        ("l.txt", "my b.png,3\n\nsub/a.png,4\n"),
        ("l.tsv", "my b.png\t3\nsub/a.png\t4\n"),
        ("l.csv", "\ufeffpath,label\r\nmy b.png,3\r\nsub/a.png,4\r\n"),
    ],
)
def test_lists_are_understood_in_their_usual_forms(make, photos, name, text):
    folder = photos("my b.png", "sub/a.png")
    (folder / name).write_bytes(text.encode())
    dataset = make(f"folder:{folder / name}", role="ood").dataset
    assert [(row.path, row.label, row.split) for row in dataset.rows] == [
        ("my b.png", "3", "test"),
        ("sub/a.png", "4", "test"),
    ]


def test_a_list_may_name_images_elsewhere(make, photos, tmp_path):
    folder = photos("deep/cat/a.png", "deep/dog/b.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/l.csv").write_text(f"{folder}/deep/cat/a.png,cat\n../photos/deep/dog/b.png,dog\n")
    dataset = make(f"folder:{tmp_path / 'lists/l.csv'}", role="ood").dataset
    assert [row.path for row in dataset.rows] == ["cat/a.png", "dog/b.png"]
    assert [dataset.image_path(i).is_file() for i in (0, 1)] == [True, True]


def test_images_of_a_list_that_are_not_there_are_rejected(make, photos):
    folder = photos("a.png", "dir/b.png")
    (folder / "l.csv").write_text("a.png,x\ngone.png,x\ndir,x\n")
    made = make(f"folder:{folder / 'l.csv'}", max_rejects=0.9)
    assert {one.path: one.reason for one in made.rejected} == {
        "gone.png": "No such file or directory",
        "dir": "not a regular file",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no image"),
        ("path,label\n", "names no image"),
        ("a.png,x,test,more\n", "line 1: 4 fields, expected path,label,split"),
        ("path,label\na.png\n", "line 2: 1 fields, expected path,label"),
        ("a.png,x,dev\n", "line 1: split 'dev' is unknown"),
        ("a.png,x,train\nb.png,x\n", "a split to some images and not to others"),
        ("a.png,x\na.png,y\n", "names 'a.png' twice"),
        ('a.png,x\n"b.png,x\nc.png,x\n', r"line 2: unexpected end of data; close what it opens with a double quote"),
        ('a.png,x\n"b".png,x\n', "line 2: ',' expected after"),
        ("a.png,x\n" + "b" * 200_000 + ",x\n", r"line 2: field larger than field limit \(131072\)"),
        ("a.png,x\n,x\n", "line 2: path '' names no file"),
        ("a.png,x\na\0.png,x\n", r"line 2: path 'a\\x00\.png' names no file|line contains NUL"),
    ],
)
def test_a_list_with_a_fault_is_refused_with_its_line(tmp_path, text, said):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_list(tmp_path / "l.csv")


@pytest.mark.parametrize("strange", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85"])
@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_a_line_of_a_list_ends_where_an_editor_ends_it(tmp_path, strange, suffix):
    comma = "," if suffix == ".csv" else " "
    (tmp_path / f"l{suffix}").write_text(f"a{strange}b.png{comma}x\nc.png{comma}y\n", encoding="utf-8")
    _, listed = read_list(tmp_path / f"l{suffix}")
    assert [(one.path, one.label) for one in listed] == [(f"a{strange}b.png", "x"), ("c.png", "y")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_spaces_of_a_quoted_path_are_its_own_and_others_do_not_count(tmp_path, end):
    (tmp_path / "l.csv").write_bytes(
        end.join([b'" a.png", x', b" b.png , y ", b'"c.png ", "two words"', b'd.png, 5" disk'])
    )
    _, listed = read_list(tmp_path / "l.csv")
    assert [(one.path, one.label) for one in listed] == [
        (" a.png", "x"), ("b.png", "y"), ("c.png ", "two words"), ("d.png", '5" disk')]  # fmt: skip
    (tmp_path / "l.txt").write_text("  my b.png  3 \n\nx\u00a0y.png 4")
    _, listed = read_list(tmp_path / "l.txt")
    assert [(one.path, one.label) for one in listed] == [("my b.png", "3"), ("x\u00a0y.png", "4")]


def test_a_list_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "l.csv").write_bytes("ü.png,x".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_list(tmp_path / "l.csv")
