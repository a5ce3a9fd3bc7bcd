"""What the rooms above do not pay for."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import regvit.data.decoding", {"torch", "pandas"}),
        ("import regvit.data.transform", {"pandas", "timm"}),
        ("import regvit.data.manifest", {"torch", "timm"}),
        ("import regvit.data.sources", {"torch", "timm", "torchvision", "datasets", "sklearn", "scipy", "requests"}),
    ],
)
def test_what_is_imported_is_what_is_needed(statement, without):
    code = f"import sys; {statement}; print(*sorted({without!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
