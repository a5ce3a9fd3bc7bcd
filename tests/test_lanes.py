import os

import numpy as np
import pytest
import torch

from regvit.lanes import CudaLane, Lane, best_batch_size, lane_of, seconds_of, usable_cores

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def throughput(rates: dict[int, float], tried: list[int]):
    """Seconds for a batch, from images a second by batch size; sizes that are not given do not fit."""

    def seconds(size: int) -> float:
        tried.append(size)
        if size not in rates:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size / rates[size]

    return seconds


def test_the_batch_grows_until_twice_as_many_images_gain_nothing_more():
    tried = []
    rates = {8: 100, 16: 180, 32: 300, 64: 400, 128: 404, 256: 500}  # 128 gains 1 %: 256 is not tried
    assert best_batch_size(throughput(rates, tried), 1024) == 64
    assert tried == [8, 16, 32, 64, 128]


def test_the_batch_grows_no_further_than_memory():
    tried = []
    assert best_batch_size(throughput({8: 100, 16: 180, 32: 300}, tried), 1024) == 32
    assert tried == [8, 16, 32, 64]


def test_the_batch_is_no_larger_than_allowed():
    tried = []
    rates = {size: float(size) for size in (4, 8, 16, 32)}
    assert best_batch_size(throughput(rates, tried), 20) == 16
    assert best_batch_size(throughput(rates, tried), 4) == 4


def test_the_smaller_of_two_batches_that_are_as_fast_is_taken():
    assert best_batch_size(throughput({8: 100, 16: 99}, []), 1024) == 8
    assert best_batch_size(throughput({8: 100, 16: 102}, []), 1024) == 8


def test_a_model_that_does_not_even_fit_with_the_smallest_batch_says_so():
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        best_batch_size(throughput({}, []), 1024)


def test_what_a_cpu_is_told_is_done_at_once_and_nothing_is_copied():
    lane, seen = lane_of(CPU), []
    assert type(lane) is Lane and lane.ahead == 0
    buffer = lane.buffer((2, 3, 4, 4))
    assert buffer.shape == (2, 3, 4, 4) and buffer.dtype == torch.uint8
    upload = lane.upload(buffer)
    assert upload.images.data_ptr() == buffer.data_ptr()
    upload.done.synchronize()
    lane.compute(seen.append, upload).synchronize()
    assert seen == [upload.images]
    values = torch.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(lane.download({"cls": values}).arrays()["cls"], values.numpy())


def test_only_cores_that_the_process_may_use_are_counted():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)


@needs_gpu
def test_a_gpu_gets_pinned_batches_and_gives_results_back():
    lane = lane_of(torch.device("cuda"))
    assert type(lane) is CudaLane and lane.ahead > 0
    buffer, results = lane.buffer((2, 3, 4, 4)), []
    assert buffer.is_pinned()
    buffer.copy_(torch.arange(96, dtype=torch.uint8).reshape(2, 3, 4, 4))
    upload = lane.upload(buffer)
    lane.compute(lambda images: results.append(images.float() + 0.5), upload).synchronize()
    upload.done.synchronize()
    arrays = lane.download({"images": results[0]}).arrays()
    np.testing.assert_array_equal(arrays["images"], buffer.numpy().astype(np.float32) + 0.5)


@needs_gpu
def test_seconds_of_a_gpu_are_those_of_its_work():
    device = torch.device("cuda")
    square = torch.rand(4096, 4096, device=device)
    assert seconds_of(lambda: [square @ square for _ in range(8)], device) > 2 * seconds_of(
        lambda: square @ square, device
    )
