"""extract_dense@<run>-<dataset>: what one forward leaves of every image for the measurements on single tokens;
features/dense/<run>/<dataset>.zarr. An interrupted extraction is resumed by running it again."""

from pathlib import Path

from regvit.data.batches import Batches
from regvit.data.manifest import read_dataset
from regvit.features.dense_features import DenseArrays, mean_embedding, open_subject
from regvit.features.dense_set import drawn_images
from regvit.features.extraction import fill_store
from regvit.features.forward import Forward
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params
from regvit.pipeline.runtime import Runtime
from regvit.pipeline.store_options import run_attributes, store_options
from regvit.registers.run_files import read_run


def main(run: str, name: str) -> None:
    params, runtime = load_params(), Runtime.load()
    knobs, seed = params.extract_dense.datasets[name], params.seed
    run_file, images = Path("features/runs") / f"{run}.json", knobs.images
    subject = open_subject(run_file, Path("data/backbones"), runtime.device).of_whole_images(knobs.img_size)
    dataset = drawn_images(read_dataset(Path("data") / name), images, seed)
    backbone, centre = subject.run, None
    if "norms" in knobs.arrays:
        first = Batches(dataset, backbone.transform, runtime.batch_size, 0, runtime.device)
        centre = mean_embedding(backbone.model, first)
    untreated = None if subject.untreated is backbone else subject.untreated.model
    arrays = DenseArrays(knobs.arrays, params.extract_dense.layers, subject.detection, untreated, centre)
    about = arrays.about(backbone.model) | {"images": images, "seed": seed}
    fill_store(
        Path("features/dense") / run / f"{name}.zarr",
        dataset,
        Forward(backbone, arrays, params.extract.precision, float32=("all_queries",)),
        run_attributes(read_run(run_file)) | about,
        store_options(runtime, f"extract_dense {run}/{name}"),
    )


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted="finished units are kept in work/")
