"""zeroshot_segment@<run>-<dataset>: classes of pixels, or objects, by the names of classes; metrics/runs/<run>/zeroshot_segment/<dataset>/."""

from pathlib import Path

import numpy as np
import open_clip

from regvit.data.batches import Batches
from regvit.data.decoding import read_rgb
from regvit.data.dense_labels import zero_is_ignored
from regvit.data.manifest import read_dataset
from regvit.features.dense_set import images_having
from regvit.measures.dense.segmentation import pixel_table, read_classes
from regvit.measures.tables import write_results
from regvit.measures.training_free import zeroshot_segmentation
from regvit.measures.training_free.pictures import draw_masks
from regvit.measures.zeroshot import TEMPLATES, class_embeddings, names_of, open_towers
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.run_files import read_run
from regvit.registers.runs import open_run
from regvit.stats.figures import write_csv

PICTURES = 8


def main(run_name: str, name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    knobs, device, data = params.zeroshot_segment, runtime.device, Path("data") / name
    run_file, backbones = Path(f"features/runs/{run_name}.json"), Path("data/backbones")
    run = read_run(run_file)
    clip, _, _ = open_towers(params.zeroshot.text[run["backbone"]], backbones / run["backbone"], device)
    images, templates = images_having(read_dataset(data), ["test"], "mask"), TEMPLATES[params.zeroshot.templates]
    backbone = open_run(run_file, backbones)
    backbone.model.to(device)
    transform = backbone.transform.whole()
    batches = Batches(
        images, transform, runtime.batch_size, runtime.workers, device, f"zeroshot_segment {run_name}/{name}"
    )

    def mask(row: int) -> np.ndarray:
        return read_classes(images.root / images.rows[row].mask, len(images.classes) + 1, zero_is_ignored(data))

    if name in knobs.objects:
        texts = class_embeddings(clip, open_clip.IMAGENET_CLASSNAMES, templates)
        found = zeroshot_segmentation.segment_objects(backbone.model, clip.projection, batches, texts, mask)
    else:
        names = zeroshot_segmentation.Names.of(names_of(images.classes), knobs.background.get(name, ()))
        told = zeroshot_segmentation.Texts(
            class_embeddings(clip, names.names, templates), names, knobs.scale, knobs.threshold
        )
        found = zeroshot_segmentation.segment_classes(backbone.model, clip.projection, batches, told, knobs.foils, mask)
    ids, out = list(images.rows.column("image_id")), Path("metrics/runs") / run_name / "zeroshot_segment" / name
    written = zeroshot_segmentation.figures(found, params.seed)
    write_results(out, run_name, name, written, ids, zeroshot_segmentation.image_columns(found))
    first = next(iter(found.counts.values()))
    write_csv(out / "pixels.csv", pixel_table(first, ("background", *images.classes), ids))
    shown = range(min(PICTURES, len(ids)))
    draw_masks(
        out / "masks.png",
        [read_rgb(images.image_path(i)) for i in shown],
        [mask(i) for i in shown],
        found.first_masks[:PICTURES],
    )
    print(f"{run_name} on {name}: " + ", ".join(f"{one.metric} {one.value}" for one in written) + f"; {clip.label}")


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/zeroshot_segment/{1} is not finished")
