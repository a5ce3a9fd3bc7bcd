from pathlib import Path

import pytest
from PIL import Image

from regvit.data.sources.image_list import read_list


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
        ("a.png,x,third\n", "line 1: split 'third' is unknown"),
        ("a.png,x,train\nb.png,x\n", "a split to some images and not to others"),
        ("a.png,x\na.png,y\n", "names 'a.png' twice"),
        ('a.png,x\n"b.png,x\nc.png,x\n', r"line 2: unexpected end of data; close what it opens with a double quote"),
        ('a.png,x\n"b".png,x\n', "line 2: ',' expected after"),
        ("a.png,x\n" + "b" * 200_000 + ",x\n", r"line 2: field larger than field limit \(131072\)"),
        ("a.png,x\n,x\n", "line 2: path '' names no file"),
        (b"\xfc.png,x", "is not UTF-8"),
        ("a.png,x\na\0.png,x\n", "holds NUL characters"),
    ],
)
def test_a_list_with_a_fault_is_refused_with_its_line(tmp_path, text, said):
    (tmp_path / "l.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
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
