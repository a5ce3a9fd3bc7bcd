"""attention@<run>-<dataset>: attention of CLS and registers by block and head; metrics/attention/<run>/<dataset>.json, tables, maps."""

from pathlib import Path

import torch

from regvit.data.batches import Batches, sample
from regvit.data.manifest import Dataset, read_dataset
from regvit.files import write_json
from regvit.measures.anatomy import Subject, open_subject
from regvit.measures.attention_quality import later_blocks, measure_attention, object_shares, summary, write_tables
from regvit.measures.gallery import as_picture, attention_maps, draw_attention, first_images
from regvit.models.tokens import TokenLayout
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime

PICTURES = 4


def main(run: str, dataset: str) -> None:
    params, runtime = load_params(), Runtime.load()
    knobs, out = params["attention"], Path("metrics/attention") / run / dataset
    torch.set_float32_matmul_precision("medium")  # half of the time; weights differ by some 1e-4 of themselves
    run_file = Path(f"features/runs/{run}.json")
    subject = open_subject(run_file, Path("data/backbones"), knobs["img_size"], runtime.device)
    images = sample(read_dataset(Path("data") / dataset), "test", knobs["images"], params["seed"])
    later = later_blocks(len(subject.run.model.blocks), knobs["first_layer"])
    measured = None
    if TokenLayout.of(subject.run.model).prefix:
        label = f"attention {run}/{dataset}"
        batches = Batches(images, subject.run.transform, runtime.batch_size, runtime.workers, runtime.device, label)
        objects = object_shares(images, subject.run.transform, subject.patch_size)
        measured = measure_attention(subject, batches, later, objects)
    write_tables(out, measured and measured.run, images.rows.column("image_id"), params["seed"])
    draw(out / "maps.png", subject, images, later, runtime.device)
    metrics = {"why": "the model has neither CLS nor registers whose attention could be measured"}
    if measured:
        metrics = summary(measured, params["seed"])
    write_json(out.with_suffix(".json"), metrics)
    heads = metrics.get("heads", {})
    shown = ("entropy", "morans_i", "on_outliers", "on_registers", "object_auroc")
    print(f"{run}/{dataset}: " + (", ".join(f"{name} {heads[name]}" for name in shown) if heads else metrics["why"]))


def draw(path: Path, subject: Subject, images: Dataset, later: list[int], device: str) -> None:
    """The first images with the attention maps of CLS, before and after, and of each of the run's registers."""
    transform = subject.run.transform
    pixels = first_images(images, transform, PICTURES)
    normalised = transform.normalise(pixels.to(device))
    columns = {}
    if subject.treated:
        before = attention_maps(subject.untreated.model, normalised, later)
        columns = {f"{name}\nuntreated": maps for name, maps in before.items() if name.startswith("cls")}
    columns |= attention_maps(subject.run.model, normalised, later)
    draw_attention(path, as_picture(pixels), columns)


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/attention/{0}/{1}.json is not finished")
