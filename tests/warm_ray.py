"""Ray's workers as forks of a process that has imported torch and timm, which takes each of them longer than its work here."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from regvit.pipeline.warm_python import warm_python

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what every `ray.init` here, and in processes begun here, adds to its job


@contextmanager
def warm_ray() -> Iterator[None]:
    """Whatever joins Ray in the block, in this process or in one that it starts, has such workers."""
    with warm_python(("torch", "timm", "zarr", "pandas", "pyarrow")) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(JOB, json.dumps({"runtime_env": {"py_executable": str(folder / "python")}}))
        yield
