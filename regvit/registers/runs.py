"""A run: a named backbone with a variant of registers, described by a small JSON file.

`run.json` holds all that decides a run's features besides the images, so that what has not changed is not computed
again: `{run, backbone, weights_sha256, transform, registers, num_registers, statistic, patches, scale, neurons}`. `neurons` is
`{layer: [neuron, …]}` for `test_time` and null otherwise.

A run may be a control (see `controls`): then `control` names it, `neurons` are the ones that it moves or silences, and
`neurons_seed` is the seed of a random draw. A run that is no control has neither key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from regvit.models.backbones import Backbone, load_backbone
from regvit.models.tokens import TokenLayout
from regvit.registers.controls import CONTROLS, ablate, control_neurons, mlp_widths
from regvit.registers.neurons import Neuron
from regvit.registers.test_time import add_test_time_registers

REGISTERS = ("none", "trained", "test_time")


def describe_run(
    name: str,
    backbone: Backbone,
    registers: str,
    num_registers: int,
    selected: dict[int, tuple[int, ...]],
    *,
    statistic: str = "per_neuron",
    patches: str = "zero",
    scale: float = 1.0,
    neurons: str = "selected",
    neurons_seed: int = 0,
    candidates: Iterable[Neuron] = (),
) -> dict:
    """The description that goes into `run.json`.

    Args:
        registers: `none`, `trained` (the backbone must have them) or `test_time`.
        num_registers: test-time registers to add, or trained registers expected.
        selected: the backbone's register neurons; used by `test_time` and by controls.
        neurons: which neurons the run takes: `selected`, or those of a control: `empty` (none), `random` and
            `same_activation` are moved into test-time registers, `ablated` are silenced without any.
        neurons_seed: of `random`.
        candidates: neurons with their scores, for `same_activation`.
    Raises:
        ValueError: the variant does not fit the backbone or the count.
    """
    if registers not in REGISTERS:
        raise ValueError(f"run {name}: registers is {registers!r}; expected one of {', '.join(REGISTERS)}")
    trained = TokenLayout.of(backbone.model).trained
    if registers == "trained" and trained != num_registers:
        raise ValueError(
            f"run {name}: num_registers is {num_registers}, but backbone {backbone.name} was trained with {trained}; "
            f"set num_registers: {trained}"
            + ("" if trained else ", or take a backbone with trained registers (…_reg4_…)")
        )
    if registers == "test_time" and num_registers < 1:
        raise ValueError(f"run {name}: test-time registers need num_registers of 1 or more, got {num_registers}")
    if registers == "none" and num_registers:
        raise ValueError(f"run {name}: registers is none, so num_registers must be 0, got {num_registers}")
    _check_control(name, neurons, registers)
    control = None if neurons == "selected" else neurons
    moved = registers == "test_time"
    if control is not None:
        widths = mlp_widths(backbone.model, selected)
        selected = control_neurons(control, selected, widths, candidates, neurons_seed)
    taken = {str(layer): list(units) for layer, units in sorted(selected.items())}
    described = {
        "run": name,
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "transform": backbone.transform.to_dict(),
        "registers": registers,
        "num_registers": num_registers,
        "statistic": statistic if moved else None,
        "patches": patches if moved else None,
        "scale": scale if moved else None,
        "neurons": taken if moved or control else None,
    }
    if control is not None:  # without one nothing is added: the runs that there were keep their bytes
        described["control"] = control
        if control == "random":
            described["neurons_seed"] = neurons_seed
    return described


def _check_control(name: str, neurons: str, registers: str) -> None:
    if neurons not in ("selected", *CONTROLS):
        raise ValueError(f"run {name}: neurons is {neurons!r}; expected one of selected, {', '.join(CONTROLS)}")
    fitting = {"selected": registers, "ablated": "none"}.get(neurons, "test_time")
    if registers != fitting:
        raise ValueError(
            f"run {name}: neurons is {neurons!r}, which needs registers: {fitting}, but registers is {registers!r}"
        )


def read_run(path: Path) -> dict:
    """The description of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not such a description, or a key is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the compose stage of this run, or mend its name")
    try:
        run = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no run.json: {error}; run the compose stage of this run") from error
    if not isinstance(run, dict):
        raise ValueError(f"{path} is no run.json, but holds a {type(run).__name__}; run the compose stage of this run")
    missing = {"run", "backbone", "weights_sha256", "registers", "num_registers", "neurons"} - run.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; run the compose stage again")
    return run


def open_run(path: Path, backbones: Path) -> Backbone:
    """The backbone of a run, with its test-time registers in place or its ablated neurons silenced.

    Args:
        path: the run's `run.json`.
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
