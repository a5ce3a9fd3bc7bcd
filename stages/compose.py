"""compose@<run>: a backbone, its register neurons, a variant and a cure make a run; features/runs/<run>.json."""

from pathlib import Path

from regvit.files import write_json
from regvit.models.backbone_file import read_description
from regvit.pipeline.command import command
from regvit.pipeline.params import entry_of, load_params
from regvit.registers.neurons_file import Overlap, read_neurons
from regvit.registers.run_files import Variant, describe_run, measures_images


def main(name: str) -> None:
    params = load_params()
    run = entry_of(params, "runs", name)
    backbone = read_description(Path("data/backbones") / run.backbone)
    searched = read_neurons(Path(f"features/neurons/{run.backbone}.json").read_text(encoding="utf-8"))
    variant = Variant(**run.model_dump(exclude={"backbone"}), **params.register.model_dump())
    described = describe_run(name, backbone, variant, searched, params.seed)
    if measures_images(described):
        from regvit.pipeline.cure_images import measure_cure  # why here: torch takes seconds, and few runs need it

        described["cure"]["measured"] = measure_cure(described)
    out = Path(f"features/runs/{name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, described)
    taken = sum(len(units) for units in (described["neurons"] or {}).values())
    kind, done = described.get("control", ""), "silenced" if run.neurons == "ablated" else "moved"
    registers = f"{run.num_registers} {run.registers} registers"
    cure = f", cure {described['cure']['name']}" if "cure" in described else ""
    print(f"run {name}: {run.backbone}, {registers}, {taken} {kind + ' ' if kind else ''}neurons {done}{cure}")
    if "table" in described:
        overlap = Overlap.of(described["neurons"], searched)
        print(f"  {described['table']['name']}: {overlap.sentence(searched.ranks)}")


if __name__ == "__main__":
    command(main, "run", interrupted="features/runs/{0}.json is not finished")
