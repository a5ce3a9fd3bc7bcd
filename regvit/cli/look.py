"""`regvit look`: one image before and after test-time registers, as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from regvit.cli.backbone import open_backbone
from regvit.cli.device import device_of
from regvit.cli.errors import WrongInput
from regvit.cli.neurons_file import read_neurons
from regvit.cli.options import BACKBONES, FORMATS, IMG_SIZE, add_backbone_options, add_num_registers
from regvit.cli.outputs import check_out, is_special
from regvit.cli.repository import default_backbone, neurons_beside, repository


def add(commands: argparse._SubParsersAction) -> None:
    """The words of `regvit look`, and what runs it."""
    parser = commands.add_parser(
        "look",
        help="draw an image's patch norms, CLS attention and features, before and after test-time registers",
        description="Draws what a backbone makes of one image, before and after test-time registers: patch norms, CLS "
        "attention\nand features (three principal components as colours), outlier patches framed.",
        epilog=f"""\
{BACKBONES}
examples:
  regvit look cat.jpg                                   # the first backbone of the pipeline that has neurons
  regvit look cat.jpg --backbone focus_planted --out cat.png
  regvit look cat.jpg --backbone timm:vit_large_patch14_dinov2.lvd142m --neurons neurons.json
  regvit look cat.jpg --backbone timm:vit_base_patch16_clip_224.openai    # neurons searched on this image alone
""",
        formatter_class=FORMATS,
    )
    parser.add_argument("image", metavar="IMAGE", type=Path, help="any image file")
    parser.add_argument(
        "--backbone", help="see below; default: focus_planted, or the first in data/backbones that has neurons"
    )
    parser.add_argument("--out", type=_png, default=Path("look.png"), metavar="PNG", help="default: %(default)s")
    parser.add_argument(
        "--neurons",
        type=Path,
        metavar="FILE",
        help="from `regvit neurons` or the identify stage; default: features/neurons/<backbone>.json, and where that is "
        "missing they are searched on the image itself",
    )
    add_num_registers(parser)
    add_backbone_options(parser, f"{IMG_SIZE} where the model takes it, else its own")
    parser.set_defaults(run=_look)


def _look(arguments: argparse.Namespace) -> None:
    _check_image(arguments.image)
    if is_special(arguments.out) and not arguments.out.is_dir():
        raise WrongInput(
            f"--out {arguments.out} cannot be written (it is no place for a picture); give a file in a folder"
        )
    check_out(arguments.out)
    from regvit.registers.neurons import find_register_neurons
    from regvit.report.look import draw_look, look  # why here and not above: see cli.py

    root = repository(Path.cwd())
    source = default_backbone(root) if arguments.backbone is None else arguments.backbone
    backbone = open_backbone(source, arguments, root, IMG_SIZE)
    image = backbone.transform.load(arguments.image)
    normalised = backbone.transform.normalise(image[None].to(device_of(backbone)))
    file = arguments.neurons or neurons_beside(backbone, root)
    if file is not None:
        detection, neurons = read_neurons(file, backbone)
    else:
        print(f"no neurons file: searched on this image alone; `regvit neurons {source} IMAGES` makes a sound one")
        found = find_register_neurons(backbone.model, normalised)
        detection, neurons = found.detection, found.selected
    seen = look(backbone.model, image, normalised, detection, neurons, arguments.num_registers)
    draw_look(arguments.out, seen, f"Outlier tokens in {backbone.name}")
    for line in seen.sentences():
        print(line)
    print(arguments.out)


def _check_image(path: Path) -> None:
    """Refuses what cannot be an image before the seconds that a model takes."""
    if path.is_dir():
        raise WrongInput(
            f"{path} is a folder, and one image is drawn; give a file in it, as in `regvit look {path}/a.jpg`"
        )
    if not path.exists():
        raise WrongInput(f"there is no file {path}; give the path of an image")


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, and a picture in PNG format is what is written")
    return Path(text)
