"""The engine on Ray, on nodes of one CPU that are simulated here: same bytes, whatever dies."""

import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from extracting import backbone_of, noise, run, tree, with_registers
from warm_ray import warm_ray

from regvit.data.decoding import UnreadableImage
from regvit.features import ray_engine
from regvit.features.ray_engine import EngineError, RayEngine
from regvit.features.store_writer import StoreWriter

ray = pytest.importorskip("ray", reason="the engine needs the extra `cluster`")
from ray.cluster_utils import Cluster  # noqa: E402

IMAGES, UNIT = 40, 4
STARTS = list(range(0, IMAGES, UNIT))
STUCK = 300.0  # seconds, more than a node takes to start on a busy machine
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    """A head that computes nothing; tests add the nodes that they want. Workers can import this module."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_USAGE_STATS_ENABLED")}
    places = (str(Path(__file__).parent), str(Path(__file__).parents[1]), before["PYTHONPATH"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    with warm_ray():
        yield cluster
    cluster.shutdown()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def leaving(cluster):
    """One node of one CPU, that a test may take away."""
    node = cluster.add_node(**NODE)
    yield node
    for other in cluster.list_all_nodes()[1:]:
        cluster.remove_node(other, allow_graceful=False)


@pytest.fixture(scope="module")
def node(cluster):
    """One node of one CPU that stays, after those tests that take nodes away."""
    return cluster.add_node(**NODE)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # workers take as many CPUs as the driver has threads
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone():
    return with_registers(backbone_of(), 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("data"), IMAGES)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory, backbone, dataset):
    """The files of the store that this process makes by itself."""
    return tree(run(tmp_path_factory.mktemp("in_process"), backbone, dataset).path)


class Watched:
    """A job that writes down which process computed which rows, and dies of some units, once or always.

    The first process of all comes to no end with units from the row `first_stops_at` on: it must be taken away.
    """

    def __init__(self, job, log, dies_once=None, dies_always=None, first_stops_at=IMAGES):
        self.job, self.log, self.first_stops_at = job, log, first_stops_at
        self.dies_once, self.dies_always = dies_once, dies_always

    def units(self, spans, device):
        [(start, _)] = spans
        before = [int(line.split()[1]) for line in read_log(self.log)]
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()} {start}\n")
        if start == self.dies_always or (start == self.dies_once and start not in before):
            time.sleep(0.5)  # for the receipt of the unit before, which is on its way
            os.kill(os.getpid(), signal.SIGKILL)
        first = read_log(self.log)[0].split()[0] == str(os.getpid())
        time.sleep(STUCK if first and start >= self.first_stops_at else 0.0)
        return self.job.units(spans, device)


def read_log(log):
    return log.read_text().splitlines() if log.exists() else []


class Watching:
    """An engine whose jobs are watched; `then` is called with the number of units that are done."""

    def __init__(self, engine, log, then=lambda units: None, **settings):
        self.engine, self.log, self.then, self.settings, self.done = engine, log, then, settings, 0

    def fill(self, job, writer, advance):
        def told(images):
            advance(images)
            self.done += 1
            self.then(self.done)

        self.engine.fill(Watched(job, self.log, **self.settings), writer, told)

    def computed(self):
        """First rows of the units that were computed, in order, with all repetitions."""
        return sorted(int(line.split()[1]) for line in read_log(self.log))

    def processes(self):
        return {line.split()[0] for line in read_log(self.log)}


def test_a_worker_that_is_killed_costs_its_unit_and_the_bytes_are_those_of_one_process(
    tmp_path, cluster, leaving, backbone, dataset, in_process
):
    engine = Watching(RayEngine(cluster.address), tmp_path / "log", dies_once=8)
    assert tree(run(tmp_path, backbone, dataset, engine=engine).path) == in_process
    again = Counter(engine.computed()) - Counter(STARTS)
    assert again[8] == 1 and again.total() <= 2  # also the other one that it had in hand
    assert len(engine.processes()) == 2
    assert not ray.is_initialized()  # what the engine joined it leaves


def test_a_node_may_join_and_another_go_in_the_middle(tmp_path, cluster, leaving, backbone, dataset, in_process):
    def change(units):
        if units == 1:
            cluster.add_node(**NODE)
            threading.Thread(target=remove_when_both_work).start()

    def remove_when_both_work():
        """Once a process on the new node computes something, of which the log tells."""
        until = time.monotonic() + STUCK
        while len(engine.processes()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        cluster.remove_node(leaving, allow_graceful=False)
        gone.set()

    gone = threading.Event()
    engine = Watching(RayEngine(cluster.address), tmp_path / "log", change, first_stops_at=STARTS[2])
    assert tree(run(tmp_path, backbone, dataset, engine=engine).path) == in_process
    assert gone.is_set() and len(engine.processes()) >= 2
    assert (Counter(engine.computed()) - Counter(STARTS)).total() <= 2  # the two that it was at


def test_an_interrupted_run_goes_on_with_the_units_that_are_missing(
    tmp_path, cluster, node, backbone, dataset, in_process
):
    def interrupt(units):
        if units == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone, dataset, engine=Watching(RayEngine(cluster.address), tmp_path / "log", interrupt))
    assert not (tmp_path / "noise.zarr").exists()
    done = {int(file.name): file.read_text() for file in (tmp_path / "noise.zarr.partial/done").iterdir()}
    assert len(done) == 5 and set(done.values()) == {"cpu"}
    again = Watching(RayEngine(cluster.address), tmp_path / "log again")
    assert tree(run(tmp_path, backbone, dataset, engine=again).path) == in_process
    assert again.computed() == sorted(set(STARTS) - {UNIT * unit for unit in done})


def test_a_unit_that_kills_every_worker_ends_the_run_and_is_named(
    tmp_path, cluster, node, backbone, dataset, monkeypatch
):
    monkeypatch.setattr(ray_engine, "ATTEMPTS", 2)
    engine = Watching(RayEngine(cluster.address), tmp_path / "log", dies_always=36)
    with pytest.raises(EngineError, match=r"2 workers died with unit [89] in hand; if it lacks memory, put fewer"):
        run(tmp_path, backbone, dataset, engine=engine)


def test_errors_of_workers_are_told_as_those_of_this_process(tmp_path, cluster, node, backbone):
    dataset = noise(tmp_path, IMAGES)
    dataset.image_path(17).write_bytes(b"broken")
    with pytest.raises(UnreadableImage, match=r"\.png cannot be read as an image: not an image of a known"):
        run(tmp_path, backbone, dataset, engine=RayEngine(cluster.address))
    assert not ray.is_initialized()


def test_a_worker_of_other_code_or_versions_is_refused(tmp_path, cluster, node, backbone, dataset, monkeypatch):
    real = ray_engine.software()
    monkeypatch.setattr(ray_engine, "software", lambda: real | {"timm": "0.1"})
    found = rf"timm is {real['timm']} on .*, and 0.1 at the driver; give every node the same environment"
    with pytest.raises(EngineError, match=found):
        run(tmp_path, backbone, dataset, engine=RayEngine(cluster.address))


def test_devices_of_two_kinds_do_not_share_a_store(tmp_path, cluster, node, backbone, dataset):
    class Begun:
        """An engine of a first unit that another kind of device computed."""

        def fill(self, job, writer, advance):
            [arrays] = job.units([(0, 4)])
            writer.unit_writer().write(0, arrays)
            writer.record(0, "NVIDIA H100")
            RayEngine(cluster.address).fill(job, writer, advance)

    with pytest.raises(EngineError, match="are computed on NVIDIA H100 and cpu, whose results differ in the last bits"):
        run(tmp_path, backbone, dataset, engine=Begun())


def test_what_the_program_has_joined_is_used_and_kept(tmp_path, cluster, node, backbone, dataset, in_process):
    ray.init(cluster.address, log_to_driver=False)
    try:
        with pytest.raises(EngineError, match=r"no room for a worker of 700 CPUs on cpu: it has \d CPUs"):
            run(tmp_path, backbone, dataset, engine=RayEngine(cpus_per_worker=700))
        assert tree(run(tmp_path, backbone, dataset, engine=RayEngine()).path) == in_process
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_a_cluster_that_is_not_there_is_named(tmp_path, backbone, dataset):
    with pytest.raises(EngineError, match=r"Ray cannot be reached at 127.0.0.1:9:"):
        run(tmp_path, backbone, dataset, engine=RayEngine("127.0.0.1:9"))


def test_ray_is_not_needed_where_nothing_is_missing_and_its_cure_is_named_otherwise(
    tmp_path, backbone, dataset, monkeypatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    values = {"cls": np.zeros((1, 2), np.float16)}
    with StoreWriter(tmp_path / "b.zarr", tmp_path / "b.partial", 1, {"cls": ((2,), "float16")}, {}) as writer:
        writer.write(0, values)
        RayEngine().fill(None, writer, None)
    with pytest.raises(EngineError, match=r"needs Ray, which is not installed; pip install 'regvit\[cluster\]'"):
        run(tmp_path, backbone, dataset, engine=RayEngine())


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
