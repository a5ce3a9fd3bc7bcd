"""Extraction on many devices: a data set's missing units, computed by Ray Data on one machine or on a cluster.

    driver:   the store's lock, the list of missing units, the records         (one process, `fill_store`)
    workers:  decode -> forward -> chunks of one unit, written where the store lies   (one for each GPU, or CPU share)

A worker is an actor that holds the model on one device (a process that has opened a GPU keeps it) and has QUEUE units in
hand, each on a thread of its own: while one of them is computed, the other is decoded or written. It writes their chunks,
which need no coordination, and the driver records a unit when it hears that its chunks are on disk. So whatever dies, the
store is as after any interruption: a lost worker or node costs the units it was at, which Ray has others do again, and a
lost driver costs the units at work. Which worker computed a unit leaves no trace in the bytes.

Workers see the images, and the folder of the store, under the paths of the driver (a shared file system). They run the same
code and versions as the driver, and GPUs of one kind: both are checked.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from regvit.features.extraction import Job, software
from regvit.features.store_writer import StoreWriter, UnitWriter

QUEUE = 2  # units in the hands of a worker; also what it holds in memory
ATTEMPTS = 5  # workers that may die over one unit before it is the unit's fault
STOPPING = 60  # seconds given to Ray's own threads where the work is broken off
SPARE = 128 << 20  # bytes of Ray's object store beyond the model, all that is put there; its minimum is 75 MB


class EngineError(RuntimeError):
    """Ray is not installed or not reached, no node fits, a unit kills its workers, or a worker is not like the driver."""


@dataclass(frozen=True)
class RayEngine:
    """Computes the missing units of a store on Ray's workers; give it to `fill_store` as `Options.engine`.

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
        if not 0 < self.gpus_per_worker <= 1:
            raise ValueError(f"gpus_per_worker is {self.gpus_per_worker}; expected a share (0.5, …) or 1")
        for name in ("cpus_per_worker", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more, or None")

    def fill(self, job: Job, writer: StoreWriter, advance: Callable[[int], object]) -> None:
        """Computes and records every missing unit.

        Raises:
            EngineError: see there.
            OutOfReach, UnreadableImage, …: whatever the job or the writer raise at a worker, as it is.
            KeyboardInterrupt: passed on; the workers end.
        """
        if not (missing := writer.missing_units()):
            return
        ray = _ray()
        pickled = pickle.dumps(job, protocol=pickle.HIGHEST_PROTOCOL)
        devices = {device for device in writer.done.values() if device}
        shutil.rmtree(writer.partial / "attempts", ignore_errors=True)
        (writer.partial / "attempts").mkdir()
        with (
            self._connected(ray, len(pickled)),
            closing(self._computed(ray, pickled, writer.unit_writer(), missing)) as answers,
        ):
            for answer in answers:
                if answer["error"]:
                    raise pickle.loads(answer["error"])
                devices.add(answer["device"])
                if len(devices) > 1:
                    raise EngineError(
                        f"the units of {writer.partial} are computed on {' and '.join(sorted(devices))}, whose results "
                        "differ in the last bits; use nodes of one kind, or delete it to begin anew"
                    )
                writer.record(int(answer["unit"]), answer["device"])
                start, stop = writer.layout.unit_rows(int(answer["unit"]))
                advance(stop - start)

    def _computed(
        self, ray: ModuleType, job: bytes, writer: UnitWriter, missing: list[int]
    ) -> Generator[Mapping, None, None]:
        """What workers say of each unit, see `_Worker`."""
        cpus, workers = self._share(ray)
        setting = _Setting(self.device, self.threads or torch.get_num_threads(), cpus, software(), ATTEMPTS)
        pool = ray.data.ActorPoolStrategy(
            min_size=1,
            initial_size=min(workers, len(missing)),
            max_size=len(missing),  # as many as nodes have room for, also those that join
            max_tasks_in_flight_per_actor=QUEUE,
            max_concurrent_calls_per_actor=QUEUE,
            enable_true_multi_threading=True,
        )
        units = ray.data.from_items([{"unit": unit} for unit in missing], override_num_blocks=len(missing))
        answers = units.map_batches(
            _Worker,
            batch_size=1,
            compute=pool,
            num_cpus=cpus,
            num_gpus=self.gpus_per_worker if self.device == "cuda" else 0,
            fn_constructor_args=(ray.put(job), writer, setting),
        )
        bundles = answers.iter_internal_ref_bundles()  # `iter_rows` asks Ray from threads of its own, also after Ctrl-C
        try:
            for bundle in bundles:
                for block in bundle.block_refs:
                    yield from ray.get(block).to_pylist()
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
            raise EngineError(f"workers could not start: {' '.join(str(error).split())[-600:]}") from error
        finally:
            del bundles  # this ends the execution; the traceback of an interruption would keep it

    @contextmanager
    def _connected(self, ray: ModuleType, size: int) -> Iterator[None]:
        """Joins the cluster, or starts one on this machine with no more than is needed; leaves what it joined."""
        if ray.is_initialized():
            yield
            return
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
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it tells of errors that are told here
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        try:
            yield
        finally:
            # A thread that asks Ray for something after its end has it end this process.
            for thread in threading.enumerate():
                if thread.name.startswith(("StreamingExecutor", "ray-data")):
                    thread.join(STOPPING)
            ray.shutdown()

    def _share(self, ray: ModuleType) -> tuple[int, int]:
        """Cores of a worker, and how many workers the nodes have room for.

        Raises:
            EngineError: no node of this machine's own Ray has room for one; a cluster may grow, and is waited for.
        """
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores, gpus = ([int(node.get(kind, 0)) for node in resources] for kind in ("CPU", "GPU"))
        cpus, slots = self.cpus_per_worker or self.threads or torch.get_num_threads(), cores
        if self.device == "cuda":
            slots = [int(count / self.gpus_per_worker) for count in gpus]
            shares = [max(1, count // slot) for count, slot in zip(cores, slots, strict=True) if slot]
            cpus = self.cpus_per_worker or min(shares, default=1)
        workers = sum(min(slot, count // cpus) for count, slot in zip(cores, slots, strict=True))
        if not workers and self.address is None:
            raise EngineError(
                f"this machine has no room for a worker of {cpus} CPUs on {self.device}: it has {cores[0]} CPUs and "
                f"{gpus[0]} GPUs; ask for less"
            )
        return cpus, max(1, workers)


@dataclass(frozen=True)
class _Setting:
    """How a worker computes: device, torch's threads, decoding threads with a GPU, the software of the driver, and how many
    workers may die over a unit."""

    device: str
    threads: int
    decoders: int
    software: dict[str, str]
    attempts: int


class _Worker:
    """What runs in each worker process, on QUEUE threads. Errors are sent back as they are, not as Ray's."""

    def __init__(self, job: object, unit_writer: UnitWriter, setting: _Setting):
        self._pickled, self._writer, self._setting = job, unit_writer, setting
        self._job: Job | Exception | None = None
        self._job = self._open()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        [unit] = batch["unit"].tolist()
        error = b""
        try:
            if isinstance(self._job, Exception):
                raise self._job
            self._count(unit)
            torch.set_num_threads(self._setting.threads)  # each thread is told on its own
            [arrays] = self._job.units([self._writer.layout.unit_rows(unit)], self._setting.device)
            self._writer.write(unit, arrays)
        except Exception as raised:
            error = pickle.dumps(raised)
        device = torch.cuda.get_device_name() if self._setting.device == "cuda" else "cpu"
        return {"unit": [unit], "device": [device], "error": [error]}

    def _count(self, unit: int) -> None:
        """Counts who began the unit: Ray has it begun anew as often as a worker dies."""
        self._writer.check_place()
        with open(self._writer.partial / "attempts" / str(unit), "ab") as begun:
            begun.write(b".")
            if begun.tell() > (most := self._setting.attempts):
                raise EngineError(
                    f"{most} workers died with unit {unit} in hand; if it lacks memory, put fewer workers on a node "
                    "(cpus_per_worker, gpus_per_worker) or take smaller batches"
                )

    def _open(self) -> Job | Exception:
        import ray  # this process was started by it

        job = pickle.loads(ray.get(self._pickled))  # imports the code that it needs
        here, there = software(), self._setting.software
        if differing := sorted(name for name in here.keys() & there.keys() if here[name] != there[name]):
            name = differing[0]
            return EngineError(
                f"{name} is {here[name][:12]} on {socket.gethostname()}, and {there[name][:12]} at the driver; give every "
                "node the same environment"
            )
        return (
            job
            if self._setting.device == "cpu"
            else Job(job.forward, job.dataset, job.batch_size, self._setting.decoders)
        )


def _knock(address: str | None) -> None:
    """Opens and shuts a connection to `host:port`: Ray itself would go on trying for minutes where nobody answers.

    Raises:
        OSError: nobody answers.
    """
    host, parted, port = (address or "").rpartition(":")
    if parted and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _ray() -> ModuleType:
    """Ray, imported when an engine is first used: a single device does without it.

    Raises:
        EngineError: it is not installed.
    """
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise EngineError(
            "this engine needs Ray, which is not installed; pip install 'regvit[cluster]', or pip install 'ray[data]'"
        ) from error
    return ray
