"""Where and how fast to compute: knobs that change no result, so that DVC does not track them.

Read from the environment (REGVIT_<KNOB>, in capitals), else from the git-ignored runtime.yaml beside dvc.yaml, else the
defaults. `auto` is a default's other name: here, on a GPU where there is one, with what suits it.

| knob | what | default |
|---|---|---|
| `device` | `cpu`, `cuda`, `cuda:1`, … | a GPU where there is one |
| `batch_size` | images a forward | 8 on a CPU, else 32; extraction on a GPU as many as its memory has room for |
| `workers` | decoding threads | with a GPU one for each usable core, else 0, which decodes in between |
| `threads` | of torch on the CPU | torch's own choice |
| `engine` | `local`, or `ray`: extraction on a cluster | `local` |
| `address` | of the Ray cluster | one that is started on this machine |
| `worker_device` | what the cluster's workers compute on: `cpu` or `cuda` | the kind of `device` |
| `gpus_per_worker`, `cpus_per_worker` | share of a GPU, cores | 1, Ray's choice |
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from regvit.pipeline.checks.faults import sentences


def _is_there(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError("expected auto, cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"expected auto or cpu, as torch sees {torch.cuda.device_count()} CUDA device(s)")
    return name


def _on_cpu(knobs: dict) -> bool:
    return knobs.get("device", "cpu").startswith("cpu")


def usable_cores() -> int:
    """CPU cores that this process may use (a container or `taskset` may leave it fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Runtime(BaseSettings):
    """The knobs, with `auto` resolved; None where the library chooses."""

    model_config = SettingsConfigDict(env_prefix="REGVIT_", env_ignore_empty=True, extra="forbid", frozen=True)

    device: Annotated[str, AfterValidator(_is_there)] = Field(
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu"
    )
    # On a CPU more images are slower: the hidden activations of a block outgrow 32 MiB, and what is larger glibc takes from
    # the system and gives back again each time (ViT-S/14, 224 px, two cores: 24 images/s with 8, 13 with 32).
    batch_size: PositiveInt = Field(default_factory=lambda knobs: 8 if _on_cpu(knobs) else 32)
    workers: NonNegativeInt = Field(default_factory=lambda knobs: 0 if _on_cpu(knobs) else usable_cores())
    threads: PositiveInt | None = None
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    worker_device: Literal["cpu", "cuda"] | None = None
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1.0  # a worker computes on one device
    cpus_per_worker: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: dict) -> dict:
        auto = [
            key for key, value in values.items() if value is None or (value == "auto" and key != "address")
        ]  # Ray's word
        return {key: value for key, value in values.items() if key not in auto}

    @property
    def batch_size_given(self) -> bool:
        """Whether a number of images was asked for."""
        return "batch_size" in self.model_fields_set

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings, env_settings, dotenv_settings, file_secret_settings
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment before runtime.yaml."""
        return env_settings, YamlConfigSettingsSource(settings_cls, runtime_file())

    @classmethod
    def load(cls) -> "Runtime":
        """The knobs in force; sets torch's number of threads.

        Raises:
            ValueError: an unknown knob, a value that is none of its kind, or a device that is not there.
        """
        try:
            runtime = cls()
        except ValidationError as error:
            raise ValueError(f"environment or {runtime_file()}: {'; '.join(sentences(error, cls))}") from error
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        return runtime


def runtime_file() -> Path:
    """runtime.yaml of the repository that DVC runs for, which in a queued experiment is not the working directory."""
    return Path(os.environ.get("DVC_ROOT", ".")) / "runtime.yaml"
