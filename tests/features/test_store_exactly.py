"""The store, to the last word: what mutation testing found untested (`make mutation MODULE=store`)."""

import json
import re

import numpy as np
import pytest
import zarr

from regvit.features.store import FeatureStore, InvalidStore
from regvit.features.store_layout import UnstorableFeature
from regvit.features.store_writer import StoreWriter

SHAPES = {"cls": (8,), "registers": (2, 8)}


def values(start, stop):
    return {name: np.full((stop - start, *shape), 0.5, np.float32) for name, shape in SHAPES.items()}


def writer(folder, rows=20, attributes=None, **more):
    return StoreWriter(folder / "x.zarr", folder / "x.partial", rows, SHAPES, attributes or {}, 2, **more)


def made(folder, rows=20):
    with writer(folder, rows) as open_one:
        for unit in open_one.missing_units():
            open_one.write(unit, values(*open_one.unit_rows(unit)))
        open_one.finish()
    return folder / "x.zarr"


@pytest.mark.parametrize(
    ("value", "said"),
    [(70000.0, "array 'registers', row 7: 70000 is beyond float16 (±65504)"),
     (-np.inf, "array 'registers', row 7: -inf is not a finite number")],
)  # fmt: skip
def test_what_float16_cannot_hold_is_said_in_these_words(tmp_path, value, said):
    with writer(tmp_path) as open_one:
        arrays = values(6, 8)
        arrays["registers"][1, 1, 3] = value
        with pytest.raises(UnstorableFeature) as caught:
            open_one.write(3, arrays)
        assert str(caught.value) == said
        assert (caught.value.array, caught.value.row, caught.value.value) == ("registers", 7, value)
        assert 3 in open_one.missing_units()


def test_a_row_of_nan_in_an_array_of_any_shape_is_named(tmp_path):
    path = made(tmp_path)
    zarr.open_group(path, mode="r+")["registers"][5, 1, 2] = np.nan
    for start, stop in ((0, 20), (4, 6), (5, 6)):
        with pytest.raises(InvalidStore, match=r"array 'registers': row 5 is NaN, as if never written; extract again"):
            FeatureStore.open(path).read_rows("registers", start, stop)
    assert FeatureStore.open(path).read_rows("registers", 6, 20).shape == (14, 2, 8)


@pytest.mark.parametrize(("lost", "dots"), [(5, ""), (6, ", …")])
def test_of_missing_chunks_the_first_five_are_named(tmp_path, lost, dots):
    path = made(tmp_path)
    chunks = sorted((path / "cls").glob("c.*"), key=lambda file: int(file.name.split(".")[1]))
    assert len(chunks) == 10
    for chunk in chunks[:lost]:
        chunk.unlink()
    names = ", ".join(str(chunk.relative_to(path)) for chunk in chunks[:5])
    with pytest.raises(InvalidStore, match=re.escape(f"lacks {lost} of 10 chunks of array 'cls' ({names}{dots})")):
        FeatureStore.open(path)


@pytest.mark.parametrize("more", [{"attributes": {"x": float("nan")}}, {"resume_key": {"x": float("inf")}}])
def test_what_json_has_no_word_for_is_refused_before_anything_is_written(tmp_path, more):
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer(tmp_path, **more)
    assert not list(tmp_path.iterdir())


def test_nothing_can_be_written_or_finished_outside_of_the_block(tmp_path):
    closed = writer(tmp_path)
    for use in (lambda: closed.write(0, values(0, 2)), closed.finish):
        with pytest.raises(RuntimeError, match="the writer is not open; use it in a `with` block"):
            use()
    with closed:
        closed.write(0, values(0, 2))
    for use in (lambda: closed.write(1, values(2, 4)), closed.finish):
        with pytest.raises(RuntimeError, match="the writer is not open"):
            use()


def test_a_finished_store_says_of_itself_what_its_arrays_are(tmp_path):
    store = FeatureStore.open(made(tmp_path))
    about = {key: store.attributes[key] for key in ("format", "format_version", "rows", "rows_per_unit", "units")}
    assert about == {"format": "regvit features", "format_version": 1, "rows": 20, "rows_per_unit": 2, "units": 10}
    assert store.attributes["arrays"] == ["cls", "registers"] and store.attributes["complete"] is True
    assert store.arrays == {"cls": (8,), "registers": (2, 8)} and len(store) == 20
    kept = json.loads((tmp_path / "x.zarr/zarr.json").read_text())["attributes"]
    assert kept == store.attributes


def test_a_value_that_became_a_block_starts_anew_and_both_are_said(tmp_path):
    with writer(tmp_path, attributes={"made": None, "long": "a" * 80}) as open_one:
        open_one.write(0, values(0, 2))
    with writer(tmp_path, attributes={"made": {"x": 1}, "long": "b" * 80}) as open_one:
        assert open_one.note == (
            "started anew, as the unfinished store differs: "
            "attributes.long was 'aaaaaaaaaaa…aaa' and is 'bbbbbbbbbbb…bbb'; attributes.made was None and is {'x': 1}"
        )
        assert open_one.missing_units() == list(range(10))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff"])
def test_a_damaged_description_starts_anew_in_these_words(tmp_path, content):
    with writer(tmp_path) as open_one:
        open_one.write(0, values(0, 2))
    (tmp_path / "x.partial/resume.json").write_bytes(content)
    with writer(tmp_path) as open_one:
        assert open_one.note == f"started anew: {tmp_path / 'x.partial/resume.json'} is damaged"


@pytest.mark.parametrize(("length", "shown"), [(58, "'" + "a" * 58 + "'"), (59, "'" + "a" * 11 + "…" + "aaa'")])
def test_a_value_of_more_than_60_signs_is_shortened_in_what_is_said(tmp_path, length, shown):
    with writer(tmp_path, attributes={"x": "a" * length}) as open_one:
        open_one.write(0, values(0, 2))
    with writer(tmp_path, attributes={"x": 0}) as open_one:
        assert open_one.note.endswith(f"attributes.x was {shown} and is 0")
