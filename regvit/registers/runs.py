"""Opening a run: its backbone, treated as `features/runs/<run>.json` says (see `run_files`)."""

from pathlib import Path

from regvit.models.backbones import Backbone, load_backbone
from regvit.registers.controls import ablate
from regvit.registers.outliers import Detection
from regvit.registers.run_files import read_run
from regvit.registers.test_time import add_test_time_registers


def open_run(path: Path, backbones: Path) -> Backbone:
    """The backbone of a run, with its test-time registers in place or its ablated neurons silenced.

    Args:
        path: the run's description, `features/runs/<run>.json`.
        backbones: folder that holds one folder a backbone.
    Raises:
        ValueError: the backbone is not the one that the run was composed of.
    """
    run = read_run(path)
    backbone = load_backbone(backbones / run["backbone"])
    if backbone.weights_sha256 != run["weights_sha256"]:
        raise ValueError(
            f"backbone {run['backbone']} has weights {backbone.weights_sha256[:12]}…, but run {run['run']} was composed "
            f"of {run['weights_sha256'][:12]}…; run the compose stage again"
        )
    if run["neurons"] is not None:
        neurons = {int(layer): units for layer, units in run["neurons"].items()}
        if run.get("control") == "ablated":
            ablate(backbone.model, neurons)
        else:
            add_test_time_registers(
                backbone.model,
                neurons,
                run["num_registers"],
                statistic=run["statistic"],
                patches=run["patches"],
                scale=run["scale"],
            )
    return backbone


def detection_of(run: dict) -> Detection | None:
    """Which patches are outliers in the run's untreated model; None where it has none."""
    return run["detection"] and Detection(**run["detection"], separation=float("nan"))
