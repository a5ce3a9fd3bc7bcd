import io
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from extracting import Compiled, backbone_of, noise, run, tokens_of, tree, with_registers

from regvit.data.progress import progress
from regvit.features import extractor
from regvit.features.cuda_streams import Download, Lane, Upload
from regvit.features.extractor import CannotCompile, Extractor


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("data"))


class SlowLane(Lane):
    """To a device that works beside the host, as a GPU does: each of its three queues is a thread that comes late.

    What is written too early, read too early or waited for too little shows in the features.
    """

    ahead = 2

    def __init__(self, device):
        super().__init__(device)
        self.up, self.work, self.down = (ThreadPoolExecutor(1) for _ in range(3))
        self.in_flight = self.most_in_flight = 0

    def upload(self, batch):
        images = torch.zeros_like(batch)

        def copy():
            time.sleep(0.01)
            images.copy_(batch)

        return Upload(images, Awaited(self.up.submit(copy)))

    def compute(self, step, upload):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

        def run():
            upload.done.synchronize()
            time.sleep(0.02)
            step(upload.images)
            self.in_flight -= 1

        self.last = Awaited(self.work.submit(run))
        return self.last

    def download(self, tensors):
        computed, found = self.last, {name: torch.zeros_like(values) for name, values in tensors.items()}

        def copy():
            computed.synchronize()
            time.sleep(0.02)
            for name, values in tensors.items():
                found[name].copy_(values)

        return Download(found, Awaited(self.down.submit(copy)))


class Awaited:
    def __init__(self, future):
        self.future = future

    def synchronize(self):
        self.future.result()


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_device_that_works_beside_the_host_gives_the_same_bytes(tmp_path, dataset, monkeypatch, workers, batch_size):
    backbone = with_registers(backbone_of(), 1)
    run(tmp_path / "plain", backbone, dataset, batch_size=batch_size)
    lanes = []
    monkeypatch.setattr(extractor, "lane_of", lambda device: lanes.append(SlowLane(device)) or lanes[-1])
    bar = progress(11, "extract", stream=io.StringIO())
    run(tmp_path / "slow", backbone, dataset, batch_size=batch_size, workers=workers, progress=bar)
    assert tree(tmp_path / "plain/noise.zarr") == tree(tmp_path / "slow/noise.zarr")
    assert bar.done == 11
    assert lanes[0].most_in_flight == 1 + SlowLane.ahead  # it is kept busy, and no more than that waits


def test_a_unit_is_the_same_alone_in_any_order_and_at_another_worker(dataset):
    backbone = with_registers(backbone_of(), 1)
    make = partial(Extractor, backbone, dataset, batch_size=3, rows_per_unit=4)
    extractor = make(device="cpu")
    assert extractor.batch_size == 2 and extractor.shapes == {"cls": (64,), "registers": (1, 64), "patch_mean": (64,)}
    whole = {unit.start: unit for unit in extractor.units([(0, 4), (4, 8), (8, 11)])}
    assert [(unit.start, unit.stop) for unit in whole.values()] == [(0, 4), (4, 8), (8, 11)]
    other = pickle.loads(pickle.dumps(make))(device="cpu", workers=2)
    backwards = list(other.units([(8, 11), (0, 4)]))
    assert [unit.start for unit in backwards] == [8, 0]
    for unit in backwards:
        for name, values in unit.arrays.items():
            np.testing.assert_array_equal(values, whole[unit.start].arrays[name])
            np.testing.assert_array_equal(extractor.unit(unit.start, unit.stop)[name], values)
    np.testing.assert_allclose(whole[8].arrays["cls"][1], tokens_of(backbone, 9)[0, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_units_of_a_single_row_are_as_good_as_any(dataset, workers):
    extractor = Extractor(backbone_of(), dataset, batch_size=4, workers=workers, rows_per_unit=4)
    whole = np.concatenate([unit.arrays["cls"] for unit in extractor.units([(0, 4), (4, 8), (8, 11)])])
    single = np.concatenate([unit.arrays["cls"] for unit in extractor.units([(row, row + 1) for row in range(11)])])
    np.testing.assert_allclose(single, whole, atol=1e-5)  # in another batch


def test_rows_that_the_data_set_does_not_have_are_refused(dataset):
    with pytest.raises(IndexError, match="rows 8 to 12 are out of range: noise has rows 0 to 11"):
        Extractor(backbone_of(), dataset).unit(8, 12)


def test_two_threads_may_use_one_extractor(dataset):
    extractor = Extractor(with_registers(backbone_of(), 1), dataset, batch_size=2, rows_per_unit=4, workers=2)
    spans = [(0, 4), (4, 8), (8, 11)] * 4
    wanted = {start: extractor.unit(start, stop) for start, stop in spans}
    before = torch.get_float32_matmul_precision()
    with ThreadPoolExecutor(2) as pool:
        for (start, _), found in zip(spans, pool.map(lambda span: extractor.unit(*span), spans), strict=True):
            for name, values in found.items():
                np.testing.assert_array_equal(values, wanted[start][name])
    assert torch.get_float32_matmul_precision() == before


def test_a_batch_that_does_not_fit_says_what_to_do(tmp_path, dataset, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backbone = backbone_of()
    small = Extractor(backbone, dataset, batch_size=4, rows_per_unit=4)
    monkeypatch.setattr(extractor, "features_of", full)
    with pytest.raises(
        torch.OutOfMemoryError, match="cpu has no room for 4 images of test_vit at once; give a smaller batch_size"
    ):
        small.unit(0, 4)


def test_only_whole_batches_are_compiled(tmp_path, dataset, monkeypatch):
    backbone, stand_in = with_registers(backbone_of(), 1), Compiled()
    run(tmp_path / "plain", backbone, dataset)
    monkeypatch.setattr(torch, "compile", stand_in)
    run(tmp_path / "compiled", backbone, dataset, compile=True)
    assert stand_in.seen == [4, 4]  # the last batch has three images
    assert tree(tmp_path / "plain/noise.zarr") == tree(tmp_path / "compiled/noise.zarr")


def test_where_torch_cannot_compile_the_message_says_what_to_do(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiled(fails=True))
    with pytest.raises(
        CannotCompile, match=r"(?s)torch.compile fails on VisionTransformer here \(.*\); extract without it"
    ):
        run(tmp_path, backbone_of(), dataset, compile=True)
