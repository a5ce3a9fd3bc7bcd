"""attention@<run>-<dataset>: attention of CLS and registers by block and head; metrics/runs/<run>/attention/<dataset>/."""

from pathlib import Path

from regvit.features.dense_set import DenseSet
from regvit.measures.attention_quality import (
    attention_maps,
    figures,
    image_columns,
    later_blocks,
    measure_attention,
    write_tables,
)
from regvit.measures.gallery import draw_attention
from regvit.measures.tables import write_results
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime

PICTURES = 4


def main(run: str, name: str) -> None:
    params, out = load_params(), Path("metrics/runs") / run / "attention" / name
    store = Path("features/dense") / run / f"{name}.zarr"
    dense = DenseSet.open(Path("data") / name, store, Runtime.load().device)
    rows, seed = dense.rows("test"), params.seed
    if not dense.layout.prefix:
        write_results(out, run, name, [], [], {})
        print(f"{run}/{name}: the model has neither CLS nor registers whose attention could be measured")
        return
    later = later_blocks(dense.store.arrays["attention"][0], params.attention.first_layer)
    quality = measure_attention(dense, rows, later)
    found = figures(quality, seed)
    write_results(out, run, name, found, dense.image_ids(rows), image_columns(quality))
    write_tables(out, quality)
    shown = rows[:PICTURES]
    draw_attention(out / "maps.png", dense.pictures(shown), attention_maps(dense, shown, later))
    values = {one.metric: one.value for one in found}
    shown = ("entropy", "morans_i", "on_outliers", "on_registers", "object_auroc")
    print(f"{run}/{name}: " + ", ".join(f"{metric} {values[metric]}" for metric in shown))


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/attention/{1} is not finished")
