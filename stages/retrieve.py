"""retrieve@<run>-<dataset>: whether what is sought stands first among the images of a gallery; metrics/runs/<run>/retrieve/<dataset>/.

The queries are the set's test images, the gallery all images of the ID set; or, with lists, both are of the set itself.
"""

from pathlib import Path

import numpy as np

from regvit.data.manifest import read_dataset
from regvit.features.readouts import available
from regvit.features.store import FeatureStore
from regvit.features.stored_readouts import stored_readouts
from regvit.measures.tables import write_results
from regvit.measures.training_free import retrieval
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params


def main(run: str, name: str) -> None:
    params, data, out = load_params(), Path("data"), Path("metrics/runs") / run / "retrieve" / name
    knobs, lists = params.retrieve, data / name / retrieval.FILE
    gallery = name if lists.is_file() else params.in_distribution
    homes = {each: read_dataset(data / each) for each in {name, gallery}}
    ids = {each: list(homes[each].rows.column("image_id")) for each in homes}
    sought = retrieval.listed(lists, ids[name]) if gallery == name else retrieval.same_name(ids[name], ids[gallery])
    stores = {each: FeatureStore.open(f"features/{run}/{each}.zarr", homes[each].digest) for each in homes}
    readouts = available(stores[name].arrays, knobs.readouts).names
    found = {each: stored_readouts(stores[each], readouts, np.arange(len(ids[each]))) for each in homes}
    by_readout = {}
    for readout in readouts:
        queries, images = (found[each][readout][:] for each in (name, gallery))
        ranks = list(retrieval.positive_ranks(queries, images, sought))
        by_readout[readout] = retrieval.columns(ranks, knobs.recall_at, trapezoids=gallery == name)
    written = retrieval.figures(by_readout, params.seed)
    queries = [ids[name][one.query] for one in sought]
    write_results(out, run, name, written, queries, retrieval.image_columns(by_readout))
    print(f"{run}/{name}, {len(ids[gallery])} images: " + ", ".join(f"{one.metric} {one.value:.4f}" for one in written))


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="metrics/runs/{0}/retrieve/{1} is not finished")
