"""extract_patches@<run>-<dataset>: patch tokens of whole images, for dense probes; features/<run>/patches/<dataset>.zarr."""

from dataclasses import replace
from pathlib import Path

from regvit.data.manifest import read_dataset
from regvit.data.whole_images import WholeTransform
from regvit.features.extraction import extract
from regvit.models.backbones import resized
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.pipeline.store_options import run_attributes, store_options
from regvit.registers.run_files import read_run
from regvit.registers.runs import open_run


def main(run: str, dataset: str) -> None:
    params = load_params()
    file = Path(f"features/runs/{run}.json")
    backbone = resized(open_run(file, Path("data/backbones")), params.patches.img_size)
    transform = WholeTransform.of(replace(backbone.transform, resizing=params.extract.resizing))
    extract(
        Path("features") / run / "patches" / f"{dataset}.zarr",
        replace(backbone, transform=transform),
        read_dataset(Path("data") / dataset),
        run_attributes(read_run(file)),
        params.extract.precision,
        ["patches"],
        store_options(Runtime.load(), f"extract patches of {run}/{dataset}"),
    )


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="finished units are kept in work/")
