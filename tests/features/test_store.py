import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from extracting import tree
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stores import ARRAYS, MADE_BY, features, fill, interrupted, make, writer_of

from regvit.features.store import ArraySpec, FeatureStore, InvalidStore, Layout, default_rows_per_unit
from regvit.features.store_writer import StoreWriter, write_store

# Reading back


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), per_unit=st.integers(1, 45))
def test_what_was_written_is_read_back_for_any_number_of_rows_and_size_of_unit(rows, per_unit):
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore.open(make(Path(folder), rows, per_unit))
        assert len(store) == rows
        for name, written in features(rows).items():
            read = store.read(name)
            assert read.dtype == (np.bool_ if name == "far" else np.float32)
            half = written if name == "far" else written.astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(read, half)


@settings(deadline=None)
@given(rows=st.integers(1, 10_000), per_unit=st.integers(1, 12_000))
def test_units_part_the_rows_without_gap_or_overlap(rows, per_unit):
    layout = Layout(rows, per_unit, ARRAYS)
    ends = [layout.unit_rows(unit) for unit in range(layout.units)]
    assert ends[0][0] == 0 and ends[-1][1] == rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))
    assert all(0 < stop - start <= per_unit for start, stop in ends)


@pytest.mark.parametrize(
    ("rows", "shape", "expected"),
    [(1, (384,), 256), (16_384, (384,), 256), (16_385, (384,), 512), (200_000, (1024,), 4096), (1_281_167, (384,), 4096),
     (40, (64, 384), 256), (40, (256, 384), 64), (10**6, (1369, 1024), 8)],
)  # fmt: skip
def test_units_are_small_for_small_sets_few_for_large_ones_and_bounded_in_bytes(rows, shape, expected):
    assert default_rows_per_unit(rows, {"cls": ArraySpec((2,)), "large": ArraySpec(shape)}) == expected


def test_some_rows_are_read_as_they_are_stored(tmp_path):
    store = FeatureStore.open(make(tmp_path))
    rows = store.read_rows("registers", 3, 9)  # of three units
    assert rows.dtype == np.float16 and rows.shape == (6, 2, 8)
    np.testing.assert_array_equal(rows, features(10)["registers"][3:9].astype(np.float16))
    assert store.read_rows("cls", 4, 4).shape == (0, 8)
    with pytest.raises(IndexError, match=r"rows 8 to 11 are out of range: .* has rows 0 to 10"):
        store.read_rows("cls", 8, 11)
    with pytest.raises(KeyError, match="has no array 'patches'; it has cls, far, registers"):
        store.read("patches")


def test_a_store_opens_with_its_attributes_and_shapes_and_plain_zarr_reads_it(tmp_path):
    store = FeatureStore.open(make(tmp_path))
    assert store.arrays == {"cls": (8,), "far": (3,), "registers": (2, 8)}
    assert store.attributes == MADE_BY | {
        "format": "regvit features",
        "format_version": 2,
        "rows": 10,
        "rows_per_unit": 4,
        "units": 3,
        "arrays": ["cls", "far", "registers"],
        "complete": True,
    }
    array = zarr.open_group(store.path, mode="r")["registers"]
    assert array.metadata.dimension_names == ("image", "register", "channel")
    assert array.dtype == np.float16 and array.chunks == (4, 2, 8)
    np.testing.assert_array_equal(array[:], features(10)["registers"].astype(np.float16))


def test_whole_numbers_and_float32_are_stored_as_they_are(tmp_path):
    arrays = {"n": ArraySpec((), "int64"), "exact": ArraySpec((2,), "float32")}
    values = {"n": np.array([0, 2**40]), "exact": np.array([[1 / 3, 1e30], [0, -1]], np.float32)}
    with StoreWriter(tmp_path / "a.zarr", tmp_path / "a.partial", 2, arrays, {}) as writer:
        writer.write(0, values)
        writer.finish()
    store = FeatureStore.open(tmp_path / "a.zarr")
    assert all(store.read(name).tobytes() == values[name].tobytes() for name in values)


def test_the_bytes_do_not_depend_on_the_order_of_attributes_or_arrays_or_units(tmp_path):
    with writer_of(tmp_path / "b", 10, 4, dict(reversed(MADE_BY.items())), dict(reversed(ARRAYS.items()))) as writer:
        fill(writer, [2, 0, 1])
        writer.finish()
    write_store(tmp_path / "c.zarr", features(10), MADE_BY, 4)
    assert tree(make(tmp_path / "a")) == tree(tmp_path / "b/made.zarr") == tree(tmp_path / "c.zarr")


# What is refused when opening


def change_attributes(final, **values):
    file = final / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"].update(values)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "cls/c.1.0").unlink(), r"lacks 1 of 3 chunks of array 'cls' \(c.1.0\); `dvc pull` all of it"),
        (lambda f: os.truncate(f / "registers/c.0.0.0", 100), r"c.0.0.0 has 100 bytes, expected 132"),
        (lambda f: shutil.rmtree(f / "registers"), r"has the arrays cls, far, expected cls, far, registers"),
        (lambda f: (f / "zarr.json").write_text("{"), r"is not a zarr v3 group"),
        (lambda f: change_attributes(f, complete=False), r"is unfinished: `complete` is not set"),
        (lambda f: change_attributes(f, format="x"), r"has format 'x', expected 'regvit features'"),
        (lambda f: change_attributes(f, format_version=1), r"has format version 1 and this code reads 2"),
        (lambda f: change_attributes(f, rows=9), r"has shape \(10, 8\) .*, expected \(9, 8\)"),
    ],
)
def test_a_damaged_store_does_not_open(tmp_path, damage, message):
    final = make(tmp_path)
    damage(final)
    with pytest.raises(InvalidStore, match=message):
        FeatureStore.open(final)


def test_an_unfinished_store_does_not_open_wherever_it_lies(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(InvalidStore, match=r"is unfinished"):
        FeatureStore.open(tmp_path / "made.partial/store")
    with pytest.raises(InvalidStore, match=r"is not a zarr v3 group"):
        FeatureStore.open(tmp_path / "made.partial")
    with pytest.raises(FileNotFoundError, match=r"made.zarr does not exist; run the extract stage"):
        FeatureStore.open(tmp_path / "made.zarr")


def test_zeroed_bytes_inside_a_chunk_and_rows_of_nan_are_noticed_when_read(tmp_path):
    final = make(tmp_path)
    chunk = final / "cls/c.1.0"
    content = bytearray(chunk.read_bytes())
    content[16:32] = bytes(16)
    chunk.write_bytes(content)
    zarr.open_group(final, mode="r+")["registers"][5, 1, 2] = np.nan
    store = FeatureStore.open(final)
    with pytest.raises(InvalidStore, match=r"array 'cls': .*checksum.* a chunk is damaged"):
        store.read("cls")
    for start, stop in ((0, 10), (4, 6), (5, 6)):
        with pytest.raises(InvalidStore, match=r"array 'registers': row 5 is NaN, as if never written; extract again"):
            store.read_rows("registers", start, stop)
    assert store.read_rows("registers", 6, 10).shape == (4, 2, 8)


def test_a_store_of_another_manifest_is_refused(tmp_path):
    final = make(tmp_path, manifest_sha256="m1")
    FeatureStore.open(final, "m1")
    with pytest.raises(InvalidStore, match=r"from a manifest with SHA-256 m1, and the data set at hand has m2"):
        FeatureStore.open(final, "m2")
