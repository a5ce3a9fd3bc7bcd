"""Which run each run is held against.

A run that does something to its backbone's tokens (registers, or a control's neurons) has as reference the first run of
the same backbone that does nothing; a run that does nothing to a planted backbone, the first such run of the same backbone
without planting. Others have none, unless one is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping


def references(
    runs: Mapping[str, Mapping], backbones: Mapping[str, Mapping], chosen: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Which run each run is held against; runs without a reference are left out.

    Args:
        runs: `{name: {backbone, registers, neurons?}}`, in their order.
        backbones: `{name: {…, plant?}}`.
        chosen: reference by run, where it shall be another.
    Raises:
        ValueError: a chosen run does not exist, or a run is its own reference.
    """
    found = {}
    untouched = [name for name, run in runs.items() if _does_nothing(run)]
    for name, run in runs.items():
        backbone = backbones[run["backbone"]]
        if name not in untouched:
            candidates = [other for other in untouched if runs[other]["backbone"] == run["backbone"]]
        elif backbone.get("plant") is not None:
            intact = {**backbone, "plant": None}
            candidates = [
                other for other in untouched if {"plant": None, **backbones[runs[other]["backbone"]]} == intact
            ]
        else:
            candidates = []
        if candidates:
            found[name] = candidates[0]
    for name, other in (chosen or {}).items():
        if strange := [each for each in (name, other) if each not in runs]:
            raise ValueError(f"compare.references names the run {strange[0]!r}; there are {', '.join(runs)}")
        if name == other:
            raise ValueError(f"compare.references holds the run {name!r} against itself; name another")
        found[name] = other
    return {name: found[name] for name in runs if name in found}


def _does_nothing(run: Mapping) -> bool:
    return run["registers"] == "none" and (run.get("neurons") or "selected") == "selected"
