"""`regvit neurons`: finds the register neurons of a backbone on given images, saves them, and tries the cure."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from regvit.cli.backbone import open_backbone
from regvit.cli.device import device_of
from regvit.cli.images import images_at, readable
from regvit.cli.options import BACKBONES, FORMATS, IMG_SIZE, add_backbone_options, count, count_or_none, number
from regvit.cli.outputs import check_out, write
from regvit.cli.repository import repository

if TYPE_CHECKING:
    from regvit.data.batches import Batches
    from regvit.models.backbones import Backbone
    from regvit.registers.neurons import RegisterNeurons

TABLE = 20  # neurons printed; the file holds them all


def add(commands: argparse._SubParsersAction) -> None:
    """The words of `regvit neurons`, and what runs it."""
    parser = commands.add_parser(
        "neurons",
        help="find the register neurons of a backbone on your images",
        description="Finds outlier patches and the MLP neurons that write them, saves these, and tries the cure: outlier "
        "patches\nwith the neurons silenced, and with their activation moved into one test-time register.\nA hundred "
        "varied images do.",
        epilog=f"""\
{BACKBONES}
examples:
  regvit neurons focus_planted photos/ --out neurons.json
  regvit neurons timm:vit_large_patch14_dinov2.lvd142m photos/ more/a.jpg --limit 200 --device cuda
  regvit neurons timm:vit_base_patch16_clip_224.openai photos/ --threshold 30 --layer -1 --top-k 10   # as published
""",
        formatter_class=FORMATS,
    )
    parser.add_argument("backbone", metavar="BACKBONE", help="see below")
    parser.add_argument("images", metavar="IMAGES", nargs="+", type=Path, help="image files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("neurons.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--limit", type=count, default=512, metavar="N", help="of more images, N are drawn; default: %(default)s"
    )
    parser.add_argument("--seed", type=count_or_none, default=0, metavar="N", help="of that draw; default: %(default)s")
    parser.add_argument(
        "--threshold",
        type=number,
        metavar="NORM",
        help="norm over which a patch is an outlier; default: from the data",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="BLOCK",
        help="block after which it is; negative from the end; default: from the data",
    )
    parser.add_argument(
        "--top-k", type=count, metavar="N", help="neurons to take; default: the fewest that explain the outliers"
    )
    parser.add_argument("--max-layer", type=int, metavar="BLOCK", help="last block searched; default: that of --layer")
    parser.add_argument(
        "--explained",
        type=number,
        default=0.99,
        metavar="SHARE",
        help="of the outliers' excess that the neurons are to write; default: %(default)s",
    )
    add_backbone_options(parser, f"{IMG_SIZE} where the model takes it, else its own", batches=True)
    parser.set_defaults(run=_neurons)


def _neurons(arguments: argparse.Namespace) -> None:
    from regvit.data.batches import Batches, sample  # why here and not above: see cli.py
    from regvit.registers.neurons import find_register_neurons

    check_out(arguments.out)
    images = sample(images_at(arguments.images), "train", arguments.limit, arguments.seed)
    backbone = open_backbone(arguments.backbone, arguments, repository(Path.cwd()), IMG_SIZE)
    images = readable(images, backbone.transform)
    batches = Batches(
        images,
        backbone.transform,
        arguments.batch_size,
        arguments.workers,
        str(device_of(backbone)),
        "searching register neurons",
    )
    options = {key: getattr(arguments, key) for key in ("threshold", "layer", "top_k", "max_layer", "explained")}
    found = find_register_neurons(backbone.model, batches, **options)
    about = {
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256 or None,
        "images": len(images),
        "seed": arguments.seed,
    }
    write(arguments.out, found.to_json(**about))
    for line in _report(found, len(images)):
        print(line)
    if found.num_selected:
        print(_cure(backbone, batches, found))
    print(arguments.out)


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


def _cure(backbone: Backbone, batches: Batches, found: RegisterNeurons) -> str:
    """The outliers that are left with the neurons silenced, and with their activation in one register."""
    from dataclasses import replace

    from regvit.registers.neurons import ablated
    from regvit.registers.outliers import patch_norms
    from regvit.registers.test_time import add_test_time_registers

    def left(label: str) -> str:
        norms = patch_norms(backbone.model, replace(batches, label=label), [found.detection.layer])[0]
        return f"{(norms > found.detection.threshold).mean():.2%}"

    with ablated(backbone.model, found.selected):
        silenced = left("silencing them")
    with add_test_time_registers(backbone.model, found):
        moved = left("adding a register")
    before = f"{found.outlier_fraction.mean():.2%}"
    return f"outlier patches: {before} as it is, {silenced} with the neurons silenced, {moved} with one register"
