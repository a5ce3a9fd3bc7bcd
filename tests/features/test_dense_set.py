import numpy as np
import pytest
import torch
from dense_example import dense_set

from regvit.data.manifest import Row, read_dataset
from regvit.features.dense_set import DenseSet, drawn_images
from regvit.features.store import InvalidStore

SPLITS = ["train", "val", "test"]


def made(folder, n=11, **changes):
    rows = [
        Row(f"{i}", f"{i}.png", f"c{i % 2}", SPLITS[i % 3], boxes="[[0, 0, 4, 4]]" if i % 2 else "") for i in range(n)
    ]
    arrays = {"cls": np.arange(n)[:, None].astype(float), "norms": np.ones((n, 2, 16))}
    return dense_set(folder, arrays, rows, **changes)


def test_rows_of_splits_ascend_and_may_be_asked_to_have_a_column(tmp_path):
    dense = made(tmp_path / "set")
    assert dense.rows("test") == [2, 5, 8] and dense.rows("train", "val") == [0, 1, 3, 4, 6, 7, 9, 10]
    assert dense.rows("train", "val", having="boxes") == [1, 3, 7, 9]
    assert dense.image_ids([2, 5]) == ["2", "5"]
    with pytest.raises(ValueError, match="data set set has no test images with a mask"):
        dense.rows("test", having="mask")


def test_arrays_come_a_unit_at_a_time_with_the_rows_asked_for(tmp_path):
    dense = made(tmp_path / "set")
    parts = list(dense.batches([1, 3, 4, 10], "cls", "norms"))
    assert [rows for rows, _ in parts] == [[1, 3], [4], [10]]
    assert [arrays["cls"].flatten().tolist() for _, arrays in parts] == [[1, 3], [4], [10]]
    assert parts[0][1]["norms"].dtype == torch.float32
    assert dense.read("cls", [3, 9]).tolist() == [[3], [9]]
    assert not dense.outliers([0, 1]).any()
    with pytest.raises(KeyError, match=r"has no attention; add its group to extract_dense.datasets.set.arrays"):
        dense.read("attention", [0])


def test_layout_detection_and_transform_are_those_of_the_forward(tmp_path):
    dense = made(tmp_path / "set", detection={"layer": 1, "threshold": 9.0})
    assert dense.layout.prefix == 2 and dense.side == 4 and dense.transform.size == 16
    assert (dense.detection.layer, dense.detection.threshold) == (1, 9.0)
    assert made(tmp_path / "other").detection is None
    images, pictures = dense.images([0, 2]), dense.pictures([0, 2])
    assert images.shape == (2, 3, 16, 16) and pictures.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1) * 0.5 + 0.5, pictures, atol=1e-6)


def test_images_of_each_split_are_drawn_by_the_seed_in_the_order_of_the_manifest(tmp_path):
    made(tmp_path / "set", 30)
    dataset = read_dataset(tmp_path / "set")
    drawn = drawn_images(dataset, 3, seed=1)
    ids = [int(i) for i in drawn.rows.column("image_id")]
    assert ids == sorted(ids) and [sum(i % 3 == k for i in ids) for k in range(3)] == [3, 3, 3]
    assert ids != [int(i) for i in drawn_images(dataset, 3, seed=2).rows.column("image_id")]
    assert drawn_images(dataset, None, seed=1) is dataset and drawn.digest == dataset.digest


def test_a_store_of_other_images_is_refused(tmp_path):
    made(tmp_path / "set")
    made(tmp_path / "other", 12)
    with pytest.raises(InvalidStore):
        DenseSet.open(tmp_path / "other", tmp_path / "set/made.zarr")
