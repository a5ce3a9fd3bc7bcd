"""What the stages that extract have in common: the knobs that they compute with, and what they say of a run."""

import os
from pathlib import Path

from regvit.features.extraction import Options
from regvit.features.ray_engine import RayEngine
from regvit.features.store import fingerprint
from regvit.pipeline.runtime import Runtime

ELSEWHERE = ("transform", "neurons", "detection", "cure")  # said otherwise, or nothing that decides a feature


def store_options(runtime: Runtime, label: str) -> Options:
    """Where and how fast a store is filled. Unfinished ones lie in the main repository, also where DVC runs a copy of it for
    a queued experiment, so that these resume each other."""
    device = runtime.worker_device or runtime.device
    engine = None
    if runtime.engine == "ray":
        kind = device.partition(":")[0]
        engine = RayEngine(runtime.address, kind, runtime.gpus_per_worker, runtime.cpus_per_worker, runtime.threads)
    batch_size = runtime.batch_size if runtime.batch_size_given else None
    return Options(device, batch_size, runtime.workers, engine, Path(os.environ.get("DVC_ROOT", ".")) / "work", label)


def run_attributes(run: dict) -> dict:
    """What a store says of the run that it was made under."""
    neurons = run["neurons"]
    about = {key: value for key, value in run.items() if key not in ELSEWHERE}
    about |= {"neurons_sha256": None if neurons is None else fingerprint(neurons)}
    return about | ({"cure": run["cure"]["name"], "cure_sha256": fingerprint(run["cure"])} if "cure" in run else {})
