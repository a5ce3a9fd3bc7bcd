import pytest
from hypothesis import given
from hypothesis import strategies as st

from regvit.data.manifest import Row
from regvit.data.splits import assign_splits, limit_splits, split_of, stratified_splits


def test_each_class_is_split_in_the_shares_asked_for():
    labels = {f"a{i}": "a" for i in range(20)} | {f"b{i}": "b" for i in range(40)}
    splits = stratified_splits(labels, 0, (0.5, 0.15, 0.35))
    counts = {(label, split): 0 for label in "ab" for split in ("train", "val", "test")}
    for key, split in splits.items():
        counts[labels[key], split] += 1
    assert list(counts.values()) == [10, 3, 7, 20, 6, 14]


@given(st.permutations([f"k{i}" for i in range(12)]), st.integers(0, 5))
def test_splits_do_not_depend_on_the_order_of_the_keys(keys, seed):
    expected = stratified_splits({f"k{i}": "x" for i in range(12)}, seed, (0.5, 0.25, 0.25))
    assert stratified_splits(dict.fromkeys(keys, "x"), seed, (0.5, 0.25, 0.25)) == expected


def test_splits_depend_on_the_seed_and_not_on_other_classes():
    labels = {f"k{i}": "x" for i in range(50)}
    first = stratified_splits(labels, 0, (0.5, 0.25, 0.25))
    assert stratified_splits(labels, 1, (0.5, 0.25, 0.25)) != first
    more = stratified_splits(labels | {"other": "y"}, 0, (0.5, 0.25, 0.25))
    assert {key: more[key] for key in labels} == first


def test_splits_are_known_by_their_usual_names():
    meant = {"train": "Train TRAIN Training seg_train training_set trainset train2017 Train_Images",
             "val": "val valid Validation eval dev val2017", "test": "test Testing seg_test testset holdout",
             "": "cat trainer train_val pets_train set images"}  # fmt: skip
    for split, names in meant.items():
        assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)
    assert split_of("Test Images") == "test"


def test_shares_must_sum_to_one():
    with pytest.raises(ValueError, match=r"shares \(0\.5, 0\.5, 0\.5\)"):
        stratified_splits({}, 0, (0.5, 0.5, 0.5))


def test_val_stays_val_where_nothing_is_trained_on():
    rows = [Row("a", "a", "x", "val")]
    assert assign_splits(rows, 0, "ood") == rows


def test_a_limit_takes_evenly_from_the_classes_and_keeps_the_order():
    rows = [Row(f"{label}{i}", "", label, "train") for i in range(9) for label in "aabc"[: 4 if i < 2 else 2]]
    rows = [*{row.image_id: row for row in rows}.values(), *(Row(f"t{i}", "", "a", "test") for i in range(3))]
    kept = limit_splits(rows, {"train": 7}, 0)
    labels = [row.label for row in kept if row.split == "train"]
    assert {label: labels.count(label) for label in "abc"} == {"a": 3, "b": 2, "c": 2}
    assert len(kept) == 10 and kept == [row for row in rows if row in kept]
    assert limit_splits(rows, {"train": 7}, 1) != kept == limit_splits(rows[::-1], {"train": 7}, 0)[::-1]
    assert limit_splits(rows, {"train": 99, "val": 5}, 0) == rows
