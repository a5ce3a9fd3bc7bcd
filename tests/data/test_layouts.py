"""Folders and lists as people have them: understood or refused, and no file vanishes."""

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from regvit.data.decoding import image_suffixes

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
FORMATS = {".avif": "AVIF", ".jp2": "JPEG2000", ".tga": "TGA", ".jfif": "JPEG", ".webp": "WEBP", ".gif": "GIF"}


def write(root: Path, names: list[str]) -> None:
    """Files by their names: images by their suffixes, "-> target" a link, "(broken)" no image in spite of its suffix."""
    for i, name in enumerate(names):
        name, _, target = name.partition(" -> ")
        path = root / name.removesuffix(" (broken)")
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix.lower()
        if target:
            path.symlink_to(root / target)
        elif suffix in image_suffixes() and not name.endswith("(broken)"):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(path, FORMATS.get(suffix, "PNG"))
        else:
            path.write_text("no image")


def splits(*tops: str) -> list[str]:
    return [f"{top}/{label}/{i}.png" for top in tops for label in ("cat", "dog") for i in range(2)]


def taken(*pairs: tuple[str, str]) -> dict[str, str]:
    return {name: f"{split}: {name.split('/')[1]}" for top, split in pairs for name in splits(top)}


TREES = {  # files; what becomes of each image, "split: class" ("" where splits are drawn); rejected; counted
    "images without folders": (["1.png", "2.png"], {"1.png": "", "2.png": ""}, [], {}),
    "class folders": (["cat/1.png", "dog/2.png"], {"cat/1.png": "cat", "dog/2.png": "dog"}, [], {}),
    "folders within classes": (["cat/a/1.png", "dog/2.png"], {"cat/a/1.png": "cat", "dog/2.png": "dog"}, [], {}),
    **{
        " + ".join(tops): (splits(*tops), taken(*zip(tops, meaning, strict=True)), [], {})
        for *meaning, tops in (
            ("train", "test", ("train", "test")),
            ("train", "test", ("Train", "Test")),
            ("train", "test", ("Training", "Testing")),
            ("train", "val", "test", ("TRAIN", "VAL", "TEST")),
            ("train", "test", ("train", "eval")),  # val without test is the test split
            ("train", "val", "test", ("train", "dev", "test")),
            ("train", "test", ("seg_train", "seg_test")),
            ("train", "test", ("training_set", "test_set")),
            ("train", "test", ("trainset", "testset")),
            ("train", "test", ("Train Images", "Test Images")),
            ("train", "test", ("train2017", "val2017")),
            ("train", "val", "test", ("train", "valid", "test")),
        )
    },
    "a class called train": (["train/1.png", "car/2.png"], {"train/1.png": "train", "car/2.png": "car"}, [], {}),
    "suffixes of all formats": (
        [f"x/{i}{suffix}" for i, suffix in enumerate((".jfif", ".avif", ".jp2", ".tga", ".webp", ".PNG", ".Gif"))],
        {f"x/{i}{suffix}": "x" for i, suffix in enumerate((".jfif", ".avif", ".jp2", ".tga", ".webp", ".PNG", ".Gif"))},
        [],
        {},
    ),
    "other files": (
        [
            "cat/1.png",
            "cat/1.txt",
            "dog/labels.csv",
            "README",
            "b.txt",
            ".DS_Store",
            "cat/._1.png",
            ".git/objects/1.png",
        ],
        {"cat/1.png": "cat"},
        [],
        {".txt": 2, ".csv": 1, "without a suffix": 1, "hidden": 3},
    ),
    "a folder called like an image": (["x/1.jpg/2.png", "x/3.png"], {"x/1.jpg/2.png": "x", "x/3.png": "x"}, [], {}),
    "broken images": (["x/1.png", "x/2.png (broken)"], {"x/1.png": "x"}, ["x/2.png"], {}),
    "images beside splits": (
        [*splits("train", "test"), "0.png"],
        taken(("train", "train"), ("test", "test")),
        ["0.png"],
        {},
    ),
    "linked folders and files": (
        ["../far/1.png", "../far/a/2.png", "cat/1.png", "cat/3.png -> ../far/1.png", "dog -> ../far"],
        {"cat/1.png": "cat", "cat/3.png": "cat", "dog/1.png": "dog", "dog/a/2.png": "dog"},
        [],
        {},
    ),
    "circles": (
        ["cat/1.png", "cat/up -> .", "cat/same -> cat", "a -> cat", "cat/gone.png -> nowhere.png"],
        {"cat/1.png": "cat"},
        ["cat/gone.png"],
        {"links to folders that are read anyway": 3},
    ),
    "two links to one folder": (
        ["../far/1.png", "a -> ../far", "b -> ../far", "c/2.png"],
        {"a/1.png": "a", "c/2.png": "c"},
        [],
        {"links to folders that are read anyway": 1},
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
}


@pytest.mark.parametrize("kind", TREES)
def test_every_file_of_a_tree_is_an_image_or_rejected_or_counted(make, tmp_path, kind):
    files, images, rejected, left_out = TREES[kind]
    write(tmp_path / "photos", files)
    made = make(f"folder:{tmp_path / 'photos'}", max_rejects=0.9)
    drawn = not any(":" in meaning for meaning in images.values())
    rows = {row.path: row.label if drawn else f"{row.split}: {row.label}" for row in made.dataset.rows}
    if not drawn:  # val is taken out of train where there is none
        rows = {path: meaning.replace("val:", "train:") if ": val" not in images[path] and images[path].startswith("train")
                else meaning for path, meaning in rows.items()}  # fmt: skip
    assert rows == images
    assert sorted(one.path for one in made.rejected) == sorted(rejected)
    assert made.left_out == left_out
    if not any("->" in name for name in files):
        assert len(files) == len(rows) + len(rejected) + made.left_out.total()
    if left_out:
        assert f"  {sum(left_out.values())} files are no images: " in made.notes()


def test_a_class_is_chosen_by_either_unicode_form(make, tmp_path):
    write(tmp_path / "photos", [f"{NFD}/1.png", "dog/2.png"])
    dataset = make(f"folder:{tmp_path / 'photos'}", role="ood", classes={"house": [NFD]}).dataset
    assert [(row.path, row.label) for row in dataset.rows] == [(f"{NFD}/1.png", "house")]


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
        (["train/Cat/1.png", "test/cat/2.png"], "classes 'Cat' and 'cat' differ only in case or spaces"),
        (["cat/1.png", "cat /2.png"], "classes 'cat' and 'cat ' differ only in case or spaces"),
        (["cat/1.txt", "dog/2.csv"], "holds no image; looked for"),
    ],
)
def test_a_tree_that_can_be_read_in_two_ways_is_refused(make, tmp_path, files, said):
    write(tmp_path / "photos", files)
    with pytest.raises(ValueError, match=said):
        make(f"folder:{tmp_path / 'photos'}")


LISTS = {  # name of the list, its text; {photos} is the folder of the images cat/1.png, dog/é 2.png
    "relative": ("photos/l.csv", "path,label\ncat/1.png,cat\ndog/{e} 2.png,dog\n"),
    "without a header": ("photos/l.csv", "cat/1.png,cat\ndog/{e} 2.png,dog\n"),
    "absolute, beside the class folders": (
        "photos/l.csv",
        "path,label\n{photos}/cat/1.png,cat\n{photos}/dog/{e} 2.png,dog\n",
    ),
    "absolute, elsewhere": ("lists/l.csv", "{photos}/cat/1.png,cat\n{photos}/dog/{e} 2.png,dog\n"),
    "absolute and relative": ("lists/l.csv", "{photos}/cat/1.png,cat\n../photos/dog/{e} 2.png,dog\n"),
    "semicolons": ("photos/l.csv", "path;label\ncat/1.png;cat\ndog/{e} 2.png;dog\n"),
    "semicolons without a header": ("photos/l.csv", "cat/1.png;cat\ndog/{e} 2.png;dog\n"),
    "tabs": ("photos/l.tsv", "cat/1.png\tcat\ndog/{e} 2.png\tdog\n"),
    "bars": ("photos/l.txt", "cat/1.png|cat\ndog/{e} 2.png|dog\n"),
    "spaces": ("photos/l.txt", "cat/1.png cat\ndog/{e} 2.png dog\n"),
    "line ends of other systems": ("photos/l.csv", "path,label\r\ncat/1.png,cat\r\n\r\ndog/{e} 2.png,dog\r\n"),
    "other names of columns": ("photos/l.csv", "ID,Class,File Name\n1,cat,cat/1.png\n2,dog,dog/{e} 2.png\n"),
    "a class with a comma": ("photos/l.csv", 'path;label\ncat/1.png;cat\n"dog/{e} 2.png";dog\n'),
    "separators of Windows": ("photos/l.csv", "path,label\ncat\\1.png,cat\ndog\\{e} 2.png,dog\n"),
    "the other Unicode form": ("photos/l.csv", "path,label\ncat/1.png,cat\ndog/{d} 2.png,dog\n"),
    "UTF-16": ("photos/l.csv", "path,label\ncat/1.png,cat\ndog/{e} 2.png,dog\n"),
    "a byte order mark": ("photos/l.csv", "\ufeffpath,label\ncat/1.png,cat\ndog/{e} 2.png,dog\n"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_are_understood_in_their_usual_forms(make, tmp_path, kind):
    photos, (name, text) = tmp_path / "photos", LISTS[kind]
    write(photos, ["cat/1.png", "dog/é 2.png"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    text = text.format(photos=photos, e="é", d=unicodedata.normalize("NFD", "é"))
    (tmp_path / name).write_bytes(text.encode("utf-16" if kind == "UTF-16" else "utf-8"))
    made = make(f"folder:{tmp_path / name}", role="ood")
    assert {row.path: row.label for row in made.dataset.rows} == {"cat/1.png": "cat", "dog/é 2.png": "dog"}
    assert made.rejected == () and all(made.dataset.image_path(i).is_file() for i in (0, 1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "id,breed\ncat/1.png,cat\n",
            "begins with 'id,breed', which names no image and is no header that is understood",
        ),
        ("path,image,label\ncat/1.png,cat/1.png,cat\n", "has several columns of paths in its first line"),
        ("cat/1.png,Cat\ndog/2.png,cat\n", "classes 'Cat' and 'cat' differ only in case"),
        ("cat/1.png,cat\n./cat/1.png,cat\n", "names './cat/1.png' twice"),
        ("cat/1.png,cat,fold 3\n", "split 'fold 3' is unknown"),
    ],
)
def test_a_list_that_is_not_understood_is_refused(make, tmp_path, text, said):
    write(tmp_path / "photos", ["cat/1.png", "dog/2.png"])
    (tmp_path / "photos/l.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        make(f"folder:{tmp_path / 'photos/l.csv'}", role="ood")


def test_a_list_gives_paths_labels_and_splits_in_its_order(make, tmp_path):
    write(tmp_path / "photos", ["b.png", "sub/a.png", "c.png"])
    text = 'Split,path,label,note\nTESTING,sub/a.png,"cat, big",x\ntrain,b.png,dog,\nValidation,c.png,,\n'
    (tmp_path / "photos/list.csv").write_text(text)
    dataset = make(f"folder:{tmp_path / 'photos/list.csv'}").dataset
    assert [(row.path, row.label, row.split) for row in dataset.rows] == [
        ("sub/a.png", "cat, big", "test"), ("b.png", "dog", "train"), ("c.png", "", "val"),
    ]  # fmt: skip


def test_a_role_is_held_against_the_listing_before_any_image_is_read(make, tmp_path):
    write(tmp_path / "photos", ["train/cat/1.png (broken)", "train/dog/2.png", "val/cat/3.png", "test/4.png"])
    with pytest.raises(ValueError, match=r"has the role id, but 1 of its 4 images have no class, such as test/4\.png"):
        make(f"folder:{tmp_path / 'photos'}", role="id", rejects="fail")
