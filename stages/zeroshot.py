"""zeroshot@<run>-<dataset>: CLIP's zero-shot accuracy with the run's image tower; metrics/runs/<run>/zeroshot/<dataset>/."""

from pathlib import Path

from regvit.data.batches import Batches
from regvit.data.manifest import read_dataset
from regvit.features.dense_set import images_having
from regvit.measures import zeroshot
from regvit.measures.tables import write_results
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.run_files import changes_backbone, read_run
from regvit.registers.runs import open_run
from regvit.stats.figures import write_csv


def main(run_name: str, name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    run_file, backbones = Path(f"features/runs/{run_name}.json"), Path("data/backbones")
    run, device = read_run(run_file), runtime.device
    text = params.zeroshot.text[run["backbone"]]
    clip, untreated, cosine = zeroshot.open_towers(text, backbones / run["backbone"], device)
    images = images_having(read_dataset(Path("data") / name), ["test"], "label")
    names = zeroshot.names_of(images.classes)
    classes = zeroshot.class_embeddings(
        clip, names, zeroshot.TEMPLATES[params.zeroshot.templates], f"zeroshot {name} prompts"
    )

    models = {"": open_run(run_file, backbones)}
    if changes_backbone(run):  # against the same backbone as it is
        models["untreated_"] = untreated
    columns = {}
    for prefix, backbone in models.items():
        label = f"zeroshot {run_name}/{name} {prefix}"
        batches = Batches(images, backbone.transform, runtime.batch_size, runtime.workers, device, label)
        cosines = zeroshot.classify(backbone.model.to(device), clip.projection, batches, classes)
        columns |= {f"{prefix}{metric}": values for metric, values in zeroshot.hits(cosines, images.labels()).items()}
    out, found = Path("metrics/runs") / run_name / "zeroshot" / name, zeroshot.figures(columns, cosine)
    write_results(
        out, run_name, name, found, images.rows.column("image_id"), {k: v.astype(int) for k, v in columns.items()}
    )
    write_csv(out / "classes.csv", zeroshot.class_table(names, images.labels(), columns))
    print(f"{run_name} on {name}: " + ", ".join(f"{one.metric} {one.value}" for one in found) + f"; {clip.label}")


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/zeroshot/{1} is not finished")
