"""attention@<run>-<dataset>: attention of CLS and registers by block and head; metrics/runs/<run>/attention/<dataset>/."""

from pathlib import Path

from regvit.features.dense_set import DenseSet
from regvit.measures import attention_quality
from regvit.measures.gallery import draw_attention, draw_heads
from regvit.measures.register_pairs import register_pairs
from regvit.measures.tables import write_results
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.stats.figures import write_csv

PICTURES = 4
BY_HEAD = 2  # images


def main(run: str, name: str) -> None:
    params, out = load_params(), Path("metrics/runs") / run / "attention" / name
    store = Path("features/dense") / run / f"{name}.zarr"
    dense = DenseSet.open(Path("data") / name, store, Runtime.load().device)
    rows, seed = dense.rows("test"), params.seed
    chosen = params.attention
    later = attention_quality.later_blocks(dense.store.arrays["all_queries"][0], chosen.first_layer, chosen.layers)
    quality = attention_quality.measure_attention(dense, rows, later, chosen.heads)
    found = attention_quality.figures(quality, seed)
    write_results(out, run, name, found, dense.image_ids(rows), attention_quality.image_columns(quality))
    attention_quality.write_tables(out, quality)
    if dense.layout.prefix:
        drawn = rows[:PICTURES]
        draw_attention(out / "maps.png", dense.pictures(drawn), attention_quality.attention_maps(dense, drawn, later))
        few = drawn[:BY_HEAD]
        draw_heads(out / "heads.png", dense.pictures(few), attention_quality.head_maps(dense, few))
    if dense.layout.num_registers > 1:
        write_csv(out / "registers.csv", register_pairs(dense, rows, later, chosen.heads))
    values = {one.metric: one.value for one in found}
    shown = (
        ("entropy", "morans_i", "on_outliers", "on_registers", "all_coherence")
        if dense.layout.prefix
        else ("all_coherence",)
    )
    print(f"{run}/{name}: " + ", ".join(f"{metric} {values[metric]}" for metric in shown))


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/attention/{1} is not finished")
