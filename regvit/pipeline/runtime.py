"""Where and how fast to compute: knobs that change no result, so that DVC does not track them.

Read from the environment (REGVIT_<KNOB>, in capitals), else from the git-ignored runtime.yaml beside dvc.yaml, else the
defaults: here, on a GPU where there is one.

| knob | what | default |
|---|---|---|
| `device` | `cpu`, `cuda`, `cuda:1`, … | `auto`: a GPU where there is one |
| `batch_size` | images a forward | `auto`: 8 on a CPU, else 32; extraction on a GPU as many as its memory has room for |
| `workers` | decoding threads | `auto`: with a GPU one for each usable core, else 0, which decodes in between |
| `threads` | of torch on the CPU | torch's own choice |
| `compile` | whether extraction runs the model under torch.compile | `auto`: on a GPU from 500,000 images on |
| `engine` | `local`, or `ray`: extraction on a cluster | `local` |
| `address` | of the Ray cluster | one that is started on this machine |
| `worker_device` | what the cluster's workers compute on: `cpu` or `cuda` | the kind of `device` |
| `gpus_per_worker`, `cpus_per_worker` | share of a GPU, cores | 1, Ray's choice |
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from ruamel.yaml import YAML

from regvit.features.cuda_streams import usable_cores, usual_batch_size

NUMBERS = {"batch_size": 1, "workers": 0, "threads": 1, "cpus_per_worker": 1}  # whole ones, and the least of each
WORDS = {"engine": ("local", "ray"), "worker_device": ("cpu", "cuda"), "compile": ("true", "false")}
AUTO = ("device", "batch_size", "workers", "compile")  # may be left to the machine by that word


@dataclass(frozen=True)
class Runtime:
    """The knobs, with `auto` resolved.

    Attributes:
        batch_size: images; `batch_size_given` says whether it was left open.
        threads, cpus_per_worker, address, worker_device: None for the default.
        compile: None for the default.
    """

    device: str = "auto"
    batch_size: int = 8
    workers: int = 0
    threads: int | None = None
    compile: bool | None = None
    engine: str = "local"
    address: str | None = None
    worker_device: str | None = None
    gpus_per_worker: float = 1.0
    cpus_per_worker: int | None = None
    batch_size_given: bool = False  # no knob

    @classmethod
    def load(cls, folder: str | Path | None = None) -> "Runtime":
        """The knobs in force, with `auto` resolved; sets torch's number of threads.

        Args:
            folder: where runtime.yaml may stand; by default the repository that DVC runs for, which in a queued
                experiment is not the working directory.
        Raises:
            ValueError: an unknown knob, a value that is none of its words or a number too small, or a device that is
                not there.
        """
        folder = Path(folder or os.environ.get("DVC_ROOT", "."))
        names = [field.name for field in fields(cls) if field.name != "batch_size_given"]
        path = folder / "runtime.yaml"
        chosen = (YAML(typ="safe", pure=True).load(path) or {}) if path.is_file() else {}
        if not isinstance(chosen, dict) or chosen.keys() - set(names):
            raise ValueError(f"{path} holds {chosen!r}, expected a block with some of the keys {', '.join(names)}")
        places = dict.fromkeys(chosen, str(path))
        for name in names:
            variable = f"REGVIT_{name.upper()}"
            if os.environ.get(variable):
                chosen[name], places[name] = os.environ[variable], variable
        device = _device(str(chosen.pop("device", None) or "auto"))
        open_ones = [name for name, value in chosen.items() if value is None or (value == "auto" and name in AUTO)]
        values = {name: _value(name, chosen[name], places[name]) for name in chosen.keys() - open_ones}
        values.setdefault("workers", usable_cores() if torch.device(device).type == "cuda" else 0)
        given = "batch_size" in values
        values.setdefault("batch_size", usual_batch_size(device))
        runtime = cls(device=device, batch_size_given=given, **values)
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        return runtime


def _value(name: str, value: object, place: str) -> object:
    """A knob's value as what it is.

    Raises:
        ValueError: it is none; the message says where it stands.
    """
    where = f"{name} ({place})"
    if name in NUMBERS:
        return _whole_number(value, NUMBERS[name], where, name in AUTO)
    if name in WORDS:
        word = str(value).lower()
        if word not in WORDS[name]:
            known = (*WORDS[name], "auto") if name in AUTO else WORDS[name]
            raise ValueError(f"{where} is {value!r}, expected one of {', '.join(known)}")
        return word == "true" if name == "compile" else word
    return _share(value, where) if name == "gpus_per_worker" else str(value)


def _whole_number(value: object, minimum: int, where: str, auto: bool) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = None
    if number is None or number < minimum:
        raise ValueError(
            f"{where} is {value!r}, expected a whole number of at least {minimum}{', or auto' if auto else ''}"
        )
    return number


def _share(value: object, where: str) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:  # a worker computes on one device
        raise ValueError(f"{where} is {value!r}, expected a number above 0, at most 1")
    return number


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA device(s): say auto or cpu"
        )
    return name
