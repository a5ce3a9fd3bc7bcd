import dataclasses
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regvit.data.rows import COLUMNS, Row, RowList, Rows

DIGEST = "0123456789abcdef" * 4
GIVEN = (
    Row("a", "a", "cat", "train", sha256=DIGEST),
    Row("b", "images/ü.png", "", "test", "[[0, 1, 2, 3]]", "masks/b.png", "ff"),
    Row("c", "", "cat", "val", depth="d.png"),
    Row("", "", "dog", "test"),
    Row("\udcfe", "\udcff", "", "train", sha256=DIGEST.upper()),
)
TEXTS = st.text(max_size=4) | st.sampled_from(["", DIGEST, DIGEST.upper(), "\ud800", "\udcff", "\0"])
ROWS = st.lists(st.builds(Row, *[TEXTS] * len(COLUMNS)), max_size=6).map(tuple)


@given(ROWS)
def test_rows_come_back_as_they_were_given(rows):
    held = Rows(rows)
    assert tuple(held) == rows and held == rows and rows == held
    assert [held[i] for i in range(len(rows))] == list(rows)
    for name in COLUMNS:
        assert list(held.column(name)) == [getattr(row, name) for row in rows]


@given(ROWS, st.slices(6), st.slices(6))
def test_parts_are_those_of_the_tuple(rows, which, then):
    part = Rows(rows)[which]
    assert part == rows[which] and part[then] == rows[which][then]
    assert list(part.column("path")[then]) == [row.path for row in rows[which][then]]
    codes, texts = part.codes("label")
    assert [texts[code] for code in codes] == [row.label for row in rows[which]]


@given(ROWS, st.slices(6))
def test_a_part_is_the_same_in_another_process_and_brings_no_other_rows(rows, which):
    part = Rows(rows)[which]
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        back = pickle.loads(pickle.dumps(part, protocol))
        assert type(back) is Rows and back == part and len(back._columns) == len(part)


def test_numbers_count_from_the_end_as_those_of_a_tuple_do_and_stop_where_they_do():
    rows = Rows(GIVEN)
    assert rows[-1] == GIVEN[-1] and rows[np.int64(1)] == GIVEN[1] and rows[1:][0] == GIVEN[1]
    assert rows.column("split")[-2] == "test"
    for number in (5, -6):
        with pytest.raises(IndexError):
            rows[number]
        with pytest.raises(IndexError):
            rows.select([number])


def test_chosen_rows_stand_in_the_order_of_the_choice():
    assert Rows(GIVEN).select([3, 0, 3]) == (GIVEN[3], GIVEN[0], GIVEN[3])
    assert Rows(GIVEN)[1:].select(np.array([2, 0])).select([1]) == (GIVEN[1],)
    assert Rows(GIVEN).select([]) == ()


def test_rows_differ_from_others_in_number_value_or_kind():
    assert Rows(GIVEN) != GIVEN[:-1]
    assert Rows(GIVEN) != (*GIVEN[:-1], dataclasses.replace(GIVEN[-1], mask="m"))
    assert Rows(GIVEN) != list(GIVEN)


def test_a_list_of_rows_grows_and_what_was_taken_of_it_before_does_not():
    rows = RowList(GIVEN[:2])
    before = Rows.of(rows)
    rows.append(GIVEN[2])
    assert rows == GIVEN[:3] and before == GIVEN[:2]
    assert before.codes("split")[0].tolist() == [0, 1]
    assert not hasattr(before, "append")


def test_only_columns_of_few_texts_have_codes_and_unknown_columns_are_refused():
    with pytest.raises(ValueError, match="column 'path' is not held as numbers; expected one of label, split"):
        Rows(GIVEN).codes("path")
    with pytest.raises(KeyError, match="colour"):
        Rows(GIVEN).column("colour")


def test_a_row_takes_little_more_than_its_names_and_a_part_of_them_eight_bytes():
    n, names = 20_000, [f"train/n{i % 1000:08}/n{i % 1000:08}_{i:05}.JPEG" for i in range(20_000)]

    def made():
        return RowList(Row(name, name, name[6:15], "train", sha256=f"{i:064x}") for i, name in enumerate(names))

    tracemalloc.start()
    rows = made()
    taken = tracemalloc.get_traced_memory()[0]
    part = rows.select(np.arange(0, n, 2))
    of_part = tracemalloc.get_traced_memory()[0] - taken
    tracemalloc.stop()
    text = len(names[0]) + 8  # the name, and where it ends
    assert taken / n < 1.25 * (text + 41 + 8)  # with the digest and where it ends, two numbers, and room to grow
    assert of_part < 9 * len(part)
    assert len(pickle.dumps(part)) < len(pickle.dumps(rows)) * 0.55
