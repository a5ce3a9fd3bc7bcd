"""What the rooms above do not pay for."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "timm", "torchvision", "datasets", "sklearn", "scipy", "requests"}


@pytest.mark.parametrize(
    "imports",  # one after another, with what none so far may have brought
    [
        {"decoding": {"torch", "pandas"}, "manifest": {"torch", "timm"}, "sources": HEAVY},
        {"transform": {"pandas", "timm"}},
    ],
)
def test_what_is_imported_is_what_is_needed(imports):
    code = "import sys\n" + "".join(
        f"import regvit.data.{module}\nprint(*sorted({without!r} & sys.modules.keys()), end='')\n"
        for module, without in imports.items()
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
