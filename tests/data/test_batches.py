import threading

import numpy as np
import pytest
import torch
from made_images import MEAN, STD, noise
from PIL import Image

from regvit.data.batches import Batches, load_batches, sample
from regvit.data.decoding import UnreadableImage
from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.prefetch import in_order
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


def test_a_sample_holds_images_of_its_split_only_and_each_once(dataset):
    drawn = [row.image_id for row in sample(dataset, "train", 5, seed=0).rows]
    assert len(set(drawn)) == 5
    assert set(drawn) <= {str(i) for i in range(7)}
    assert drawn == [row.image_id for row in sample(dataset, "train", 5, seed=0).rows]
    assert drawn != [row.image_id for row in sample(dataset, "train", 5, seed=1).rows]
    assert len(sample(dataset, "test", 100, seed=0)) == 3
    with pytest.raises(ValueError, match="data set grey has no val images"):
        sample(dataset, "val", 5, seed=0)


def test_some_images_can_be_selected_by_their_rows(dataset):
    batches = Batches(dataset, TRANSFORM, batch_size=2).select([0, 3, 9])
    for _ in range(2):  # the same each time
        assert [(batch[:, 0, 0, 0] * 255).round().int().tolist() for batch in batches] == [[0, 30], [90]]


@pytest.fixture
def noise_set(tmp_path):
    for i in range(7):
        noise(12, 10, seed=i).save(tmp_path / f"{i}.png")
    write_dataset(tmp_path, "noise", [Row(str(i), f"{i}.png", "", "test") for i in (3, 1, 6, 0, 5, 2, 4)], (), {})
    return read_dataset(tmp_path)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_come_in_row_order_with_any_number_of_workers(noise_set, workers):
    transform = Transform(8, MEAN, STD)
    batches = list(load_batches(noise_set, transform, 3, workers))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    expected = torch.stack([transform.load(noise_set.image_path(i)) for i in range(7)])
    assert torch.equal(torch.cat(batches), expected)


def test_an_unreadable_image_stops_the_batches_also_in_a_worker(noise_set):
    noise_set.image_path(4).write_text("broken")
    for workers in (0, 2):
        with pytest.raises(UnreadableImage, match=r"5\.png cannot be read"):
            list(load_batches(noise_set, Transform(8, MEAN, STD), 2, workers))


def test_a_batch_size_of_zero_is_refused_before_anything_is_read(noise_set):
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        load_batches(noise_set, Transform(8, MEAN, STD), 0)


def test_workers_run_no_further_ahead_than_allowed_and_stop_with_the_caller():
    begun, lock = [], threading.Lock()

    def count(i: int) -> int:
        with lock:
            begun.append(i)
        return i

    results = in_order(count, range(1000), workers=3, ahead=5)
    assert [next(results) for _ in range(10)] == list(range(10))
    results.close()
    assert len(begun) <= 10 + 5 + 1
