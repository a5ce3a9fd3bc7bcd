import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from object_server import ObjectServer
from PIL import Image

from regvit.data.decoding import Transform, UnreadableImage
from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.features import engine as engine_module
from regvit.features.engine import EngineError, RayEngine, _Crew, _Setting, _Worker
from regvit.features.extraction import describe, extract
from regvit.features.store import FeatureStore
from regvit.features.store_writer import StoreWriter
from regvit.models.backbones import Backbone
from regvit.models.nan_check import BadFeatures
from regvit.registers.test_time import add_test_time_registers

ray = pytest.importorskip("ray", reason="the engine needs the extra `cluster`")
from ray.cluster_utils import Cluster  # noqa: E402

SIZE, IMAGES, ROWS_PER_UNIT = 32, 48, 4
UNITS = IMAGES // ROWS_PER_UNIT
STUCK = 300.0  # seconds, more than a node takes to start on a busy machine
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    """A head that computes nothing; tests add the nodes that they want. Workers can import this module."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_USAGE_STATS_ENABLED")}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), before["PYTHONPATH"])))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    yield cluster
    cluster.shutdown()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def node(cluster):
    """One node of one CPU."""
    node = cluster.add_node(**NODE)
    yield node
    if node in cluster.list_all_nodes():
        cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # workers take as many CPUs as the driver has threads
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, img_size=SIZE, num_classes=0).eval().requires_grad_(False)
    add_test_time_registers(model, {3: [1, 2]}, num_registers=1)
    transform = Transform(SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Backbone("tiny", model, transform, weights_sha256="w" * 64, planted=None, info={"architecture": "test_vit"})


def make_dataset(folder):
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
        rows.append(Row(f"image {i}", f"images/{i}.png", "noise", "train"))
    write_dataset(folder, "noise", rows, ["noise"], {"source": "made for this test"})
    return read_dataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "noise")


def run(folder, backbone, dataset, engine=None, **more):
    attributes = describe(backbone, dataset, "float32") | {"run": "cured"}
    final, work = folder / "noise.zarr", folder / "noise.partial"
    more = {"batch_size": 2, "rows_per_unit": ROWS_PER_UNIT} | more
    extract(backbone, dataset, final, work, attributes, engine=engine, **more)
    return FeatureStore.open(final, dataset.digest)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory, backbone, dataset):
    """The digest of the store that this process makes by itself."""
    return run(tmp_path_factory.mktemp("in_process"), backbone, dataset).digest()


class Watched:
    """An extractor that writes down which process computed which rows, and dies of some units, once or always.

    The first process of all comes to no end with units from the row `first_stops_at` on: it must be taken away.
    """

    def __init__(self, make, log, dies_once=None, dies_always=None, seconds=0.0, first_stops_at=IMAGES, **where):
        self.extractor, self.log, self.seconds, self.first_stops_at = make(**where), log, seconds, first_stops_at
        self.dies_once, self.dies_always = dies_once, dies_always

    def unit(self, start, stop):
        before = [int(line.split()[1]) for line in read_log(self.log)]
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()} {start}\n")
        if start == self.dies_always or (start == self.dies_once and start not in before):
            time.sleep(0.5)  # for the receipt of the unit before, which is on its way
            os.kill(os.getpid(), signal.SIGKILL)
        first = read_log(self.log)[0].split()[0] == str(os.getpid())
        time.sleep(STUCK if first and start >= self.first_stops_at else self.seconds)
        return self.extractor.unit(start, stop)


def read_log(log):
    return log.read_text().splitlines() if log.exists() else []


class Watching:
    """An engine whose extractors are watched; `then` is called with the number of units that are done."""

    def __init__(self, engine, log, then=lambda units: None, **settings):
        self.engine, self.log, self.then, self.settings = engine, log, then, settings

    def fill(self, make, writer, advance):
        units = iter(range(1, UNITS + 1))

        def told(images):
            advance(images)
            self.then(next(units))

        self.engine.fill(partial(Watched, make, self.log, **self.settings), writer, told)

    def computed(self):
        """First rows of the units that were computed, in order, with all repetitions."""
        return sorted(int(line.split()[1]) for line in read_log(self.log))

    def processes(self):
        return {line.split()[0] for line in read_log(self.log)}


STARTS = list(range(0, IMAGES, ROWS_PER_UNIT))


def test_a_worker_that_is_killed_costs_its_unit_and_the_bytes_are_those_of_one_process(
    tmp_path, cluster, node, backbone, dataset, in_process
):
    engine = Watching(RayEngine(cluster.address), tmp_path / "log", dies_once=8)
    assert run(tmp_path, backbone, dataset, engine).digest() == in_process
    again = Counter(engine.computed()) - Counter(STARTS)
    assert again[8] == 1 and again.total() <= 2  # also the other one that it had in hand
    assert len(engine.processes()) == 2
    assert not ray.is_initialized()  # what the engine joined it leaves


def test_a_node_may_join_and_another_go_in_the_middle(tmp_path, cluster, node, backbone, dataset, in_process):
    def change(units):
        if units == 1:
            cluster.add_node(**NODE)
            threading.Thread(target=remove_when_both_work).start()

    def remove_when_both_work():
        """Once a process on the new node computes something, of which the log tells."""
        until = time.monotonic() + STUCK
        while len(engine.processes()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        gone.set()

    gone = threading.Event()
    engine = Watching(RayEngine(cluster.address), tmp_path / "log", change, first_stops_at=STARTS[2])
    assert run(tmp_path, backbone, dataset, engine).digest() == in_process
    assert gone.is_set() and len(engine.processes()) == 2
    assert engine.computed() == sorted(STARTS + STARTS[2:4])  # the two that it was at
    for other in cluster.list_all_nodes()[1:]:
        cluster.remove_node(other, allow_graceful=False)


def test_an_interrupted_run_goes_on_with_the_units_that_are_missing(
    tmp_path, cluster, node, backbone, dataset, in_process
):
    def interrupt(units):
        if units == 5:
            raise KeyboardInterrupt

    engine = Watching(RayEngine(cluster.address), tmp_path / "log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone, dataset, engine)
    assert not (tmp_path / "noise.zarr").exists()
    done = [json.loads(line) for line in (tmp_path / "noise.partial/done.jsonl").read_text().splitlines()]
    assert len(done) == 5 and all(record["device"] == "cpu" for record in done)
    again = Watching(RayEngine(cluster.address), tmp_path / "log again")
    assert run(tmp_path, backbone, dataset, again).digest() == in_process
    assert again.computed() == sorted(set(STARTS) - {ROWS_PER_UNIT * record["unit"] for record in done})


def test_workers_write_to_object_storage(tmp_path, cluster, node, backbone, dataset, in_process):
    with ObjectServer() as server:
        final = f"{server.url}/deep/noise.zarr"
        engine = Watching(RayEngine(cluster.address), tmp_path / "log")
        attributes = describe(backbone, dataset, "float32") | {"run": "cured"}
        options = {"batch_size": 2, "rows_per_unit": ROWS_PER_UNIT, "storage_options": server.options}
        extract(backbone, dataset, final, None, attributes, engine=engine, **options)
        assert FeatureStore.open(final, dataset.digest, storage_options=server.options).digest() == in_process
        assert engine.computed() == STARTS
        assert all(key.startswith("deep/noise.zarr/") for key in server.keys(""))


def test_a_unit_that_kills_every_worker_ends_the_run_and_is_named(
    tmp_path, cluster, node, backbone, dataset, monkeypatch
):
    monkeypatch.setattr(engine_module, "ATTEMPTS", 2)
    engine = Watching(RayEngine(cluster.address), tmp_path / "log", dies_always=4)
    with pytest.raises(EngineError, match=r"2 workers died over unit 1, the last one so: .*; if it lacks memory, put"):
        run(tmp_path, backbone, dataset, engine)


def test_a_unit_over_which_a_worker_died_is_at_work_alone():
    crew = SimpleNamespace(_at_work={"receipt": (0, 7)}, _deaths=Counter({3: 1}))
    may_begin = partial(_Crew._may_begin, crew)
    assert may_begin(0, 5) and may_begin(1, 3) and not may_begin(0, 3)
    crew._at_work = {"receipt": (0, 3)}
    assert may_begin(1, 5) and not may_begin(0, 5)


def test_a_worker_has_two_units_at_work_and_writes_one_at_a_time():
    both, at_once, threads = threading.Barrier(2), [], []

    class Extractor:
        def unit(self, start, stop):
            both.wait(20)
            threads.append(torch.get_num_threads())
            return {"cls": start}

    class Writer:
        layout, writing = SimpleNamespace(unit_rows=lambda unit: (4 * unit, 4 * unit + 4)), threading.Lock()

        def write(self, unit, arrays):
            at_once.append(self.writing.acquire(blocking=False))
            time.sleep(0.1)
            self.writing.release()
            return {"rows": arrays["cls"]}

    worker = _Worker()
    worker.prepare([None], Writer(), _Setting("cpu", 1, None, {}))
    opened = []
    worker._open = lambda: opened.append(1) or Extractor()
    with ThreadPoolExecutor(2) as pool:
        receipts = list(pool.map(worker.unit, [0, 1]))
    assert receipts == [{"rows": 0, "device": "cpu"}, {"rows": 4, "device": "cpu"}]
    assert at_once == [True, True] and opened == [1] and threads == [1, 1]


def test_workers_that_are_placed_on_a_node_that_is_dying_are_not_the_fault_of_the_run(
    tmp_path, cluster, node, backbone, dataset, in_process, monkeypatch
):
    monkeypatch.setattr(engine_module, "ATTEMPTS", 1)
    cluster.remove_node(cluster.add_node(**NODE), allow_graceful=False)  # Ray misses its heartbeat only in a while
    engine = Watching(RayEngine(cluster.address), tmp_path / "log", seconds=2.0)
    assert run(tmp_path, backbone, dataset, engine).digest() == in_process
    assert engine.computed() == STARTS


def test_errors_of_workers_are_told_as_those_of_this_process(tmp_path, cluster, node, backbone, in_process):
    dataset = make_dataset(tmp_path / "noise")
    dataset.image_path(17).write_bytes(b"broken")
    with pytest.raises(UnreadableImage, match=r"images/17.png cannot be read as an image: not an image of a known"):
        run(tmp_path, backbone, dataset, RayEngine(cluster.address))
    large = torch.finfo(torch.float32).max
    with torch.no_grad():
        model = timm.create_model("test_vit", pretrained=False, img_size=SIZE, num_classes=0).eval()
        model.norm.weight.fill_(large)
    bad = Backbone("bad", model, backbone.transform, "b" * 64, None, {"architecture": "test_vit"})
    dataset = make_dataset(tmp_path / "more/noise")
    # The worker has two units in hand, of four images each.
    with pytest.raises(
        BadFeatures, match=r"image 'image [04]' \(images/[04].png\): array '\w+', row [04]: .*float16|finite"
    ):
        run(tmp_path / "more", bad, dataset, RayEngine(cluster.address))


@pytest.mark.parametrize("name", ["timm", "regvit.data.decoding"])
def test_a_worker_of_other_code_or_versions_is_refused(tmp_path, cluster, node, backbone, dataset, monkeypatch, name):
    real = engine_module.software()
    monkeypatch.setattr(engine_module, "software", lambda: real | {name: "0.1"})
    found = rf"{name} is {real[name]} on .*, and 0.1 at the driver; give every node the same environment"
    with pytest.raises(EngineError, match=found):
        run(tmp_path, backbone, dataset, RayEngine(cluster.address))


def test_devices_of_two_kinds_do_not_share_a_store(tmp_path, cluster, node, backbone, dataset):
    class Begun:
        """An engine of a first unit that another kind of device computed."""

        def fill(self, make, writer, advance):
            writer.record(0, writer.unit_writer().write(0, make(device="cpu").unit(0, 4)) | {"device": "NVIDIA H100"})
            RayEngine(cluster.address).fill(make, writer, advance)

    with pytest.raises(EngineError, match="are computed on NVIDIA H100 and cpu, whose results differ in the last bits"):
        run(tmp_path, backbone, dataset, Begun())


def test_where_no_node_has_room_it_is_said_at_once_here_and_after_a_while_on_a_cluster(
    tmp_path, cluster, node, backbone, dataset, monkeypatch
):
    monkeypatch.setattr(engine_module, "PATIENCE", 3.0)
    began = time.monotonic()
    with pytest.raises(
        EngineError, match=r"no node has room for a worker of 7 CPUs; there are nodes of .*\b0 CPUs and 0 GPUs"
    ):
        run(tmp_path, backbone, dataset, RayEngine(cluster.address, cpus_per_worker=7))
    assert time.monotonic() - began > 3
    with pytest.raises(EngineError, match=r"for a worker of 1 CPUs and 0.5 GPUs; there are nodes of"):
        run(tmp_path, backbone, dataset, RayEngine(cluster.address, device="cuda", gpus_per_worker=0.5))


def test_a_cluster_that_is_not_there_is_named(tmp_path, backbone, dataset):
    with pytest.raises(EngineError, match=r"Ray cannot be reached at 127.0.0.1:9:"):
        run(tmp_path, backbone, dataset, RayEngine("127.0.0.1:9"))


def test_without_an_address_it_starts_and_ends_ray_on_this_machine(tmp_path, backbone, dataset, in_process):
    assert run(tmp_path, backbone, dataset, RayEngine()).digest() == in_process
    assert not ray.is_initialized()


def test_nothing_is_started_where_nothing_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with StoreWriter(tmp_path / "a.zarr", tmp_path / "a.partial", 1, {"cls": (2,)}, {}) as writer:
        writer.write(0, {"cls": np.zeros((1, 2))})
        RayEngine().fill(None, writer, None)


def test_without_ray_the_cure_is_named(tmp_path, backbone, dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"needs Ray, which is not installed; pip install 'regvit\[cluster\]'"):
        run(tmp_path, backbone, dataset, RayEngine())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device": "cuda:1"}, "device is 'cuda:1'; expected cpu or cuda, as Ray says which GPU"),
        ({"gpus_per_worker": 0}, "gpus_per_worker is 0; expected a share"),
        ({"gpus_per_worker": 1.5}, "gpus_per_worker is 1.5; expected a share"),
        ({"cpus_per_worker": 0}, "cpus_per_worker is 0; expected 1 or more, or None"),
        ({"threads": 0}, "threads is 0; expected 1 or more, or None"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        RayEngine(**setting)
