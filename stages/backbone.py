"""backbone@<backbone>: a model from its source, with register neurons planted or trained further where asked;
data/backbones/<backbone>/. A training that is broken off goes on from where it was: its state lies in work/."""

import os
import shutil
from pathlib import Path

import torch

from regvit.data.batches import Batches, sample
from regvit.data.manifest import read_dataset
from regvit.files import cell, write_table
from regvit.models.backbones import save_backbone
from regvit.models.sources import Built, build
from regvit.pipeline.command import command
from regvit.pipeline.params import entry_of, load_params
from regvit.pipeline.runtime import Runtime
from regvit.pipeline.schema import Params
from regvit.registers.planting import Planted, plant
from regvit.training.finetuning import Computing, Trained, finetune
from regvit.training.norms_by_step import CURVE_COLUMNS, NORM_COLUMNS, draw_training
from regvit.training.recipe import Recipe
from regvit.training.register_tokens import add_register_tokens

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
    trained, how, work = None, entry.train and entry.train.model_dump(), cache.parent / f"train-{name}.partial"
    if how:
        built, trained = train_on_train(built, Recipe(**how), params, runtime, work)
        how |= {"step": trained.step, "val_top1": trained.val_top1, "seed": params.seed}
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
        trained=how,
        **built.about,
    )
    if trained:
        for file, columns, rows in (("training", CURVE_COLUMNS, trained.curve), ("norms", NORM_COLUMNS, trained.norms)):
            write_table(folder / f"{file}.csv", columns, (map(cell, row) for row in rows))
        draw_training(folder / "training.png", name, trained.curve, trained.norms)
        shutil.rmtree(work, ignore_errors=True)
    print(f"backbone {name}: {built.about['architecture']} at {built.transform.size} px, weights {digest[:12]}…")
    if trained:
        print(
            f"  trained for {trained.step} steps (the best of {how['steps']}), validation top-1 {trained.val_top1:.3f}"
        )
    if planted:
        print(f"  planted neurons {planted.neurons}, seeds fire on {planted.outlier_fraction:.2%} of the patches")


def train_on_train(built: Built, recipe: Recipe, params: Params, runtime: Runtime, work: Path) -> tuple[Built, Trained]:
    """Adds registers and trains, as the recipe says, on images of the ID train split."""
    about = built.about
    model, args = add_register_tokens(
        built.model, about["architecture"], about["model_args"], recipe.registers, params.seed
    )
    dataset = read_dataset(Path("data") / params.in_distribution)
    computing = Computing(runtime.device, runtime.batch_size, runtime.workers)
    trained = finetune(model, dataset, built.transform, recipe, work, computing, params.seed)
    return Built(model, built.transform, {**about, "model_args": args}), trained


def plant_on_train(built: Built, recipe: dict, params: Params, runtime: Runtime) -> Planted:
    """Fits the recipe on images of the ID train split; on the CPU, so that the weights come out the same everywhere."""
    images = sample(read_dataset(Path("data") / params.in_distribution), "train", IMAGES, params.seed)
    batches = Batches(images, built.transform, runtime.batch_size, runtime.workers, label="reading images to plant on")
    return plant(built.model, torch.cat(list(batches)), seed=params.seed, **recipe)


if __name__ == "__main__":
    command(main, "backbone", interrupted="data/backbones/{0} is not finished")
