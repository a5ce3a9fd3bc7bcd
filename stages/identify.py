"""identify@<backbone>: finds the register neurons; features/neurons/<backbone>.json and what the search saw."""

from pathlib import Path

from regvit.data.batches import Batches, sample
from regvit.data.manifest import read_dataset
from regvit.files import write_json, write_table, write_text
from regvit.measures.identification import norms_under_treatments, sentence, summary, tables
from regvit.models.backbones import load_backbone
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.neurons import find_register_neurons


def main(name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    options, seed = params.identify.model_dump(), params.seed
    backbone = load_backbone(Path("data/backbones") / name)
    backbone.model.to(runtime.device)
    images = sample(read_dataset(Path("data") / params["in_distribution"]), "train", options.pop("images"), seed)
    batches = Batches(
        images, backbone.transform, runtime.batch_size, runtime.workers, runtime.device, f"identify {name}"
    )
    found = find_register_neurons(backbone.model, batches, **options)
    treated = norms_under_treatments(backbone.model, batches, found, seed)

    about = {"backbone": name, "weights_sha256": backbone.weights_sha256, "images": len(images), "seed": seed}
    neurons, folder = Path(f"features/neurons/{name}.json"), Path("metrics/identify") / name
    neurons.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(neurons, found.to_json(**about))
    metrics = {"images": len(images), **summary(found, treated, backbone.planted, seed)}
    write_json(folder.with_suffix(".json"), metrics)
    for table, (header, *rows) in vars(tables(found, treated, backbone.planted)).items():
        write_table(folder / f"{table}.csv", header, rows)
    print(sentence(name, found, metrics))


if __name__ == "__main__":
    command(main, "backbone", interrupted="features/neurons/{0}.json is not finished")
