"""extract@<run>-<dataset>: the features of one data set under one run; features/<run>/<dataset>.zarr.

Beside it a record for git, metrics/extract/<run>/<dataset>.json: what made the store, and the digest of its bytes.
An interrupted extraction is resumed by running it again: its work lies in work/, outside DVC's outputs.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from regvit.data.manifest import Dataset, read_dataset
from regvit.data.progress import progress
from regvit.features.engine import RayEngine
from regvit.features.extraction import Engine, describe, extract
from regvit.features.forward import ARRAYS, row_shapes
from regvit.features.store import FeatureStore, InvalidStore, fingerprint
from regvit.files import write_text
from regvit.models.backbones import Backbone
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.registers.run_files import read_run
from regvit.registers.runs import open_run

INTERRUPTED = "finished units are kept in work/"


def main(run_name: str, dataset_name: str) -> None:
    final = Path("features") / run_name / f"{dataset_name}.zarr"
    record = Path("metrics/extract") / run_name / f"{dataset_name}.json"
    fill_store(run_name, dataset_name, final, record)


def fill_store(
    run_name: str,
    dataset_name: str,
    final: Path,
    record: Path,
    prepare: Callable[[Backbone], Backbone] = lambda backbone: backbone,
    arrays: Sequence[str] = ARRAYS,
    purpose: str | None = None,
) -> None:
    """Extracts, or goes on extracting, and writes the record."""
    runtime = Runtime.load()
    run_file = Path(f"features/runs/{run_name}.json")
    run = read_run(run_file)
    params = load_params()
    choices = params.extract
    backbone = open_run(run_file, Path("data/backbones"))
    transform = replace(backbone.transform, resizing=choices.resizing)
    backbone = prepare(replace(backbone, transform=transform))
    dataset = read_dataset(Path("data") / dataset_name)

    run.pop("detection")  # decides no feature
    run.pop("transform")  # of the backbone as it came; what was used is in the description
    neurons = run.pop("neurons")
    attributes = describe(backbone, dataset, choices.precision) | run
    attributes["neurons_sha256"] = None if neurons is None else fingerprint(neurons)

    # One working folder for each set of attributes, in the main repository even where DVC runs a copy of it for a
    # queued experiment: so these resume each other, and an experiment with other parameters is not in the way.
    work = Path(os.environ.get("DVC_ROOT", ".")) / "work"
    name = "-".join(part for part in (purpose and f"extract_{purpose}", run_name, dataset_name) if part)
    partial = work / f"{name}-{fingerprint(attributes)[:12]}.partial"
    with progress(len(dataset), f"extract {run_name}/{dataset_name}") as bar:
        for other in sorted(set(work.glob(f"{name}-*.partial")) - {partial}):
            bar.line(f"{other} is unfinished and was made with other settings; delete it if it is not wanted any more")
        if not record.exists() and is_finished(final, backbone, dataset, attributes, arrays):
            bar.line(f"{final} is finished; only its record was missing")
        else:
            extract(
                backbone,
                dataset,
                final,
                partial,
                attributes,
                choices.precision,
                runtime.worker_device or runtime.device,
                runtime.batch_size if runtime.batch_size_given else None,
                runtime.workers,
                progress=bar,
                arrays=arrays,
                compile=runtime.compile,
                engine=engine_of(runtime),
            )
    store = FeatureStore.open(final, dataset.digest, dataset.rows.column("image_id"))
    record.parent.mkdir(parents=True, exist_ok=True)
    shapes = {name: list(shape) for name, shape in store.arrays.items()}
    made = store.attributes | {"arrays": shapes, "store_sha256": store.digest()}
    # A list, because `dvc metrics` would show a block line by line (dvc.yaml says why it is a metric at all).
    write_text(record, json.dumps([made], indent=1, sort_keys=True) + "\n")


def is_finished(final: Path, backbone: Backbone, dataset: Dataset, attributes: Mapping, arrays: Sequence[str]) -> bool:
    """Whether the store is there, whole and of these very settings: a run was killed before it wrote the record."""
    if not final.exists():
        return False
    try:
        store = FeatureStore.open(final, dataset.digest, dataset.rows.column("image_id"))
    except InvalidStore:
        return False  # `extract` then refuses to write over it
    found = {key: store.attributes.get(key) for key in attributes}
    wanted = json.loads(json.dumps(dict(attributes)))
    return found == wanted and store.arrays == row_shapes(backbone, attributes["precision"], "cpu", arrays)


def engine_of(runtime: Runtime) -> Engine | None:
    """Who computes: a Ray cluster, or None for this process."""
    if runtime.engine == "local":
        return None
    device = runtime.worker_device or runtime.device.partition(":")[0]
    return RayEngine(runtime.address, device, runtime.gpus_per_worker, runtime.cpus_per_worker, runtime.threads)


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted=INTERRUPTED)
