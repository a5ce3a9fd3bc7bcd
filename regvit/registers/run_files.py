"""A run: a named backbone with a variant of registers, described by a small JSON file; written and read without torch.

`features/runs/<run>.json` holds all that decides a run's features besides the images, and which patches are outliers in
the untreated model: `{run, backbone, weights_sha256, transform, registers, num_registers, statistic, patches, scale,
neurons, detection}`. `neurons` is `{layer: [neuron, …]}` for `test_time` and null otherwise, `detection` is
`{layer, threshold}`, null where the backbone has no outliers.

A run may take its neurons from a file: then `table` is `{name, sha256}` of it. It may be a control (see `controls`): then
`control` names it, `neurons` are the ones that it moves or silences, and `neurons_seed` is the seed of a random draw.

A run may have a cure beside its registers (see `cures`): then `cure` is `{name, options, neurons, seed, measured}`, `neurons`
those of the search where the cure needs them, `measured` what it measured on images of the ID train split.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regvit.registers.control_neurons import CONTROLS, control_neurons
from regvit.registers.cures.options import CURES, misplaced, parse_cure
from regvit.registers.neurons_file import NeuronsFile, read_table, table_path

REGISTERS = ("none", "trained", "test_time")
REQUIRED = {"run", "backbone", "weights_sha256", "registers", "num_registers", "neurons", "detection"}


@dataclass(frozen=True)
class Variant:
    """What is done to a backbone.

    Attributes:
        registers: `none`, `trained` (the backbone must have them) or `test_time`.
        num_registers: test-time registers to add, or trained registers expected.
        neurons: which neurons the run takes: `selected`, `file:<path>` (see `neurons_file.read_table`), or those of a
            control: `empty` (none), `random` and `same_activation` are moved into test-time registers, `ablated` are silenced
            without any.
        neurons_seed: of `random`.
        cure: what is done besides: a name, or `{name: …, option: value}`; see `regvit.registers.cures.options`.
        statistic, patches, scale: of `test_time`, see `regvit.registers.test_time`.
    """

    registers: str
    num_registers: int
    neurons: str = "selected"
    neurons_seed: int = 0
    cure: str | Mapping | None = None
    statistic: str = "per_neuron"
    patches: str = "zero"
    scale: float = 1.0

    @property
    def from_file(self) -> bool:
        """Whether the neurons are those of a file."""
        return self.neurons.startswith("file:")

    def check(self) -> None:
        """Raises ValueError where the parts do not fit each other."""
        if self.registers not in REGISTERS:
            raise ValueError(f"registers is {self.registers!r}; expected one of {', '.join(REGISTERS)}")
        if self.registers == "test_time" and self.num_registers < 1:
            raise ValueError(f"test-time registers need num_registers of 1 or more, got {self.num_registers}")
        if self.registers == "none" and self.num_registers:
            raise ValueError(f"registers is none, so num_registers must be 0, got {self.num_registers}")
        if self.neurons not in ("selected", *CONTROLS) and not self.from_file:
            raise ValueError(
                f"neurons is {self.neurons!r}; expected one of selected, {', '.join(CONTROLS)}, or file:<path>"
            )
        fitting = {"selected": self.registers, "ablated": "none"}.get(self.neurons, "test_time")
        if self.registers != fitting:
            raise ValueError(
                f"neurons is {self.neurons!r}, which needs registers: {fitting}, but registers is {self.registers!r}"
            )
        if self.cure is not None and (reason := misplaced(parse_cure(self.cure)[0], self.registers, self.neurons)):
            raise ValueError(reason)


def describe_run(name: str, backbone: Mapping, variant: Variant, searched: NeuronsFile, seed: int = 0) -> dict:
    """The description that goes into `features/runs/<run>.json`, a cure's without what it measures.

    Args:
        backbone: what `backbone.json` says.
        searched: neurons of the backbone; the selected are taken by `test_time`, by controls and by cures.
        seed: of what a cure draws.
    Raises:
        ValueError: the variant does not fit the backbone or the count.
    """
    try:
        variant.check()
        _check_trained(backbone, variant)
        widths = dict(enumerate(backbone["mlp_widths"]))
        taken, control = searched.selected, None if variant.neurons == "selected" else variant.neurons
        if variant.from_file:
            taken, control = read_table(variant.neurons), None
            _check_places(taken, widths, backbone["name"])
        elif control is not None:
            taken = control_neurons(control, taken, widths, searched.candidates, variant.neurons_seed)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"run {name}: {error}") from error
    moved = variant.registers == "test_time"
    neurons = {str(layer): list(units) for layer, units in sorted(taken.items())}
    described = {
        "run": name,
        "backbone": backbone["name"],
        "weights_sha256": backbone["weights_sha256"],
        "transform": backbone["transform"],
        "registers": variant.registers,
        "num_registers": variant.num_registers,
        "statistic": variant.statistic if moved else None,
        "patches": variant.patches if moved else None,
        "scale": variant.scale if moved else None,
        "neurons": neurons if moved or control else None,
        "detection": searched.detection,
    }
    if variant.from_file:
        path = table_path(variant.neurons)
        described["table"] = {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if control is not None:
        described["control"] = control
        if control == "random":
            described["neurons_seed"] = variant.neurons_seed
    if variant.cure is not None:
        cure, options = parse_cure(variant.cure)
        taken = searched.selected if "neurons" in CURES[cure].needs else {}
        neurons = {str(layer): list(units) for layer, units in sorted(taken.items())}
        described["cure"] = {"name": cure, "options": options, "neurons": neurons, "seed": seed, "measured": {}}
    return described


def _check_places(neurons: Mapping[int, Sequence[int]], widths: Mapping[int, int], backbone: str) -> None:
    for layer, units in neurons.items():
        if layer not in widths or not 0 <= min(units) <= max(units) < widths[layer]:
            has = f"{widths[layer]} in that layer" if layer in widths else f"{len(widths)} layers"
            raise ValueError(
                f"the file names neuron {max(units)} of layer {layer}, but backbone {backbone} has {has}: "
                "it is a table of another model"
            )


def _check_trained(backbone: Mapping, variant: Variant) -> None:
    """A run on a backbone with trained registers says so, as they are never left out; test-time ones may come on top."""
    trained, wanted = backbone["trained_registers"], variant.num_registers
    if variant.registers == "trained" and trained != wanted:
        cure = f"set num_registers: {trained}" if trained else "take a backbone with trained registers (…_reg4_…)"
        raise ValueError(
            f"num_registers is {wanted}, but backbone {backbone['name']} was trained with {trained}; {cure}"
        )
    if variant.registers == "none" and trained:
        raise ValueError(
            f"registers is none, but backbone {backbone['name']} was trained with {trained}, which cannot be left out; "
            f"set registers: trained, num_registers: {trained}"
        )


def changes_backbone(run: Mapping) -> bool:
    """Whether a run does anything to its backbone, so that the untreated one is another model."""
    return run["neurons"] is not None or "cure" in run


def measures_images(run: Mapping) -> bool:
    """Whether a run's cure measures something on images before it can be opened; where there are no outliers, none does."""
    if "cure" not in run:
        return False
    needs = CURES[run["cure"]["name"]].needs
    lacking = ("detection" in needs and run["detection"] is None) or ("neurons" in needs and not run["cure"]["neurons"])
    return "images" in needs and not lacking


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
        raise ValueError(f"{path} describes no run: {error}; run the compose stage of this run") from error
    if not isinstance(run, dict):
        raise ValueError(
            f"{path} describes no run, but holds a {type(run).__name__}; run the compose stage of this run"
        )
    if missing := REQUIRED - run.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; run the compose stage again")
    return run
