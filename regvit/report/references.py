"""Which run each run is held against.

A run with a cure has as reference the first run that is the same but for the cure. One that does something else to its
backbone's tokens (registers, or a control's neurons) has the first run of the same backbone that does nothing. A run on a
backbone that was planted or trained here, and does nothing to it, has the first such run of the same backbone as it came.
Others have none, unless one is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping

AS_IT_CAME = {"plant": None, "train": None}  # of a backbone's entry


def references(
    runs: Mapping[str, Mapping], backbones: Mapping[str, Mapping], chosen: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Which run each run is held against; runs without a reference are left out.

    Args:
        runs: `{name: {backbone, registers, neurons?, cure?}}`, in their order.
        backbones: `{name: {…, plant?, train?}}`.
        chosen: reference by run, where it shall be another.
    Raises:
        ValueError: a chosen run does not exist, or a run is its own reference.
    """
    found = {}
    untouched = [name for name, run in runs.items() if _does_nothing(run)]
    for name, run in runs.items():
        backbone = backbones[run["backbone"]]
        as_it_came = {**backbone, **AS_IT_CAME}
        candidates = []
        if run.get("cure"):
            candidates = [other for other, each in runs.items() if {"cure": None} | each == {**run, "cure": None}]
        elif name not in untouched and not _trained_here(run, backbone):
            candidates = [other for other in untouched if runs[other]["backbone"] == run["backbone"]]
        elif AS_IT_CAME | backbone != as_it_came:
            candidates = [other for other in untouched if AS_IT_CAME | backbones[runs[other]["backbone"]] == as_it_came]
        if candidates:
            found[name] = candidates[0]
    for name, other in (chosen or {}).items():
        if strange := [each for each in (name, other) if each not in runs]:
            raise ValueError(f"compare.references names the run {strange[0]!r}; there are {', '.join(runs)}")
        if name == other:
            raise ValueError(f"compare.references holds the run {name!r} against itself; name another")
        found[name] = other
    return {name: found[name] for name in runs if name in found}


def _trained_here(run: Mapping, backbone: Mapping) -> bool:
    """Whether the run's registers, if any, are those that its backbone was trained with here."""
    return run["registers"] == "trained" and backbone.get("train") is not None


def _does_nothing(run: Mapping) -> bool:
    return run["registers"] == "none" and (run.get("neurons") or "selected") == "selected" and not run.get("cure")
