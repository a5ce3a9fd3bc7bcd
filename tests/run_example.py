"""A run's description as `compose` would leave it, of a backbone in a test's folder."""

import json
from pathlib import Path

from regvit.registers.neurons_file import NeuronsFile
from regvit.registers.run_files import Variant, describe_run


def write_run(
    path: Path, backbone: Path, variant: Variant, selected: dict[int, tuple[int, ...]], detection: dict | None = None
) -> dict:
    """Writes the description of the run that is named like the file; folders are made.

    Args:
        backbone: its folder.
        detection: `{"layer": …, "threshold": …}`.
    """
    info = json.loads((backbone / "backbone.json").read_text())
    described = describe_run(path.stem, info, variant, NeuronsFile(selected, detection))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described))
    return described
