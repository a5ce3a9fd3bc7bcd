"""Opening a run: its backbone, treated as `features/runs/<run>.json` says (see `run_files`)."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from regvit.models.backbones import Backbone, load_backbone
from regvit.registers.controls import ablate
from regvit.registers.cures.cure import add_cure, measure
from regvit.registers.cures.given import Given, from_json, to_json
from regvit.registers.images import Batches
from regvit.registers.outliers import Detection
from regvit.registers.run_files import read_run
from regvit.registers.search import SearchOptions
from regvit.registers.test_time import add_test_time_registers


def open_run(path: Path, backbones: Path) -> Backbone:
    """The backbone of a run, with its test-time registers and its cure in place or its ablated neurons silenced.

    Args:
        path: the run's description, `features/runs/<run>.json`.
        backbones: folder that holds one folder a backbone.
    Raises:
        ValueError: the backbone is not the one that the run was composed of.
    """
    run = read_run(path)
    backbone = open_uncured(run, backbones)
    if "cure" in run:
        cure = run["cure"]
        with warnings.catch_warnings():  # that a backbone without outliers stays as it is, `compose` has said
            warnings.simplefilter("ignore")
            add_cure(backbone.model, {"name": cure["name"], **cure["options"]}, given_to(run))
    return backbone


def open_uncured(run: Mapping, backbones: Path) -> Backbone:
    """The backbone of a run's description, without its cure.

    Raises:
        ValueError: the backbone is not the one that the run was composed of.
    """
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


def measured_for(run: Mapping, backbone: Backbone, batches: Batches, options: SearchOptions) -> dict:
    """What a run's cure measures on images, as it stands in the run's file.

    Args:
        run: the description without it.
        backbone: from `open_uncured`, on the device of the images.
        options: of the search, for `recursive`.
    """
    cure = run["cure"]
    return to_json(measure(backbone.model, cure["name"], given_to(run, options), batches, **cure["options"]))


def given_to(run: Mapping, options: SearchOptions | None = None) -> Given:
    """What a run's cure is given besides the model."""
    cure = run["cure"]
    neurons = {int(layer): tuple(units) for layer, units in cure["neurons"].items()}
    return Given(detection_of(run), neurons, from_json(cure["measured"]), cure["seed"], options)


def detection_of(run: Mapping) -> Detection | None:
    """Which patches are outliers in the run's untreated model; None where it has none."""
    return run["detection"] and Detection(**run["detection"], separation=float("nan"))
