"""identify@<backbone>: finds the register neurons; features/neurons/<backbone>.json and metrics/backbones/<backbone>/."""

from pathlib import Path

from regvit.data.batches import Batches, sample
from regvit.data.manifest import read_dataset
from regvit.files import write_text
from regvit.measures import identification
from regvit.models.backbones import load_backbone
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.cures.recursive import find_recursively
from regvit.stats.figures import figures_table, write_csv, write_figures


def main(name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    options, seed = params.identify.model_dump(exclude={"images"}), params.seed
    backbone = load_backbone(Path("data/backbones") / name)
    backbone.model.to(runtime.device)
    images = sample(read_dataset(Path("data") / params.in_distribution), "train", params.identify.images, seed)
    batches = Batches(
        images, backbone.transform, runtime.batch_size, runtime.workers, runtime.device, f"identify {name}"
    )
    found = find_recursively(backbone.model, batches, **options)
    treated = identification.norms_under_treatments(backbone.model, batches, found, seed)

    about = {"backbone": name, "weights_sha256": backbone.weights_sha256, "images": len(images), "seed": seed}
    about |= {"rounds": params.identify.rounds} if params.identify.rounds > 1 else {}
    neurons, out = Path(f"features/neurons/{name}.json"), Path("metrics/backbones") / name
    neurons.parent.mkdir(parents=True, exist_ok=True)
    write_text(neurons, found.to_json(**about))
    shown = identification.figures(found, treated, backbone.planted, seed)
    write_figures(out / "figures.csv", figures_table(shown, name, params.in_distribution))
    write_csv(out / "norms.csv", identification.norm_table(found))
    write_csv(out / "histogram.csv", identification.histogram_table(found, treated))
    write_csv(out / "scores.csv", identification.score_table(found, backbone.planted))
    print(identification.sentence(name, found, shown))


if __name__ == "__main__":
    command(main, "backbone", interrupted="features/neurons/{0}.json is not finished")
