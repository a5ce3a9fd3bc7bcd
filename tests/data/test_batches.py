import numpy as np
import pytest
import torch
from PIL import Image

from regvit.data.batches import Batches, sample
from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.transform import Transform


@pytest.fixture
def dataset(tmp_path):
    """Ten grey images whose level is their row; seven train, three test."""
    rows = []
    for i in range(10):
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(Row(str(i), f"{i}.png", "a", "train" if i < 7 else "test"))
    write_dataset(tmp_path, "grey", rows, ["a"], {})
    return read_dataset(tmp_path)


TRANSFORM = Transform(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_batches_come_in_row_order_each_time(dataset):
    batches = Batches(dataset, TRANSFORM, batch_size=4)
    for _ in range(2):
        levels = torch.cat([batch[:, 0, 0, 0] for batch in batches]) * 255
        assert levels.round().int().tolist() == [10 * i for i in range(10)]


def test_a_sample_holds_images_of_its_split_only_and_each_once(dataset):
    drawn = [row.image_id for row in sample(dataset, "train", 5, seed=0).rows]
    assert len(set(drawn)) == 5
    assert set(drawn) <= {str(i) for i in range(7)}
    assert drawn == [row.image_id for row in sample(dataset, "train", 5, seed=0).rows]
    assert drawn != [row.image_id for row in sample(dataset, "train", 5, seed=1).rows]


def test_a_sample_is_no_larger_than_its_split(dataset):
    assert len(sample(dataset, "test", 100, seed=0)) == 3


def test_a_split_without_images_is_named(dataset):
    with pytest.raises(ValueError, match="data set grey has no val images"):
        sample(dataset, "val", 5, seed=0)


def test_some_images_can_be_selected_by_their_rows(dataset):
    batches = Batches(dataset, TRANSFORM, batch_size=2).select([0, 3, 9])
    levels = [(batch[:, 0, 0, 0] * 255).round().int().tolist() for batch in batches]
    assert levels == [[0, 30], [90]]
