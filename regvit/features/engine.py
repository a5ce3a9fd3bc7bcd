"""Extraction on many devices: a data set's missing units, computed by Ray on one machine or on a cluster.

    driver:   the store's lock, the list of missing units, the records         (one process, `extract`)
    workers:  decode -> forward -> chunks of one unit, written where the store lies   (one for each GPU, or CPU share)

A worker is an actor that holds the model on one device and has QUEUE units in hand, each on a thread of its own: while
one of them is computed, the other is decoded or written. Only one is computed at a time, and one written. It writes their
chunks, which need no coordination, and the driver records a unit when it hears that its chunks are on disk. So whatever
dies, the store is as after any interruption: a lost worker or node costs the units it was at, which others do again, and
a lost driver costs the units at work. Which worker computed a unit leaves no trace in the bytes.

Workers see the images, and the folder of the store, under the paths of the driver (a shared file system), or the store is
on object storage. They run the same code and versions as the driver, and GPUs of one kind: both are checked.

Actors rather than tasks, as a process that has opened a GPU keeps it: Ray hands a task's process another GPU by
CUDA_VISIBLE_DEVICES, which is read only once, or else ends the process, and the model with it, after each task.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch

from regvit.features.store_writer import OutOfReach, StoreWriter

QUEUE = 2  # units in the hands of a worker, all of them at work; also what it holds in memory
ATTEMPTS = 5  # workers that may die over one unit before it is the unit's fault
PATIENCE = 600.0  # seconds without a single node on which a worker fits: a cluster may have to start it first
LOOK_EVERY = 2.0  # seconds between two looks at which nodes there are
NODE_DIED = "its node has died"  # how Ray says that a worker is not the cause of its own end
SPARE = 128 << 20  # bytes of Ray's object store beyond the model, all that is put there; its minimum is 75 MB


class EngineError(RuntimeError):
    """Ray is not installed or not reached, no node fits, a unit kills its workers, or a worker is not like the driver."""


@dataclass(frozen=True)
class RayEngine:
    """Computes the missing units of a store on Ray's workers; give it to `extract` as `engine`.

    Attributes:
        address: of a cluster, one of whose nodes this is: `auto`, or `host:6379`. None starts Ray on this machine, and
            ends it afterwards. A program that has called `ray.init` itself keeps what that joined.
        device: what each worker computes on, `cpu` or `cuda`.
        gpus_per_worker: with 0.5 two workers share a GPU, for where the Python of one process cannot keep it busy.
        cpus_per_worker: cores that a worker takes up. None: with a GPU its share of the cores of its node, which are also
            its decoding threads; without, its threads.
        threads: of torch in each worker; None is as many as in this process. It may move a float32 in its last bits.
    Raises:
        ValueError: a number is out of range, or the device is neither `cpu` nor `cuda`.
    """

    address: str | None = None
    device: str = "cpu"
    gpus_per_worker: float = 1.0
    cpus_per_worker: int | None = None
    threads: int | None = None

    def __post_init__(self):
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; expected cpu or cuda, as Ray says which GPU a worker has")
        if not self.gpus_per_worker > 0 or (self.gpus_per_worker > 1 and self.gpus_per_worker % 1):
            raise ValueError(f"gpus_per_worker is {self.gpus_per_worker}; expected a share (0.5, …) or 1")
        for name in ("cpus_per_worker", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more, or None")

    def fill(self, make: Callable, writer: StoreWriter, advance: Callable[[int], object]) -> None:
        """Computes and records every missing unit.

        Args:
            make: `make(device=…)` gives the extractor, whose `unit(start, stop)` gives the arrays of these rows; picklable.
            writer: of the store, open.
            advance: is told the number of images of each unit that is done.
        Raises:
            EngineError: see there.
            Exception: whatever extractor or writer raise at a worker, as it is.
            KeyboardInterrupt: passed on, when the workers have ended.
        """
        if not writer.missing_units():
            return
        ray = _ray()
        extractor = pickle.dumps(make, protocol=pickle.HIGHEST_PROTOCOL)
        ours = not ray.is_initialized()
        if ours:
            self._connect(ray, len(extractor))
        try:
            _Crew(self, ray, ray.put(extractor), writer, advance).work()
        finally:
            if ours:
                ray.shutdown()

    def _connect(self, ray: ModuleType, size: int) -> None:
        """Joins the cluster, or starts one on this machine with no more than is needed."""
        more = {"address": self.address}
        if self.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            more = {"address": "local", "include_dashboard": False, "object_store_memory": size + SPARE}
        try:
            _knock(self.address)
            ray.init(configure_logging=False, log_to_driver=False, **more)
        except (OSError, ValueError, RuntimeError) as error:  # a ConnectionError is an OSError
            where = "on this machine" if self.address is None else f"at {self.address}"
            raise EngineError(f"Ray cannot be reached {where}: {error}") from error


class _Crew:
    """The workers of one `fill`: as many as the nodes hold, replaced when they die, more when nodes join.

    Workers are known by a number. One is `starting` until it has answered: on a cluster that others use too it may have
    to wait for its node, and units given to it would wait with it.
    """

    def __init__(
        self, engine: RayEngine, ray: ModuleType, make: object, writer: StoreWriter, advance: Callable[[int], object]
    ):
        self._engine, self._ray, self._make, self._writer, self._advance = engine, ray, make, writer, advance
        self._unit_writer = writer.unit_writer()
        self._threads = engine.threads or torch.get_num_threads()
        self._software = software()
        self._todo = deque(writer.missing_units())
        self._workers: dict[int, object] = {}
        self._starting: dict[object, int] = {}  # by the reference of its answer
        self._at_work: dict[object, tuple[int, int]] = {}  # worker and unit by the reference of the receipt
        self._hired = 0
        self._deaths: Counter[int] = Counter()  # by unit
        self._stillborn = 0  # workers that died before they answered, since one did answer
        self._devices = {record["device"] for record in writer.records.values() if "device" in record}
        self._fitted = time.monotonic()

    def work(self) -> None:
        """Until every unit is recorded."""
        looked = float("-inf")
        try:
            while self._todo or self._at_work:
                if time.monotonic() - looked > LOOK_EVERY:
                    self._hire()
                    looked = time.monotonic()
                self._hand_out()
                for reference in self._answers():
                    if reference in self._starting:
                        self._welcome(reference)
                    else:
                        self._take(reference)
        finally:
            for worker in self._workers.values():
                self._ray.kill(worker)  # with what it has not begun: after an error nobody wants it any more

    def _answers(self) -> list:
        """References that are ready, oldest first; none after LOOK_EVERY seconds."""
        waiting = [*self._starting, *self._at_work]
        if not waiting:  # there is no node
            time.sleep(LOOK_EVERY)
            return []
        self._ray.wait(waiting, timeout=LOOK_EVERY)
        ready = set(self._ray.wait(waiting, num_returns=len(waiting), timeout=0)[0])
        return [reference for reference in waiting if reference in ready]

    def _hire(self) -> None:
        """Starts as many workers as the nodes hold, and not more than there are units.

        On a cluster one more: it steps in where one dies, and an autoscaler sees by it that another node is wanted.
        """
        shares = [self._share(node["Resources"]) for node in self._ray.nodes() if node["Alive"]]
        slots = sum(share.workers for share in shares)
        if slots:
            self._fitted = time.monotonic()
        elif self._engine.address is None or time.monotonic() - self._fitted > PATIENCE:
            raise EngineError(
                f"no node has room for a worker of {self._needs()}; there are nodes of "
                f"{', '.join(str(share) for share in shares) or 'nothing'}; ask for less, or add nodes"
            )
        cpus = min((share.cpus for share in shares if share.workers), default=self._least_cpus())
        gpus = self._engine.gpus_per_worker if self._engine.device == "cuda" else 0
        setting = _Setting(
            self._engine.device, self._threads, cpus if self._engine.device == "cuda" else None, self._software
        )
        actor = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_concurrency=QUEUE)(_Worker)
        wanted = slots + (self._engine.address is not None)
        while len(self._workers) < min(wanted, len(self._todo) + len(self._at_work)):
            worker = actor.remote()
            self._workers[self._hired] = worker
            # In a list, or Ray would fetch the model before the worker is asked for it.
            self._starting[worker.prepare.remote([self._make], self._unit_writer, setting)] = self._hired
            self._hired += 1

    def _hand_out(self) -> None:
        """Gives every worker that has less than its share another unit."""
        load = Counter(number for number, _ in self._at_work.values())
        for share in range(QUEUE):
            for number in self._workers.keys() - set(self._starting.values()):
                if self._todo and load[number] == share and self._may_begin(number, self._todo[0]):
                    unit = self._todo.popleft()
                    self._at_work[self._workers[number].unit.remote(unit)] = (number, unit)
                    load[number] += 1

    def _may_begin(self, number: int, unit: int) -> bool:
        """A unit that was at work when a worker died is at work alone: if it is the reason, it takes no other with it."""
        others = [other for at, other in self._at_work.values() if at == number]
        return not others or not any(self._deaths[each] for each in (unit, *others))

    def _welcome(self, reference: object) -> None:
        """A worker has started, or died of it."""
        number = self._starting.pop(reference)
        try:
            self._ray.get(reference)
            self._stillborn = 0
        except self._ray.exceptions.RayActorError as error:
            del self._workers[number]
            if NODE_DIED in str(error):  # Ray places workers on a dead node until it misses its heartbeat
                return
            self._stillborn += 1
            if self._stillborn == ATTEMPTS:
                raise EngineError(f"{ATTEMPTS} workers could not start, the last one so: {_reason(error)}") from error

    def _take(self, reference: object) -> None:
        """Records the unit of a receipt, or puts it back where its worker died."""
        number, unit = self._at_work.pop(reference)
        try:
            receipt = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, OutOfReach):
                raise EngineError(str(error.cause)) from error
            raise error.cause from error
        except self._ray.exceptions.RayActorError as error:
            self._lose(number, unit, error)
            return
        self._devices.add(receipt["device"])
        if len(self._devices) > 1:
            raise EngineError(
                f"the units of {self._writer.partial} are computed on {' and '.join(sorted(self._devices))}, whose "
                "results differ in the last bits; use nodes of one kind, or delete it to begin anew"
            )
        try:
            self._writer.record(unit, receipt)
        except OutOfReach as error:
            raise EngineError(str(error)) from error
        start, stop = self._writer.unit_rows(unit)
        self._advance(stop - start)

    def _lose(self, number: int, unit: int, error: Exception) -> None:
        """A worker died: its units are to be done again, first of all, and any of them may be the reason."""
        self._todo.appendleft(unit)
        if number in self._workers:
            self._ray.kill(self._workers.pop(number))  # where it is only out of reach
        self._deaths[unit] += 1
        if self._deaths[unit] == ATTEMPTS:
            raise EngineError(
                f"{ATTEMPTS} workers died over unit {unit}, the last one so: {_reason(error)}; if it lacks memory, put "
                "fewer workers on a node (cpus_per_worker, gpus_per_worker) or take smaller batches"
            ) from error

    def _share(self, resources: dict) -> _Share:
        """What of a node's cores a worker gets, and how many workers the node holds."""
        cpus, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
        if self._engine.device == "cpu":
            each = self._engine.cpus_per_worker or self._threads
            return _Share(cpus, gpus, each, cpus // each)
        by_gpu = int(gpus / self._engine.gpus_per_worker)
        each = self._engine.cpus_per_worker or max(1, cpus // max(1, by_gpu))
        return _Share(cpus, gpus, each, min(by_gpu, cpus // each))

    def _least_cpus(self) -> int:
        """Cores that a worker takes up on whatever node."""
        return self._engine.cpus_per_worker or (self._threads if self._engine.device == "cpu" else 1)

    def _needs(self) -> str:
        gpus = f" and {self._engine.gpus_per_worker:g} GPUs" if self._engine.device == "cuda" else ""
        return f"{self._least_cpus()} CPUs{gpus}"


@dataclass(frozen=True)
class _Share:
    """A node's cores and GPUs, the cores of one worker, and how many workers that makes."""

    node_cpus: int
    node_gpus: float
    cpus: int
    workers: int

    def __str__(self) -> str:
        return f"{self.node_cpus} CPUs and {self.node_gpus:g} GPUs"


@dataclass(frozen=True)
class _Setting:
    """How a worker computes: device, torch's threads, decoding threads (None: as the extractor was made), software."""

    device: str
    threads: int
    decoders: int | None
    software: dict


class _Worker:
    """What runs in each worker process, `unit` on QUEUE threads. Nothing is done before the first unit, so that what fails
    is told as its error."""

    def prepare(self, make: list, unit_writer: object, setting: _Setting) -> None:
        self._make, self._unit_writer, self._setting = make[0], unit_writer, setting
        self._extractor = None
        self._opening, self._writing = threading.Lock(), threading.Lock()

    def unit(self, unit: int) -> dict:
        """Computes and writes one unit; `arithmetic` sees to it that no other is computed at the same time.

        Returns: its receipt, with the device.
        """
        torch.set_num_threads(self._setting.threads)  # each thread is told on its own
        with self._opening:
            if self._extractor is None:
                self._extractor = self._open()
        arrays = self._extractor.unit(*self._unit_writer.layout.unit_rows(unit))
        with self._writing:
            receipt = self._unit_writer.write(unit, arrays)
        return receipt | {"device": _device_name(self._setting.device)}

    def _open(self) -> object:
        import ray  # this process was started by it

        make = pickle.loads(ray.get(self._make))  # imports the code that it needs
        here, there = software(), self._setting.software
        if differing := sorted(name for name in here.keys() & there.keys() if here[name] != there[name]):
            name = differing[0]
            raise EngineError(
                f"{name} is {here[name]} on {socket.gethostname()}, and {there[name]} at the driver; give every node the "
                "same environment"
            )
        more = {} if self._setting.decoders is None else {"workers": self._setting.decoders}
        return make(device=self._setting.device, **more)


def software() -> dict[str, str]:
    """What must be the same in every process for the same bits: our modules that are loaded, by the start of the SHA-256
    of their code, and the versions of the libraries that compute."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == __package__}
    code = {name: hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:12] for name, module in ours.items()}
    return code | {name: version(name) for name in ("torch", "timm", "pillow", "numpy")}


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _knock(address: str | None) -> None:
    """Opens and shuts a connection to `host:port`: Ray itself would go on trying for minutes where nobody answers.

    Raises:
        OSError: nobody answers.
    """
    host, parted, port = (address or "").rpartition(":")
    if parted and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _reason(error: Exception) -> str:
    """What an error of Ray's says, in one line; it goes on with a list of ids."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(
        line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:", "ip:", "namespace:"))
    )[:600]


def _ray() -> ModuleType:
    """Ray, imported when an engine is first used: a single device does without it.

    Raises:
        EngineError: it is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise EngineError(
            "this engine needs Ray, which is not installed; pip install 'regvit[cluster]', or pip install ray"
        ) from error
    return ray
