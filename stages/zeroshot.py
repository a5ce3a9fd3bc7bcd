"""zeroshot@<run>-<dataset>: CLIP's zero-shot accuracy with the run's image tower; metrics/zeroshot/<run>/<dataset>.json."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from regvit.data.batches import Batches
from regvit.data.manifest import Dataset, read_dataset
from regvit.files import write_json, write_table
from regvit.measures.zeroshot import (
    TEMPLATES,
    among_first,
    check_same_tower,
    class_embeddings,
    classify,
    names_of,
    open_text_tower,
)
from regvit.models.backbones import load_backbone, unplanted
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.run_files import read_run
from regvit.registers.runs import open_run
from regvit.stats.accuracy import accuracy, paired_accuracy_difference, top1_correct


def main(run_name: str, dataset_name: str) -> None:
    options, runtime = load_params()["zeroshot"], Runtime.load()
    run_file, backbones = Path(f"features/runs/{run_name}.json"), Path("data/backbones")
    run = read_run(run_file)
    clip = open_text_tower(options["text"][run["backbone"]])
    images = labelled(read_dataset(Path("data") / dataset_name))

    untreated = load_backbone(backbones / run["backbone"])
    intact = unplanted(backbones / run["backbone"]) if untreated.planted else untreated
    clip.model.to(runtime.device)
    clip.projection.to(runtime.device)
    intact.model.to(runtime.device)
    same = check_same_tower(clip, intact)
    names = names_of(images.classes)
    classes = class_embeddings(clip, names, TEMPLATES[options["templates"]], f"zeroshot {dataset_name} prompts")

    def correct(backbone, which: str) -> tuple[np.ndarray, np.ndarray]:
        """Top-1 and top-5, one value an image."""
        label = f"zeroshot {run_name}/{dataset_name} {which}"
        batches = Batches(
            images, backbone.transform, runtime.batch_size, runtime.workers, runtime.device, label.strip()
        )
        cosines = classify(backbone.model.to(runtime.device), clip.projection, batches, classes)
        return top1_correct(cosines, images.labels()), among_first(cosines, images.labels())

    top1, top5 = correct(open_run(run_file, backbones), "")
    metrics = {"n": len(images), "classes": len(names), "templates": options["templates"], "text": clip.label}
    metrics |= {"tower_cosine": None if same is None else round(same, 6)}
    metrics |= accuracy(top1).named("top1") | (accuracy(top5).named("top5") if len(names) > 5 else {})
    columns = {"top1": top1}
    if run["neurons"] is not None:  # registers were added, or neurons silenced: against the same backbone without
        columns["untreated_top1"], _ = correct(untreated, "untreated")
        difference = paired_accuracy_difference(top1, columns["untreated_top1"])
        metrics |= accuracy(columns["untreated_top1"]).named("untreated_top1")
        metrics |= difference.named("gain")
    metrics = {key: round(value, 6) if isinstance(value, float) else value for key, value in metrics.items()}

    folder = Path("metrics/zeroshot") / run_name / dataset_name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder.with_suffix(".json"), metrics)
    write_classes(folder / "classes.csv", names, images.labels(), columns)
    print(f"{run_name} on {dataset_name}: zero-shot top-1 {metrics['top1']:.3f}, n {len(images)}")


def labelled(dataset: Dataset) -> Dataset:
    """The test images that have a label."""
    rows = tuple(row for row in dataset.subset("test").rows if row.label)
    if not rows:
        sys.exit(f"zeroshot: data set {dataset.name} has no labelled test images; leave it out of zeroshot.datasets")
    return replace(dataset, rows=rows)


def write_classes(path: Path, names: list[str], labels: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    """Accuracy of every class that has images."""
    rows = []
    for i, name in enumerate(names):
        own = labels == i
        if own.any():
            rows.append([name, int(own.sum()), *(f"{values[own].mean():.6f}" for values in columns.values())])
    write_table(path, ["class", "n", *columns], rows)


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/zeroshot/{0}/{1}.json is not finished")
