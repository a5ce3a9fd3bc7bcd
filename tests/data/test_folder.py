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


def test_a_missing_val_split_is_taken_out_of_train(make, photos):
    folder = photos(*(f"train/cat/{i}.png" for i in range(20)), *(f"test/cat/{i}.png" for i in range(5)))
    dataset = make(f"folder:{folder}", "mine").dataset
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [17, 3, 5]


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


def test_the_most_frequent_reasons_come_first_each_with_an_example(make, wild):
    (wild / "x/zero2.png").touch()
    (wild / "x/truncated2.jpg").write_bytes((wild / "x/truncated.jpg").read_bytes()[:-7])
    lines = make(f"folder:{wild}", role="ood", max_rejects=0.5).notes().splitlines()[1:]
    assert lines[0].startswith("  2 x OSError: image file is truncated (# bytes not processed), such as 'x/trunc")
    assert lines[1] == "  2 x empty file, such as 'x/zero.png'"
    assert lines[-1] == "  … and 2 other reasons" and len(lines) == 6


def test_more_rejects_than_allowed_stop_with_a_summary_and_leave_nothing(make, wild, tmp_path):
    with pytest.raises(
        TooManyRejects,
        match=r"(?s)7 of 16 images cannot be used, more than max_rejects = 0\.1;.*1 x not a regular file, such as 'x/pipe",
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
