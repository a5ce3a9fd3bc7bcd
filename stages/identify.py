"""identify@<backbone>: finds the register neurons; features/neurons/<backbone>.json and what the search saw."""

import csv
import json
import sys
from pathlib import Path

from params import load_params
from regvit.backbones import load_backbone
from regvit.batches import Batches, sample
from regvit.identification import norms_under_treatments, sentence, summary, tables
from regvit.manifest import read_dataset
from regvit.neurons import find_register_neurons
from runtime import Runtime


def main(name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    options, seed = dict(params["identify"]), params["seed"]
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
    neurons.write_text(found.to_json(**about))
    metrics = {"images": len(images), **summary(found, treated, backbone.planted, seed)}
    folder.with_suffix(".json").write_text(json.dumps(metrics, indent=1) + "\n")
    for table, rows in vars(tables(found, treated, backbone.planted)).items():
        with open(folder / f"{table}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    print(sentence(name, found, metrics))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        print(
            f"identify: interrupted; features/neurons/{sys.argv[1]}.json is not finished: run the same again",
            file=sys.stderr,
        )
        sys.exit(130)  # 128 + SIGINT, as shells do
