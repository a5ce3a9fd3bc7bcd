import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regvit.data.rows import COLUMNS, Row, RowList, Rows

GIVEN = (
    Row("a", "a", "cat", "train", sha256="0123456789abcdef" * 4),
    Row("b", "images/ü.png", "", "test", "[[0, 1, 2, 3]]", "masks/b.png", "ff"),
    Row("c", "", "cat", "val", depth="d.png"),
    Row("", "", "dog", "test"),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(["", "NA", "null", "\0"])
ROWS = st.lists(st.builds(Row, *[TEXTS] * len(COLUMNS)), max_size=6).map(tuple)


@settings(deadline=None)
@given(ROWS, st.slices(6), st.slices(6))
def test_rows_and_their_parts_are_those_of_the_tuple(rows, which, then):
    held = Rows(rows)
    assert tuple(held) == rows and held == rows and rows == held
    assert [held[i] for i in range(-len(rows), len(rows))] == [*rows, *rows]
    for beyond in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            held[beyond]
    part = held[which]
    assert part == rows[which] and part[then] == rows[which][then]
    for name in COLUMNS:
        assert list(part.column(name)) == [getattr(row, name) for row in rows[which]]


def test_a_part_is_the_same_in_another_process_and_brings_no_other_rows():
    part = Rows(Row(str(i), str(i), "cat", "train") for i in range(10_000))[::100]
    sent = pickle.dumps(part)
    assert pickle.loads(sent) == part and len(sent) < 20_000


def test_chosen_rows_stand_in_the_order_of_the_choice():
    assert Rows(GIVEN).select([3, 0, 3]) == (GIVEN[3], GIVEN[0], GIVEN[3])
    assert Rows(GIVEN)[1:].select(np.array([2, 0])).select([1]) == (GIVEN[1],)
    assert Rows(GIVEN).select([]) == ()
    with pytest.raises(IndexError):
        Rows(GIVEN).select([4])


def test_a_list_of_rows_grows_and_what_was_taken_of_it_before_does_not(monkeypatch):
    monkeypatch.setattr("regvit.data.rows.PART", 2)
    rows = RowList()
    for row in GIVEN[:3]:
        rows.append(row)
    before = rows.rows()
    rows.append(GIVEN[3])
    assert (len(rows), rows.rows(), before) == (4, GIVEN, GIVEN[:3])
    assert list(rows.rows().column("label")) == ["cat", "", "cat", "dog"]
