"""extract_patches@<run>-<dataset>: patch tokens of whole images, for dense probes; features/<run>/patches/<dataset>.zarr.

The same set may stand among those classified too: its store lies elsewhere and holds other arrays at another size.
Beside it a record for git, metrics/extract_patches/<run>/<dataset>.json. It is interrupted and resumed as `extract` is.
"""

from dataclasses import replace
from pathlib import Path

from extract import INTERRUPTED, fill_store
from regvit.data.whole_images import WholeTransform
from regvit.models.backbones import Backbone, resized
from regvit.pipeline.command import command
from regvit.pipeline.params import load_params


def main(run: str, dataset: str) -> None:
    img_size = load_params()["patches"]["img_size"]

    def whole(backbone: Backbone) -> Backbone:
        backbone = resized(backbone, img_size)
        return replace(backbone, transform=WholeTransform.of(backbone.transform))

    final = Path("features") / run / "patches" / f"{dataset}.zarr"
    record = Path("metrics/extract_patches") / run / f"{dataset}.json"
    fill_store(run, dataset, final, record, whole, ["patches"], "patches")


if __name__ == "__main__":
    command(main, "run", "dataset", interrupted=INTERRUPTED)
