import hashlib
import pickle
import re
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regvit.data import manifest
from regvit.data.manifest import Dataset, InvalidManifest, Row, escapes, read_dataset, write_dataset

ROWS = (
    Row("b", "images/b.png", "dog", "train"),
    Row("a", "images/a, with comma.png", "", "test", "[[0, 1, 2, 3]]", "masks/a.png", "ff"),
    Row("c", "images/ü.png", "cat", "val"),
)


def write(folder: Path, rows=ROWS, classes=("cat", "dog"), **more) -> Path:
    write_dataset(folder, "pets", rows, classes, {"licence": "CC0-1.0"}, **more)
    return folder


def test_rows_come_back_in_the_order_they_were_given(tmp_path):
    dataset = read_dataset(write(tmp_path / "pets"))
    assert dataset.rows == ROWS
    assert (dataset.name, dataset.classes, len(dataset)) == ("pets", ("cat", "dog"), 3)
    assert dataset.image_path(1) == tmp_path / "pets/images/a, with comma.png"
    assert dataset.digest == hashlib.sha256((tmp_path / "pets/manifest.csv").read_bytes()).hexdigest()
    assert pickle.loads(pickle.dumps(dataset)) == dataset


def test_labels_are_places_among_the_classes_and_minus_one_without_a_label(tmp_path):
    labels = read_dataset(write(tmp_path)).labels()
    assert labels.dtype == np.int64
    assert labels.tolist() == [1, -1, 0]


def test_a_subset_has_the_rows_of_its_split_and_the_digest_of_the_whole(tmp_path):
    dataset = read_dataset(write(tmp_path))
    assert [row.image_id for row in dataset.subset("test").rows] == ["a"]
    assert dataset.subset("val").digest == dataset.digest
    with pytest.raises(ValueError, match="split 'validation' is unknown; use one of train, val, test"):
        dataset.subset("validation")


def test_labels_and_splits_of_a_part_are_its_own(tmp_path):
    part = read_dataset(write(tmp_path)).subset("val")
    assert part.labels().tolist() == [0] and part.split_rows("val").tolist() == [0]
    assert part.split_rows("train").tolist() == part.split_rows("test").tolist() == []
    narrowed = Dataset("pets", tmp_path, ("cat",), part.rows, "")  # it shares its columns with rows of class dog
    assert narrowed.labels().tolist() == [0]
    with pytest.raises(KeyError, match="dog"):
        Dataset("pets", tmp_path, ("cat",), ROWS, "").labels()


def test_an_image_beyond_the_end_is_refused(tmp_path):
    dataset = read_dataset(write(tmp_path))
    for i in (-1, 3):
        with pytest.raises(IndexError, match=rf"image {i} is out of range \(0 to 2\)"):
            dataset.image_path(i)


def test_images_elsewhere_are_found_from_the_recorded_root(tmp_path):
    (tmp_path / "photos").mkdir()
    relative = read_dataset(write(tmp_path / "data/pets", root="../../photos"))
    absolute = read_dataset(write(tmp_path / "data/pets2", root=tmp_path / "photos"))
    assert relative.root == absolute.root == tmp_path / "photos"


def test_a_relative_root_starts_from_where_a_linked_folder_is_seen(tmp_path):
    (tmp_path / "photos").mkdir()
    write(tmp_path / "cache/deep/down/pets", root="../photos")
    (tmp_path / "data").mkdir()
    (tmp_path / "pets").symlink_to(tmp_path / "cache/deep/down/pets")
    assert read_dataset(tmp_path / "pets").root == tmp_path / "photos"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("b", "x.png", "", "test"), "row 4: image_id 'b' occurs twice"),
        (Row("", "x.png", "", "test"), "row 4: image_id '' is empty"),
        (Row("d", "../x.png", "", "test"), r"path '\.\./x\.png' leaves the root"),
        (Row("d", "x.png", "fish", "test"), "label 'fish' is not among the 2 classes"),
        (Row("d", "x.png", "", "dev"), "split 'dev' is unknown; use one of train, val, test"),
        (Row("d", "x.png", "", "test", boxes="[1, 2, 3, 4]"), "are not a JSON list of"),
        (Row("d", "x.png", "", "test", boxes="[[5, 0, 5, 9]]"), "with x0 < x1 and y0 < y1"),
        (Row("d", "x.png", "", "test", boxes="[[0, 0, Infinity, Infinity]]"), "are not a JSON list of"),
        (Row("d", "x.png", "", "test", boxes="[" * 100_000), "are not a JSON list of"),
        (Row("d", "x.png", "", "test", boxes=f"[[0, 0, {'9' * 5000}, 9]]"), "are not a JSON list of"),
    ],
)
def test_a_bad_row_is_refused_on_writing_and_nothing_is_written(tmp_path, row, message):
    with pytest.raises(InvalidManifest, match=message):
        write(tmp_path / "pets", (*ROWS, row))
    assert not (tmp_path / "pets").exists()


def test_a_bad_row_is_refused_on_reading_and_so_is_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.csv is missing"):
        read_dataset(tmp_path)
    write(tmp_path)
    table = tmp_path / "manifest.csv"
    table.write_text(table.read_text() + "d,x.png,fish,test,,,\n")
    with pytest.raises(InvalidManifest, match=r"manifest\.csv, row 4: label 'fish'"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([Row("d", "x.png", "", "dev"), ROWS[0]], "row 4: split 'dev' is unknown"),
        ([ROWS[0], Row("d", "x.png", "", "dev")], "row 4: image_id 'b' occurs twice"),
        ([Row("b", "x.png", "", "dev")], "row 4: image_id 'b' occurs twice"),
        ([Row("d", "x.png", "", "test"), Row("d", "y.png", "", "test"), ROWS[0]], "row 5: image_id 'd' occurs twice"),
    ],
)
def test_of_several_faults_the_first_is_told(tmp_path, added, message):
    with pytest.raises(InvalidManifest, match=message):
        write(tmp_path, (*ROWS, *added))


def test_ids_of_the_same_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "hash", len, raising=False)
    assert read_dataset(write(tmp_path)).rows == ROWS
    with pytest.raises(InvalidManifest, match="row 5: image_id 'c' occurs twice"):
        write(tmp_path, (*ROWS, Row("d", "x.png", "", "test"), ROWS[2]))


HEADER = b"image_id,path,label,split\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (HEADER + b"d,x.png\n", r"Row #2: Expected 4 columns, got 2"),
        (HEADER + b"d,x.png,,test\nd,x.png,,test,surplus\n", r"Row #3: Expected 4 columns, got 5"),
        (HEADER + b'a,a.png,,test\nb,"b.png,,test\nc,c.png,,test\n', r"Row #3: Expected 4 columns, got 2"),
        (HEADER + b"a,a.png,,test\nb,caf\xe9.png,,test\n", "can't decode byte 0xe9|invalid UTF8"),
        (HEADER + b"a,a\0.png,,test\n", r"path 'a\\x00\.png' leaves the root of the data set"),
        (b'"image_id,path', r"lacks the column\(s\)"),
        (b"\xff\xfe", r"is no table in UTF-8"),
        (b"", r"lacks the column\(s\) image_id, path, label, split"),
        (b"image_id,path,label\nx,x.png,cat\n", r"lacks the column\(s\) split; it needs image_id, path, label, split"),
    ],
)
def test_a_table_that_is_no_csv_is_refused_with_its_row(tmp_path, content, said):
    refuses(tmp_path, "manifest.csv", content, said)


def test_blank_lines_other_columns_and_line_ends_of_other_systems_do_not_count(tmp_path):
    write(tmp_path)
    (tmp_path / "manifest.csv").write_bytes(b"split,camera,path,image_id,label\r\n\r\ntest,5,x.png,x,cat\r\n\r\n")
    assert read_dataset(tmp_path).rows == (Row("x", "x.png", "cat", "test"),)
    (tmp_path / "manifest.csv").write_bytes(b'image_id,path,label,split\n\n"a\nb",x.png,cat,val\n\nc,"')
    with pytest.raises(InvalidManifest, match="Row #3: Expected 4 columns, got 2"):
        read_dataset(tmp_path)


def test_a_million_rows_would_take_less_than_300_megabytes(tmp_path):
    """In Arrow's own memory, a hundredth of them; process memory is measured by `benchmarks`."""
    n = 13_000
    names = [f"train/n{i % 1000:08}/n{i % 1000:08}_{i:05}.JPEG" for i in range(n)]
    write(tmp_path, (Row(name, name, "cat", "train", sha256=f"{i:064x}") for i, name in enumerate(names)))
    before = pyarrow.total_allocated_bytes()
    dataset = read_dataset(tmp_path)
    taken = pyarrow.total_allocated_bytes() - before
    part = dataset.subset("train")
    assert len(dataset) == n and taken / n < 230
    assert pyarrow.total_allocated_bytes() - before == taken and len(part) == n  # a part shares the columns


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", r"is not JSON \(.*\); download the data set again"),
        (b"\xff", r"is not JSON \("),
        (b"[" * 200_000, r"is not JSON \("),
        (b"[]", r"is no object with a name and a root \(texts\) and classes \(a list of names\): \[\]; download"),
        *(
            (content, "is no object with a name and a root")
            for content in (
                b'{"name": "pets", "classes": [], "root": 5}',
                b'{"name": "pets", "classes": [], "root": "a\\u0000"}',
                b'{"name": null, "classes": []}',
                b'{"name": "pets"}',
                b'{"name": "pets", "classes": ["cat", 3]}',
            )
        ),
    ],
)
def test_a_description_that_is_not_what_it_should_be_is_refused(tmp_path, content, said):
    refuses(tmp_path, "dataset.json", content, said)


def refuses(folder, file, content, said):
    """Holds that a data set with this file of other content is refused, in these words after its name."""
    write(folder)
    (folder / file).write_bytes(content)
    with pytest.raises(InvalidManifest, match=rf"{re.escape(file)}.*{said}"):
        read_dataset(folder)


def test_a_depth_column_is_written_only_where_a_row_has_one(tmp_path):
    expected = (
        "image_id,path,label,split,boxes,mask,sha256\n"
        "b,images/b.png,dog,train,,,\n"
        'a,"images/a, with comma.png",,test,"[[0, 1, 2, 3]]",masks/a.png,ff\n'
        "c,images/ü.png,cat,val,,,\n"
    )
    write(tmp_path / "flat")
    assert (tmp_path / "flat/manifest.csv").read_bytes() == expected.encode()
    deep = (*ROWS, Row("d", "x.png", "cat", "val", depth="depth/d.png"))
    assert read_dataset(write(tmp_path / "deep", deep)).rows == deep
    assert (tmp_path / "deep/manifest.csv").read_text().splitlines()[-1] == "d,x.png,cat,val,,,,depth/d.png"


@given(st.text("./a\\:\0", max_size=6))
def test_a_path_escapes_as_the_system_would_read_it(path):
    pure = PurePosixPath(path)
    absolute = pure.is_absolute() or path[1:3] == ":/"
    assert escapes(path) == (not path or "\\" in path or "\0" in path or absolute or ".." in pure.parts)
