"""extract@<run>-<dataset>: the features of one data set under one run; features/<run>/<dataset>.zarr.

An interrupted extraction is resumed by running it again: its work lies in work/, outside DVC's outputs.
"""

from dataclasses import replace
from pathlib import Path

from regvit.data.manifest import read_dataset
from regvit.features.extraction import extract
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.pipeline.store_options import run_attributes, store_options
from regvit.registers.run_files import read_run
from regvit.registers.runs import open_run


def main(run: str, dataset: str) -> None:
    chosen = load_params().extract
    file = Path(f"features/runs/{run}.json")
    backbone = open_run(file, Path("data/backbones"))
    backbone = replace(backbone, transform=replace(backbone.transform, resizing=chosen.resizing))
    extract(
        Path("features") / run / f"{dataset}.zarr",
        backbone,
        read_dataset(Path("data") / dataset),
        run_attributes(read_run(file)),
        chosen.precision,
        options=store_options(Runtime.load(), f"extract {run}/{dataset}"),
    )


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="finished units are kept in work/")
