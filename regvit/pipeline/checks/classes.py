"""Do the classes of the data sets meet, as their roles say? Looked at right after `download`, before anything is computed."""

import json
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

from regvit.pipeline.schema import Params


def downloaded(params: Params) -> bool:
    """Whether every data set lies in data/ as params.yaml now wants it, by what DVC recorded of its download."""
    if not Path("dvc.lock").is_file():
        return False
    recorded = YAML(typ="safe").load(Path("dvc.lock"))["stages"]
    for name, entry in params.datasets.items():
        made = recorded.get(f"download@{name}", {}).get("params", {}).get("params.yaml", {})
        wanted = {f"datasets.{name}": entry.model_dump(exclude_unset=True, mode="json"), "seed": params.seed}
        if made != wanted or not Path(f"data/{name}/dataset.json").is_file():
            return False
    return True


def unmet_classes(params: Params) -> Iterator[str]:
    """One sentence for each data set whose classes do not fit its role."""
    classes = {
        name: json.loads(Path(f"data/{name}/dataset.json").read_text(encoding="utf-8"))["classes"]
        for name in params.datasets
    }
    home, known = params.in_distribution, set(classes[params.in_distribution])
    if len(known) < 2:
        yield f"datasets.{home} has {len(known)} class(es), expected two or more to tell apart: name another folder of classes"
    for name, entry in params.datasets.items():
        strange = [label for label in classes[name] if label not in known]
        if entry.role == "ood" and strange:
            shown = ", ".join(map(repr, strange[:5])) + (", …" if len(strange) > 5 else "")
            yield (
                f"datasets.{name} has the role ood, but {len(strange)} of its {len(classes[name])} classes are none of {home} "
                f"({shown}): rename or take classes (classes:), make it role: anomaly, or take the set out"
            )
        elif entry.role == "ood" and len(classes[name]) < 2:
            yield (
                f"datasets.{name} has a single class; only the classes that a set has may be predicted there, so every image "
                "would be right: add classes, or make it role: anomaly"
            )
        if entry.role == "anomaly" and classes[name] and not strange:
            yield f"datasets.{name} has the role anomaly, but all its classes are of {home}: make it role: ood, or take it out"
