"""tokens@<run>-<dataset>: where outliers sit and what single tokens know; metrics/tokens/<run>/<dataset>.json, tables, picture."""

from pathlib import Path

import torch

from regvit.data.batches import Batches, sample
from regvit.data.manifest import read_dataset
from regvit.files import cell, write_json, write_table
from regvit.measures.anatomy import (
    Subject,
    dissect,
    draw_anatomy,
    looks,
    norm_table,
    open_subject,
    position_table,
    summary,
)
from regvit.measures.token_probes import (
    class_from_token,
    class_summary,
    fit_patch_probes,
    patch_means,
    patch_summary,
    read_patches,
)
from regvit.models.tokens import TokenLayout
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime


def main(run: str, dataset: str) -> None:
    params, runtime = load_params(), Runtime.load()
    torch.set_float32_matmul_precision("medium")  # half of the time; tokens differ by some 1e-4 of themselves
    out = Path("metrics/tokens") / run / dataset
    out.mkdir(parents=True, exist_ok=True)
    metrics = patches(run, dataset, out, params, runtime) | {"class": classes(run, params, runtime)}
    write_json(out.with_suffix(".json"), metrics)
    for what, name in (("position", "top1"), ("pixels", "l2"), ("class", "top1")):
        print(f"{run}/{dataset}: {what} {name}, normal {metrics[what]['normal'][name]}, "
              f"outlier {metrics[what]['outlier'][name]}")  # fmt: skip


def patches(run: str, dataset: str, out: Path, params: dict, runtime: Runtime) -> dict:
    """Anatomy of the outliers in the data set's test images, and position and pixels read from single tokens."""
    subject = open_run_beside(run, params["tokens"]["img_size"], runtime)
    layout, errors = TokenLayout.of(subject.run.model), []
    learned = batches(subject, dataset, "train", params["tokens"]["images"], params["seed"], runtime)
    probes = fit_patch_probes(layout, looks(subject, learned))
    tested = batches(subject, dataset, "test", params["tokens"]["images"], params["seed"], runtime)
    anatomy = dissect(subject, tested, lambda look: errors.append(read_patches(probes, layout, look)))
    for name, rows in (("norms", norm_table(anatomy, subject.detection)), ("positions", position_table(anatomy))):
        write_table(out / f"{name}.csv", list(rows[0]), [row.values() for row in rows])
    of_images = patch_means(errors)
    rows = [
        [row.image_id, *map(cell, values)]
        for row, *values in zip(tested.dataset.rows, *of_images.values(), strict=True)
    ]
    write_table(out / "images.csv", ["image_id", *of_images], rows)
    draw_anatomy(out / "anatomy.png", anatomy, subject.detection, f"{run}: {dataset}")
    return {"anatomy": summary(anatomy, subject.detection, params["seed"]), **patch_summary(errors, params["seed"])}


def classes(run: str, params: dict, runtime: Runtime) -> dict:
    """Class of the image from one random token, on the ID set at the backbone's own size: scenes have no class."""
    subject = open_run_beside(run, None, runtime)
    count, seed = params["tokens"]["class_images"], params["seed"]
    learned, tested = (
        batches(subject, params["in_distribution"], split, count, seed, runtime) for split in ("train", "test")
    )
    layout = TokenLayout.of(subject.run.model)
    return class_summary(
        class_from_token(
            layout,
            looks(subject, learned),
            learned.dataset.labels(),
            looks(subject, tested),
            tested.dataset.labels(),
            seed,
        ),
        seed,
    )


def open_run_beside(run: str, img_size: int | None, runtime: Runtime) -> Subject:
    """The run beside its untreated backbone."""
    return open_subject(Path(f"features/runs/{run}.json"), Path("data/backbones"), img_size, runtime.device)


def batches(subject: Subject, dataset: str, split: str, count: int, seed: int, runtime: Runtime) -> Batches:
    """At most `count` images of a split, drawn by the seed."""
    images = sample(read_dataset(Path("data") / dataset), split, count, seed)
    label = f"{dataset} {split}"
    return Batches(images, subject.run.transform, runtime.batch_size, runtime.workers, runtime.device, label)


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/tokens/{0}/{1}.json is not finished")
