"""`regvit look`: one image before and after test-time registers, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regvit.cli.backbone import default_backbone, named_device, open_backbone, repository
from regvit.cli.errors import WrongInput
from regvit.cli.neurons_file import neurons_beside, read_neurons
from regvit.cli.options import BACKBONES, IMG_SIZE, Architecture, Device, ImgSize, NeuronsFile, NumRegisters
from regvit.cli.outputs import check_out, is_special

EXAMPLES = f"""{BACKBONES}
\b
examples:
  regvit look cat.jpg                                   # the first backbone of the pipeline that has neurons
  regvit look cat.jpg --backbone focus_planted --out cat.png
  regvit look cat.jpg --backbone timm:vit_large_patch14_dinov2.lvd142m --neurons neurons.json
  regvit look cat.jpg --backbone timm:vit_base_patch16_clip_224.openai    # neurons searched on this image alone
"""


def _png(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{path} does not end in .png, and a picture in PNG format is what is written.")
    return path


def look(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Any image file.")],
    backbone: Annotated[
        str | None,
        typer.Option(help="See below; default: focus_planted, or the first in data/backbones that has neurons."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="PNG", callback=_png, help="The picture.")] = Path("look.png"),
    neurons: NeuronsFile = None,
    num_registers: NumRegisters = 1,
    img_size: ImgSize = None,
    architecture: Architecture = None,
    device: Device = "auto",
) -> None:
    """Draw an image's patch norms, CLS attention and features, before and after test-time registers.

    Features are shown as three principal components as colours; outlier patches are framed.
    """
    if image.is_dir():
        raise WrongInput(
            f"{image} is a folder, and one image is drawn; give a file in it, as `regvit look {image}/a.jpg`"
        )
    if not image.exists():
        raise WrongInput(f"there is no file {image}; give the path of an image")
    if is_special(out) and not out.is_dir():
        raise WrongInput(f"--out {out} cannot be written (it is no place for a picture); give a file in a folder")
    check_out(out)
    from regvit.registers.neurons import find_register_neurons
    from regvit.report.look import draw_look
    from regvit.report.look import look as see_both  # why here and not above: see __init__

    root = repository()
    source = default_backbone(root) if backbone is None else backbone
    opened = open_backbone(source, architecture, img_size, IMG_SIZE)
    opened.model.to(place := named_device(device))
    pixels = opened.transform.load(image)
    normalised = opened.transform.normalise(pixels[None].to(place))
    file = neurons or neurons_beside(opened, root)
    if file is not None:
        detection, selected = read_neurons(file, opened)
    else:
        print(f"no neurons file: searched on this image alone; `regvit neurons {source} IMAGES` makes a sound one")
        found = find_register_neurons(opened.model, normalised)
        detection, selected = found.detection, found.selected
    seen = see_both(opened.model, pixels, normalised, detection, selected, num_registers)
    draw_look(out, seen, f"Outlier tokens in {opened.name}")
    print(*seen.sentences(), out, sep="\n")
