"""Lists of images in their usual forms: understood or refused, never half."""

import unicodedata

import pytest

from regvit.data.sources.image_list import read_list

LISTS = {  # name of the list, its text; {photos} is the folder of the images cat/1.png, dog/é 2.png
    "relative": ("photos/l.csv", "path,label\ncat/1.png,cat\ndog/{e} 2.png,dog\n"),
    "without a header": ("photos/l.csv", "cat/1.png,cat\ndog/{e} 2.png,dog\n"),
    "absolute, elsewhere": ("lists/l.csv", "path,label\n{photos}/cat/1.png,cat\n{photos}/dog/{e} 2.png,dog\n"),
    "absolute and relative": ("lists/l.csv", "{photos}/cat/1.png,cat\n../photos/dog/{e} 2.png,dog\n"),
    "semicolons": ("photos/l.csv", "path;label\ncat/1.png;cat\ndog/{e} 2.png;dog\n"),
    "semicolons without a header": ("photos/l.csv", "cat/1.png;cat\ndog/{e} 2.png;dog\n"),
    "tabs": ("photos/l.tsv", "cat/1.png\tcat\ndog/{e} 2.png\tdog\n"),
    "bars": ("photos/l.txt", "cat/1.png|cat\ndog/{e} 2.png|dog\n"),
    "spaces": ("photos/l.txt", "cat/1.png cat\ndog/{e} 2.png dog\n"),
    "line ends of other systems": ("photos/l.csv", "path,label\r\ncat/1.png,cat\r\n\r\ndog/{e} 2.png,dog\r\n"),
    "other names of columns": ("photos/l.csv", "ID,Class,File Name\n1,cat,cat/1.png\n2,dog,dog/{e} 2.png\n"),
    "a quoted path": ("photos/l.csv", 'path;label\ncat/1.png;cat\n"dog/{e} 2.png";dog\n'),
    "separators of Windows": ("photos/l.csv", "path,label\ncat\\1.png,cat\ndog\\{e} 2.png,dog\n"),
    "the other Unicode form": ("photos/l.csv", "path,label\ncat/1.png,cat\ndog/{d} 2.png,dog\n"),
    "UTF-16": ("photos/l.csv", "path,label\ncat/1.png,cat\ndog/{e} 2.png,dog\n"),
    "a byte order mark": ("photos/l.csv", "\ufeffpath,label\ncat/1.png,cat\ndog/{e} 2.png,dog\n"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_are_understood_in_their_usual_forms(make, photos, tmp_path, kind):
    folder, (name, text) = photos("cat/1.png", "dog/é 2.png"), LISTS[kind]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    text = text.format(photos=folder, e="é", d=unicodedata.normalize("NFD", "é"))
    (tmp_path / name).write_bytes(text.encode("utf-16" if kind == "UTF-16" else "utf-8"))
    made = make(f"folder:{tmp_path / name}", role="ood")
    assert {row.path: row.label for row in made.dataset.rows} == {"cat/1.png": "cat", "dog/é 2.png": "dog"}
    assert made.rejected == () and all(made.dataset.image_path(i).is_file() for i in (0, 1))


def test_a_list_gives_paths_labels_and_splits_in_its_order_and_every_other_row_is_rejected(make, photos):
    folder = photos(
        "b.png", "sub/a.png", "c -> b.png", "lost.png -> gone.png", "me.png -> me.png", ".b.png (broken)", "b.txt"
    )
    text = 'Split,path,label,note\nTESTING,sub/a.png,"cat, big",x\ntrain,b.png,dog,\nValidation,c,,\n'
    others = "gone.png", "sub", "lost.png", "me.png", ".b.png", "b.txt"
    (folder / "list.csv").write_text(text + "".join(f"train,{path},dog,\n" for path in others))
    made = make(f"folder:{folder / 'list.csv'}", max_rejects=0.9)
    assert [(row.path, row.label, row.split) for row in made.dataset.rows] == [
        ("sub/a.png", "cat, big", "test"), ("b.png", "dog", "train"), ("c", "", "val"),
    ]  # fmt: skip
    missing, broken = "No such file or directory", "not an image of a known format"
    assert {one.path: one.reason for one in made.rejected} == {
        "gone.png": missing, "sub": "not a regular file", "lost.png": missing, "b.txt": broken, ".b.png": broken,
        "me.png": "Too many levels of symbolic links",
    }  # fmt: skip


def test_a_first_image_that_is_missing_is_rejected_where_the_columns_are_named(make, photos):
    file = photos("b.png", "c.png") / "l.csv"
    file.write_text("path,label\ngone.png,x\nb.png,x\nc.png,y\n")
    made = make(f"folder:{file}", role="ood", max_rejects=0.9)
    assert [row.path for row in made.dataset.rows] == ["b.png", "c.png"]
    assert [one.path for one in made.rejected] == ["gone.png"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no image"),
        ("path,label\n", "names no image"),
        ("id,breed\na.png,cat\n", "begins with 'id,breed', which names no image and is no header that is understood"),
        ("path,image,label\na.png,a.png,cat\n", "has several columns of paths in its first line"),
        ("a.png,x,test,more\n", "line 1: 4 fields, expected path,label,split"),
        ("path,label\na.png\n", "line 2: 1 fields, expected path,label"),
        ("a.png,x,fold 3\n", "line 1: split 'fold 3' is unknown"),
        ("a.png,x,train\nb.png,x\n", "a split to some images and not to others"),
        ("a.png,x\n./a.png,y\n", "names './a.png' twice"),
        ('a.png,x\n"b.png,x\nc.png,x\n', r"line 2: unexpected end of data; close what it opens with a double quote"),
        ('a.png,x\n"b".png,x\n', "line 2: ',' expected after"),
        ("a.png,x\n" + "b" * 200_000 + ",x\n", r"line 2: field larger than field limit \(131072\)"),
        ("a.png,x\n,x\n", "line 2: path '' names no file"),
        (b"\xfc.png,x", "is not UTF-8"),
        ("a.png,x\na\0.png,x\n", "holds NUL characters"),
    ],
)
def test_a_list_with_a_fault_is_refused_with_its_line(photos, text, said):
    file = photos("a.png") / "l.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said):
        read_list(file)


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_a_line_of_a_list_ends_where_an_editor_ends_it(tmp_path, suffix):
    for strange in "\u2028\u2029\x0b\x0c\x1c\x85":
        comma = "," if suffix == ".csv" else " "
        (tmp_path / f"l{suffix}").write_text(f"a{strange}b.png{comma}x\nc.png{comma}y\n", encoding="utf-8")
        _, listed = read_list(tmp_path / f"l{suffix}")
        assert [(one.path, one.label) for one in listed] == [(f"a{strange}b.png", "x"), ("c.png", "y")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_spaces_of_a_quoted_path_are_its_own_and_others_do_not_count(tmp_path, end):
    lines = [b'" a.png", x', b" b.png , y ", b'"c.png ", "two words"', b'd.png, 5" disk']
    (tmp_path / "l.csv").write_bytes(end.join(lines))
    _, listed = read_list(tmp_path / "l.csv")
    assert [(one.path, one.label) for one in listed] == [
        (" a.png", "x"), ("b.png", "y"), ("c.png ", "two words"), ("d.png", '5" disk')]  # fmt: skip
    (tmp_path / "l.txt").write_text("  my b.png  3 \n\nx\u00a0y.png 4")
    _, listed = read_list(tmp_path / "l.txt")
    assert [(one.path, one.label) for one in listed] == [("my b.png", "3"), ("x\u00a0y.png", "4")]
