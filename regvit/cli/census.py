"""`regvit census`: which models have outlier tokens, of what kind, and whether registers can help; one row a model."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regvit.cli.backbone import named_device, open_backbone
from regvit.cli.errors import WrongInput
from regvit.cli.images import DecodedImages, decode, image_files
from regvit.cli.options import BACKBONES, IMG_SIZE, Architecture, Device, ImgSize
from regvit.cli.outputs import check_out, write

if TYPE_CHECKING:
    from regvit.models.backbones import Backbone

RANDOM = "random:"
EXAMPLES = f"""{BACKBONES}
or random:<architecture>, a model of timm's with random weights (seed 0)

\b
examples:
  regvit census focus focus_planted --images photos/
  regvit census timm:vit_base_patch16_clip_224.openai random:vit_tiny_patch16_224 --images photos/ --out census.csv
"""


def census(
    models: Annotated[list[str], typer.Argument(metavar="BACKBONE...", help="See below.")],
    images: Annotated[
        list[Path], typer.Option(metavar="PATH", help="Image files, or folders of them; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(metavar="CSV", help="Rows are appended to it.")] = Path("census.csv"),
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Of more images, N are drawn.")] = 64,
    img_size: ImgSize = None,
    architecture: Architecture = None,
    device: Device = "auto",
) -> int:
    """Say of each model whether it has outlier tokens, which neurons make them, and what kind of sink they are.

    Prints a sentence a model, and appends a row to a CSV file: detection block, fraction, ratio of norms, register neurons
    and the share that they explain, attention on the sinks, their values, effective rank, and the largest channel.
    """
    check_out(out)
    from regvit.measures.diagnosis import census_row, diagnose  # why here and not above: see __init__
    from regvit.registers.neurons import find_register_neurons

    files = image_files(images, limit)
    left_out = 0
    for name in models:
        opened = (
            _random(name, img_size)
            if name.startswith(RANDOM)
            else open_backbone(name, architecture, img_size, IMG_SIZE)
        )
        opened.model.to(place := named_device(device))
        pixels, faults = decode(files, opened.transform)
        batches = DecodedImages(pixels, opened.transform, place)
        diagnosis = diagnose(opened.model, batches, find_register_neurons(opened.model, batches))
        append(out, census_row(name, len(batches), diagnosis))
        print(f"{name}: {diagnosis.verdict()}")
        left_out += faults
    print(out)
    return 1 if left_out else 0


def append(path: Path, row: dict[str, object]) -> None:
    """Adds a row to a CSV file, which gets its head from the first one.

    Raises:
        WrongInput: the file has other columns.
    """
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    head = next(csv.reader(io.StringIO(before)), list(row))
    if head != list(row):
        raise WrongInput(f"{path} has the columns {', '.join(head)}, not those of a census; give another --out")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), lineterminator="\n")
    if not before:
        writer.writeheader()
    writer.writerow(row)
    write(path, before + text.getvalue())


def _random(name: str, img_size: int | None) -> Backbone:
    """A model of timm's with random weights, which no source of weights has."""
    import torch  # why here and not above: see __init__

    from regvit.models.backbones import Backbone, create
    from regvit.models.sources import transform_of

    torch.manual_seed(0)
    model = create(name.removeprefix(RANDOM), {"num_classes": 0, **({"img_size": img_size} if img_size else {})})
    return Backbone(name, model, transform_of(model), "", None, {"name": name})
