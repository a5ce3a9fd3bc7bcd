import os

import numpy as np
import pytest
import torch

from regvit.features.cuda_streams import CudaLane, Lane, lane_of, usable_cores

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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
