"""compose@<run>: a backbone, its register neurons and a variant make a run; features/<run>/run.json.

Beside it extract.json, the same with the block `extract` of the parameters: all that extraction reads of a run. And
detection.json: which patches of the backbone count as outliers. It decides no feature, so it stands apart.
"""

from pathlib import Path

from regvit.files import write_json, write_text
from regvit.models.backbones import load_backbone
from regvit.pipeline.command import command, entry_of
from regvit.pipeline.params import load_params
from regvit.registers.controls import read_candidates
from regvit.registers.neurons import read_selected
from regvit.registers.outliers import write_detection
from regvit.registers.runs import describe_run


def main(name: str) -> None:
    params = load_params()
    run = entry_of(params, "runs", name)
    backbone = load_backbone(Path("data/backbones") / run["backbone"])
    found = Path(f"features/neurons/{run['backbone']}.json").read_text()
    detection, selected = read_selected(found)
    described = describe_run(
        name,
        backbone,
        run["registers"],
        run["num_registers"],
        selected,
        **params["register"],
        neurons=run.get("neurons", "selected"),
        neurons_seed=run.get("neurons_seed", 0),
        candidates=read_candidates(found),
    )
    out = Path("features") / name / "run.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, described)
    write_text(out.with_name("detection.json"), write_detection(detection))
    write_json(out.with_name("extract.json"), described | {"extract": params["extract"]})
    taken = sum(len(units) for units in (described["neurons"] or {}).values())
    kind, done = described.get("control", ""), "silenced" if described.get("control") == "ablated" else "moved"
    print(
        f"run {name}: {run['backbone']}, {run['num_registers']} {run['registers']} registers, "
        f"{taken} {kind + ' ' if kind else ''}neurons {done}"
    )


if __name__ == "__main__":
    command(main, "run", interrupted="features/{0}/run.json is not finished")
