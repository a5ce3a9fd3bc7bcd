"""discover_published@<run>-<dataset>: objects by LOST, DINO-seg and TokenCut exactly as published, CorLoc;
metrics/runs/<run>/discover_published/<dataset>/."""

from pathlib import Path

import numpy as np

from regvit.data.decoding import read_rgb
from regvit.data.manifest import SPLITS, read_dataset
from regvit.features.dense_set import images_having
from regvit.measures.tables import mean_figures, write_results
from regvit.measures.training_free.published_discovery import Published, discover_published
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.runs import open_run
from regvit.stats.boxes import HIT, best_iou, draw_boxes, true_boxes

PICTURES = 8


def main(run: str, name: str) -> None:
    params, out = load_params(), Path("metrics/runs") / run / "discover_published" / name
    how = Published(**params.discover_published.model_dump(exclude={"datasets"}))
    backbone = open_run(Path(f"features/runs/{run}.json"), Path("data/backbones"))
    backbone.model.to(Runtime.load().device)
    dataset = images_having(read_dataset(Path("data") / name), SPLITS, "boxes")
    boxes, truth = discover_published(backbone, dataset, how), true_boxes(dataset)
    hits = {f"corloc_{method}": (best_iou(own, truth) >= HIT).astype(float) for method, own in boxes.items()}
    found = mean_figures(hits, params.seed)
    write_results(out, run, name, found, list(dataset.rows.column("image_id")), hits)
    first = range(min(PICTURES, len(dataset)))
    drawn = np.stack([boxes["lost"], boxes["token_cut"]], axis=1)
    pictures = [read_rgb(dataset.image_path(i)) for i in first]
    draw_boxes(out / "boxes.png", pictures, [truth[i] for i in first], [drawn[i] for i in first])
    print(f"{run}/{name}: " + ", ".join(f"{one.metric} {one.value:.4f}" for one in found))


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/discover_published/{1} is not finished")
