"""Where and how fast to compute: knobs that change no result, so that DVC does not track them.

Read from the environment (REGVIT_DEVICE, REGVIT_BATCH_SIZE, REGVIT_WORKERS, REGVIT_THREADS), else from the git-ignored
runtime.yaml beside dvc.yaml (device, batch_size, workers, threads), else the defaults: a GPU where there is one.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from ruamel.yaml import YAML

MINIMUM = {"batch_size": 1, "workers": 0, "threads": 1}


@dataclass(frozen=True)
class Runtime:
    """device: `cpu`, `cuda`, `cuda:1`, … or `auto`; batch_size in images; workers: decoding processes, 0 for none;
    threads: of torch on the CPU, None for torch's own choice."""

    device: str = "auto"
    batch_size: int = 32
    workers: int = 0
    threads: int | None = None

    @classmethod
    def load(cls, folder: str | Path | None = None) -> "Runtime":
        """The knobs in force, with `auto` resolved; sets torch's number of threads.

        Args:
            folder: where runtime.yaml may stand; by default the repository that DVC runs for, which in a queued
                experiment is not the working directory.
        Raises:
            ValueError: an unknown knob, a number that is none or too small, or a device that is not there.
        """
        folder = Path(folder or os.environ.get("DVC_ROOT", "."))
        names = [field.name for field in fields(cls)]
        path = folder / "runtime.yaml"
        chosen = (YAML(typ="safe", pure=True).load(path) or {}) if path.is_file() else {}
        if not isinstance(chosen, dict) or chosen.keys() - set(names):
            raise ValueError(f"{path} holds {chosen!r}, expected a block with some of the keys {', '.join(names)}")
        places = dict.fromkeys(chosen, str(path))
        for name in names:
            variable = f"REGVIT_{name.upper()}"
            if os.environ.get(variable):
                chosen[name], places[name] = os.environ[variable], variable
        for name, minimum in MINIMUM.items():
            if chosen.get(name) is not None:
                chosen[name] = _whole_number(chosen[name], minimum, f"{name} ({places[name]})")
            else:
                chosen.pop(name, None)
        runtime = cls(**chosen | {"device": _device(str(chosen.get("device", "auto")))})
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        return runtime


def _whole_number(value: object, minimum: int, where: str) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = None
    if number is None or number < minimum:
        raise ValueError(f"{where} is {value!r}, expected a whole number of at least {minimum}")
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
