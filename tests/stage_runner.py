"""A stage's script run in this process, with parameters that a test gives."""

import runpy
import sys
from pathlib import Path

import pytest

from regvit.pipeline import params
from regvit.pipeline.schema import Params

STAGES = Path(__file__).parents[1] / "stages"


def run_stage(folder: Path, given: Params, stage: str, *names: str) -> None:
    """As `python stages/<stage>.py <names>` in `folder`, but without the seconds that importing torch takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        patch.setenv("REGVIT_DEVICE", "cpu")
        patch.setattr(params, "load_params", lambda: given)
        patch.setattr(sys, "argv", [f"{stage}.py", *names])
        runpy.run_path(str(STAGES / f"{stage}.py"), run_name="__main__")
