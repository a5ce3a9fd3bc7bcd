"""correspond@<run>-<dataset>: patches found in another view by their nearest neighbour; metrics/runs/<run>/correspond/<dataset>/."""

from pathlib import Path

import numpy as np

from regvit.data.correspondences import read_pairs
from regvit.data.decoding import read_rgb
from regvit.features.dense_set import DenseSet
from regvit.measures.tables import write_results
from regvit.measures.training_free import correspondence
from regvit.measures.training_free.pictures import draw_matches
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.stats.figures import write_csv

PICTURES, LINES = 4, 12


def main(run: str, name: str) -> None:
    params, out, data = load_params(), Path("metrics/runs") / run / "correspond" / name, Path("data") / name
    dense = DenseSet.open(data, Path("features/dense") / run / f"{name}.zarr", Runtime.load().device)
    pairs = correspondence.known_pairs(dense, read_pairs(data))
    matched = correspondence.match_pairs(dense, pairs)
    counted, seed = correspondence.counts(matched, dense.side), params.seed
    rows = sorted({first for _, first, _ in pairs})
    told = dict(zip(rows, dense.outliers(rows), strict=True))
    outliers = np.stack([told[first] for _, first, _ in pairs])
    found = correspondence.figures(matched, counted, outliers, seed)
    ids = [pair.name for pair, *_ in pairs]
    write_results(out, run, name, found, ids, correspondence.image_columns(matched, counted, outliers))
    write_csv(out / "categories.csv", correspondence.category_table(matched))
    shown = sorted(range(len(pairs)), key=lambda i: -outliers[i][matched[i].patches].sum())[:PICTURES]
    chosen = [spread(outliers[i][matched[i].patches]) for i in shown]
    draw_matches(
        out / "matches.png",
        [tuple(read_rgb(dense.dataset.image_path(row)) for row in pairs[i][1:]) for i in shown],
        [
            np.hstack([matched[i].pair.points[some, :2], matched[i].found[some]])
            for i, some in zip(shown, chosen, strict=True)
        ],
        [matched[i].right[some] for i, some in zip(shown, chosen, strict=True)],
    )
    print(f"{run}/{name}: " + ", ".join(f"{one.metric} {one.value}" for one in found))


def spread(at_outlier: np.ndarray) -> np.ndarray:
    """Points that are drawn: half of them at outliers, if there are any, and others over the whole image."""
    chosen = []
    for places, count in ((np.flatnonzero(at_outlier), LINES // 2), (np.flatnonzero(~at_outlier), LINES)):
        picked = np.linspace(0, len(places) - 1, min(len(places), count - len(chosen))).astype(int)
        chosen += places[picked].tolist()
    return np.array(chosen, dtype=int)


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/correspond/{1} is not finished")
