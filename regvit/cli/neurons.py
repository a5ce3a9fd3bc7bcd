"""`regvit neurons`: finds the register neurons of a backbone on given images, saves them, and tries the cure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regvit.cli.backbone import named_device, open_backbone
from regvit.cli.images import SEED, DecodedImages, decode, image_files
from regvit.cli.options import BACKBONES, IMG_SIZE, Architecture, BackboneArgument, Device, ImgSize, finite
from regvit.cli.outputs import check_out, write
from regvit.registers.neurons_file import Overlap, read_neurons, read_table

if TYPE_CHECKING:
    from torch import nn

    from regvit.registers.neurons import RegisterNeurons

TABLE = 20  # neurons printed; the file holds them all
EXAMPLES = f"""{BACKBONES}
\b
examples:
  regvit neurons focus_planted photos/ --out neurons.json
  regvit neurons timm:vit_large_patch14_dinov2.lvd142m photos/ more/a.jpg --limit 200 --device cuda
  regvit neurons timm:vit_base_patch16_clip_224.openai photos/ --threshold 30 --layer -1 --top-k 10
  regvit neurons timm:vit_large_patch14_dinov2.lvd142m photos/ --against 'published.json?top_k=45'   # shared, missing, rank
"""


def neurons(
    backbone: BackboneArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the neurons are saved.")] = Path("neurons.json"),
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Of more images, N are drawn.")] = 512,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="NORM", callback=finite, help="Norm over which a patch is an outlier; default: from the data."
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(metavar="BLOCK", help="Block after which it is, negative from the end; default: from the data."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Neurons to take; default: the fewest that explain the outliers."),
    ] = None,
    max_layer: Annotated[
        int | None, typer.Option(metavar="BLOCK", help="Last block searched; default: that of --layer.")
    ] = None,
    explained: Annotated[
        float, typer.Option(callback=finite, help="Share of the outliers' excess that the neurons are to write.")
    ] = 0.99,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Neurons that the found ones are held against: a file of this command, or a published table; "
            "'table.json?top_k=50&max_layer=17' takes its best ones.",
        ),
    ] = None,
    img_size: ImgSize = None,
    architecture: Architecture = None,
    device: Device = "auto",
) -> int:
    """Find the register neurons of a backbone on your images.

    Finds outlier patches and the MLP neurons that write them, saves these, and tries the cure: outlier patches with the
    neurons silenced, and with their activation moved into one test-time register. A hundred varied images do.
    """
    check_out(out)
    other = against and read_table(f"file:{against.removeprefix('file:')}")  # before the long work
    from regvit.registers.neurons import find_register_neurons  # why here and not above: see __init__

    files = image_files(images, limit)
    opened = open_backbone(backbone, architecture, img_size, IMG_SIZE)
    opened.model.to(place := named_device(device))
    pixels, left_out = decode(files, opened.transform)
    batches = DecodedImages(pixels, opened.transform, place)
    options = {"threshold": threshold, "layer": layer, "top_k": top_k, "max_layer": max_layer, "explained": explained}
    found = find_register_neurons(opened.model, batches, **options)
    about = {"backbone": opened.name, "weights_sha256": opened.weights_sha256 or None}
    text = found.to_json(**about, images=len(batches), seed=SEED)
    write(out, text)
    print(*_report(found, len(batches)), sep="\n")
    if found.num_selected:
        print(_cure(opened.model, batches, found))
    if other:
        searched = read_neurons(text)
        print(f"{against}: {Overlap.of(other, searched).sentence(searched.ranks)}")
    print(out)
    return 1 if left_out else 0


def _report(found: RegisterNeurons, images: int) -> list[str]:
    """What was found, in words and as a table."""
    if found.detection is None:
        norms = found.norms[-2:][0]
        return [
            f"no outliers in {images} images: after the last block but one the largest patch norm is "
            f"{norms.max():.4g}, the mean {norms.mean():.4g}; there is nothing to move"
        ]
    at = f"norm over {found.detection.threshold:.4g} after block {found.detection.layer}"
    lines = [f"{found.outlier_fraction.mean():.2%} of the patches of {images} images are outliers ({at})"]
    if not found.num_selected:
        return [*lines, "no neuron writes a notable share of their excess, so there is nothing to move"]
    who = "1 register neuron writes" if found.num_selected == 1 else f"{found.num_selected} register neurons write"
    lines.append(f"{who} {found.explained:.1%} of their excess:")
    lines.append(f"{'layer':>6} {'neuron':>7} {'attribution':>12} {'activation':>11}")
    chosen = [n for n in found.neurons if n.neuron in found.selected.get(n.layer, ())]
    lines += [f"{n.layer:>6} {n.neuron:>7} {n.attribution:>12.4f} {n.activation:>11.3f}" for n in chosen[:TABLE]]
    return lines + ([f"   … and {len(chosen) - TABLE} more"] if len(chosen) > TABLE else [])


def _cure(model: nn.Module, batches: DecodedImages, found: RegisterNeurons) -> str:
    """The outliers that are left with the neurons silenced, and with their activation in one register."""
    from regvit.registers.controls import ablated
    from regvit.registers.outliers import patch_norms
    from regvit.registers.test_time import add_test_time_registers

    def left() -> str:
        norms = patch_norms(model, batches, [found.detection.layer])[0]
        return f"{(norms > found.detection.threshold).mean():.2%}"

    with ablated(model, found.selected):
        silenced = left()
    with add_test_time_registers(model, found):
        moved = left()
    before = f"{found.outlier_fraction.mean():.2%}"
    return f"outlier patches: {before} as it is, {silenced} with the neurons silenced, {moved} with one register"
