"""discover@<run>-<dataset>: objects found without labels (LOST), CorLoc; metrics/runs/<run>/discover/<dataset>/.

The setting (feature, layer, normalisation, bias) is chosen on images that are not in the test split, and CorLoc reported
on those that are. Nothing is trained here, so train and val images serve alike for choosing.
"""

from pathlib import Path

from regvit.data.decoding import read_rgb
from regvit.features.dense_set import DenseSet
from regvit.measures.dense import discovery
from regvit.measures.tables import write_results
from regvit.measures.training_free.token_cut import cut, cut_hits
from regvit.models.token_features import Feature
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.stats.accuracy import accuracy
from regvit.stats.boxes import draw_boxes, true_boxes
from regvit.stats.figures import Figure, write_csv

PICTURES = 8


def main(run: str, name: str) -> None:
    params = load_params()
    knobs, out = params.discover, Path("metrics/runs") / run / "discover" / name
    store = Path("features/dense") / run / f"{name}.zarr"
    dense = DenseSet.open(Path("data") / name, store, Runtime.load().device)
    learn, test = (dense.rows(*splits, having="boxes") for splits in (("train", "val"), ("test",)))
    features = discovery.kept_features(dense, knobs.features)
    tried = discovery.discover(
        dense, learn, discovery.settings(features, knobs.normalised, knobs.biases), knobs.k_patches
    )
    last = features[-1].layer
    published = discovery.Setting(Feature("k", last), False, 0.0) if "k" in knobs.features else None
    kept = dict.fromkeys((*tried.best_of_each(), *([published] if published else [])))
    final = discovery.discover(dense, test, tuple(kept), knobs.k_patches)
    found = discovery.figures(tried, final, published, params.seed)
    columns = discovery.image_columns(tried, final, published)
    if knobs.taus:
        hits = cut_hits(*(cut(dense, rows, knobs.taus) for rows in (learn, test)))
        found += [Figure.of(metric, accuracy(values)) for metric, values in hits.items()]
        columns |= {metric: values.astype(int) for metric, values in hits.items()}
    write_results(out, run, name, found, dense.image_ids(test), columns)
    write_csv(out / "sweep.csv", discovery.sweep_table(tried))
    write_csv(out / "features.csv", discovery.feature_table(tried, final))
    truth, winner = true_boxes(dense.dataset), final.settings.index(tried.best())
    draw_boxes(
        out / "boxes.png",
        [read_rgb(dense.dataset.image_path(row)) for row in test[:PICTURES]],
        [truth[row] for row in test[:PICTURES]],
        [final.boxes[winner, i : i + 1] for i in range(len(test[:PICTURES]))],
    )
    print(f"{run}/{name}: " + ", ".join(f"{one.metric} {one.value:.4f}" for one in found) + f"; {tried.best()}")


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/discover/{1} is not finished")
