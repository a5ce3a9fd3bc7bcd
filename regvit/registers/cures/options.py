"""Which cures there are, what each needs and may be told, and what it does to an image without outliers; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

EXACT, ROUNDING, CHANGED = 0.0, 1e-5, None


@dataclass(frozen=True)
class Cure:
    """One cure.

    Args:
        needs: `detection` (outliers are told by layer and threshold), `neurons` (found by a search), `registers` (trained or
            test-time ones in the model), `images` (to calibrate on), as many as apply.
        without_outliers: how far the tokens of an image without outliers may move, as a share of the largest value; 0: not
            a bit; None: it changes every image.
        options: default of each option.
        choices: values of an option that is a word; the others are positive numbers.
    """

    needs: tuple[str, ...]
    without_outliers: float | None
    options: Mapping[str, object] = field(default_factory=dict)
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)


CURES: dict[str, Cure] = {
    "recursive": Cure(("detection", "neurons", "images"), CHANGED, {"rounds": 4}),
    "ablate": Cure(("neurons",), CHANGED),
    "mask_attention": Cure(("detection",), ROUNDING, {"queries": "all"}, {"queries": ("all", "cls")}),
    "interpolate": Cure(("detection",), EXACT, {"at": "detection"}, {"at": ("detection", "output")}),
    "interpolate_lof": Cure((), CHANGED, {"neighbours": 30, "fraction": 0.05}),
    "clip_norm": Cure(("detection",), EXACT),
    "remove_direction": Cure(
        ("detection", "images"),
        CHANGED,
        {"direction": "singular", "samples": 20_000},
        {"direction": ("singular", "outliers")},
    ),
    "average_views": Cure((), CHANGED, {"views": 10, "shift": 0.15}),
    "prefix_kv": Cure(("detection", "images"), CHANGED, {"tokens": 1}),
    "constant_registers": Cure(
        ("registers", "images"), CHANGED, {"content": "mean"}, {"content": ("mean", "noise", "other")}
    ),
}
WHOLE = ("rounds", "neighbours", "samples", "views", "tokens")  # options that count something
SHARES = ("fraction", "shift")


def parse_cure(given: str | Mapping) -> tuple[str, dict[str, object]]:
    """The name of a cure, and all of its options.

    Args:
        given: a name, or `{name: …, option: value}`.
    Raises:
        ValueError: the cure, or one of its options, is unknown, or a value is out of range.
    """
    block = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = block.pop("name", None)
    if name not in CURES:
        near = get_close_matches(str(name), CURES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"cure is {given!r}; {hint}Expected one of {', '.join(CURES)}, or {{name: …, option: value}}")
    known = CURES[name]
    for option, value in block.items():
        if option not in known.options:
            there = f"it has {', '.join(known.options)}" if known.options else "it has none"
            raise ValueError(f"cure {name} has no option {option!r}: {there}")
        if option in known.choices:
            if value not in known.choices[option]:
                raise ValueError(f"{option} of cure {name} is {value!r}; expected {' or '.join(known.choices[option])}")
        elif not _in_range(option, value):
            what = "a whole number of 1 or more" if option in WHOLE else "a share over 0 and below 1"
            raise ValueError(f"{option} of cure {name} is {value!r}; expected {what}")
    return name, {**known.options, **block}


def misplaced(name: str, registers: str, neurons: str = "selected") -> str | None:
    """Why a run cannot have a cure beside its registers and neurons; None where it can.

    Args:
        registers: `none`, `trained` or `test_time`.
        neurons: `selected`, `file:<path>`, or a control.
    """
    if neurons != "selected" and not neurons.startswith("file:"):
        return f"cure {name} and neurons {neurons} exclude each other; leave one out"
    if "registers" in CURES[name].needs and registers == "none":
        return f"cure {name} needs registers: trained or test_time, not none"
    if "neurons" in CURES[name].needs and registers == "test_time":
        return f"cure {name} treats the neurons that test-time registers hold; set registers: none"
    return None


def _in_range(option: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 1 and value == int(value) if option in WHOLE else 0 < value < 1
