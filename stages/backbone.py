"""backbone@<backbone>: a model from its source, with register neurons planted where asked; data/backbones/<backbone>/."""

import os
from pathlib import Path

import torch

from regvit.data.batches import Batches, sample
from regvit.data.manifest import read_dataset
from regvit.models.backbones import save_backbone
from regvit.models.sources import Built, build
from regvit.pipeline.command import command
from regvit.pipeline.params import entry_of, load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.planting import Planted, plant

IMAGES = 128  # of the ID train split that a planting recipe is fitted on


def main(name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    entry = entry_of(params, "backbones", name)
    cache = Path(os.environ.get("DVC_ROOT", ".")) / "work" / "packages"
    built = build(
        entry.source,
        entry.architecture,
        entry.img_size,
        transform=entry.transform and entry.transform.model_dump(exclude_none=True),
        positions=entry.positions,
        cache_dir=cache,
        progress=print,
    )
    planted, recipe = None, entry.plant and entry.plant.model_dump()
    if recipe:
        planted = plant_on_train(built, recipe, params, runtime)
        recipe = {"neurons": planted.neurons, **recipe, "images": IMAGES, "seed": params.seed}
    folder = Path("data/backbones") / name
    digest = save_backbone(
        folder,
        built.model,
        name=name,
        transform=built.transform,
        planted=recipe,
        replaced=planted and planted.replaced,
        **built.about,
    )
    print(f"backbone {name}: {built.about['architecture']} at {built.transform.size} px, weights {digest[:12]}…")
    if planted:
        print(f"  planted neurons {planted.neurons}, seeds fire on {planted.outlier_fraction:.2%} of the patches")


def plant_on_train(built: Built, recipe: dict, params: dict, runtime: Runtime) -> Planted:
    """Fits the recipe on images of the ID train split; on the CPU, so that the weights come out the same everywhere."""
    images = sample(read_dataset(Path("data") / params.in_distribution), "train", IMAGES, params.seed)
    batches = Batches(images, built.transform, runtime.batch_size, runtime.workers, label="reading images to plant on")
    return plant(built.model, torch.cat(list(batches)), seed=params.seed, **recipe)


if __name__ == "__main__":
    command(main, "backbone", interrupted="data/backbones/{0} is not finished")
