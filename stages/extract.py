"""extract@<run>-<dataset>: the features of one data set under one run; features/<run>/<dataset>.zarr.

Beside it a record for git, metrics/extract/<run>/<dataset>.json: what made the store, and the digest of its bytes.
An interrupted extraction is resumed by running it again: its work lies in work/, outside DVC's outputs.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from params import load_params
from regvit.backbones import Backbone
from regvit.durable import FolderLocked
from regvit.extraction import ARRAYS, BadFeatures, describe, extract
from regvit.images import UnreadableImage
from regvit.manifest import read_dataset
from regvit.progress import progress
from regvit.runs import open_run, read_run
from regvit.store import FeatureStore, fingerprint
from runtime import Runtime


def main(run_name: str, dataset_name: str) -> None:
    precision = load_params()["extract"]["precision"]
    final = Path("features") / run_name / f"{dataset_name}.zarr"
    record = Path("metrics/extract") / run_name / f"{dataset_name}.json"
    fill_store(run_name, dataset_name, precision, final, record)


def fill_store(
    run_name: str,
    dataset_name: str,
    precision: str,
    final: Path,
    record: Path,
    prepare: Callable[[Backbone], Backbone] = lambda backbone: backbone,
    arrays: Sequence[str] = ARRAYS,
    purpose: str | None = None,
) -> None:
    """Extracts, or goes on extracting, and writes the record."""
    runtime = Runtime.load()
    run_file = Path("features") / run_name / "run.json"
    run = read_run(run_file)
    backbone = prepare(open_run(run_file, Path("data/backbones")))
    dataset = read_dataset(Path("data") / dataset_name)

    run.pop("transform", None)  # of the backbone as it came; what was used is in the description
    neurons = run.pop("neurons")
    attributes = describe(backbone, dataset, precision) | run
    attributes["neurons_sha256"] = None if neurons is None else fingerprint(neurons)

    # One working folder for each set of attributes, in the main repository even where DVC runs a copy of it for a
    # queued experiment: so these resume each other, and an experiment with other parameters is not in the way.
    work = Path(os.environ.get("DVC_ROOT", ".")) / "work"
    name = "-".join(part for part in (purpose and f"extract_{purpose}", run_name, dataset_name) if part)
    partial = work / f"{name}-{fingerprint(attributes)[:12]}.partial"
    with progress(len(dataset), f"extract {run_name}/{dataset_name}") as bar:
        for other in sorted(set(work.glob(f"{name}-*.partial")) - {partial}):
            bar.line(f"{other} is unfinished and was made with other settings; delete it if it is not wanted any more")
        extract(
            backbone,
            dataset,
            final,
            partial,
            attributes,
            precision,
            runtime.device,
            runtime.batch_size,
            runtime.workers,
            progress=bar,
            arrays=arrays,
        )
    store = FeatureStore.open(final, dataset.digest, [row.image_id for row in dataset.rows])
    record.parent.mkdir(parents=True, exist_ok=True)
    shapes = {name: list(shape) for name, shape in store.arrays.items()}
    made = store.attributes | {"arrays": shapes, "store_sha256": store.digest()}
    # A list, because `dvc metrics` would show a block line by line (dvc.yaml says why it is a metric at all).
    record.write_text(json.dumps([made], indent=1, sort_keys=True) + "\n")


def command(stage: str, main: Callable[[str, str], None]) -> None:
    """Runs a stage of `<run> <dataset>` and turns what a user can mend into one line."""
    if len(sys.argv) != 3:
        sys.exit(f"usage: python stages/{stage}.py <run> <dataset>")
    try:
        main(*sys.argv[1:])
    except (BadFeatures, FileExistsError, FolderLocked, UnreadableImage) as error:
        sys.exit(f"{stage}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells do; extract has said what is safe


if __name__ == "__main__":
    command("extract", main)
