"""compose@<run>: a backbone, its register neurons and a variant make a run; features/<run>/run.json."""

import json
import sys
from pathlib import Path

from params import load_params
from regvit.backbones import load_backbone
from regvit.neurons import read_selected
from regvit.runs import describe_run


def main(name: str) -> None:
    params = load_params()
    run = params["runs"][name]
    backbone = load_backbone(Path("data/backbones") / run["backbone"])
    _, selected = read_selected(Path(f"features/neurons/{run['backbone']}.json").read_text())
    described = describe_run(name, backbone, run["registers"], run["num_registers"], selected, **params["register"])
    out = Path("features") / name / "run.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(described, indent=1) + "\n")
    moved = sum(len(units) for units in selected.values()) if run["registers"] == "test_time" else 0
    print(f"run {name}: {run['backbone']}, {run['num_registers']} {run['registers']} registers, {moved} neurons moved")


if __name__ == "__main__":
    main(*sys.argv[1:])
