"""Opens the backbone that BACKBONE means: a folder, one of data/backbones, or a source of weights."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from regvit.cli.device import named_device
from regvit.cli.errors import WrongInput

if TYPE_CHECKING:
    from regvit.models.backbones import Backbone


def open_backbone(
    source: str, arguments: argparse.Namespace, root: Path | None, img_size: int | None = None
) -> Backbone:
    """The backbone that BACKBONE means, on the device, at the wanted image size or at `img_size` where it can be."""
    from regvit.models.backbones import Backbone, load_backbone, resized  # why here and not above: see cli.py
    from regvit.models.sources import build

    if not source:
        _check_name(source, root)
    folder = next((f for f in (Path(source), (root or Path()) / "data" / "backbones" / source) if f.is_dir()), None)
    if folder is None and ":" not in source and len(Path(source).parts) > 1:
        folder = Path(source)  # meant as a folder, which load_backbone says is missing
    if folder is not None:
        backbone = load_backbone(folder)
    else:
        _check_name(source, root)
        source = source if ":" in source else f"timm:{source}"
        _check_architecture(source, arguments.architecture)
        cache = (root or Path.home() / ".cache" / "regvit") / ("work/packages" if root else "packages")
        built = build(
            source, arguments.architecture, cache_dir=cache, progress=lambda text: print(text, file=sys.stderr)
        )
        about = {"name": source.partition(":")[2] if source.startswith("timm:") else source, **built.about}
        backbone = Backbone(about["name"], built.model, built.transform, "", None, about)
    wanted = arguments.img_size or img_size
    if arguments.img_size is None and wanted is not None and not _takes(backbone, wanted):
        wanted = None
    backbone = resized(backbone, wanted)
    backbone.model.to(named_device(arguments.device))
    return backbone


def _check_name(source: str, root: Path | None) -> None:
    """Refuses a name that was meant as one of data/backbones: near one of these, and no model of timm's.

    Raises:
        WrongInput: the message gives the nearest name.
    """
    import timm

    if ":" in source or timm.is_model(source.partition(".")[0]):
        return
    known = sorted(folder.parent.name for folder in root.glob("data/backbones/*/backbone.json")) if root else []
    near = difflib.get_close_matches(source, known, n=1)
    if near or not source:
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
        raise WrongInput(f"there is no backbone {source!r}: {hint}")


def _check_architecture(source: str, architecture: str | None) -> None:
    """Refuses timm's models that are no vision transformers, before the hub is asked for their weights.

    Raises:
        ValueError: timm has no such model, or it has no list of blocks with an MLP in each; the message says which.
    """
    import torch

    from regvit.models.backbones import create
    from regvit.models.hooks import blocks, output_projection

    name = source.removeprefix("timm:") if source.startswith("timm:") else architecture
    if source.startswith(("timm:", "file:")) and name:
        with torch.device("meta"):  # only looked at
            model = create(name)
        for block in blocks(model):
            output_projection(block)


def _takes(backbone: Backbone, img_size: int) -> bool:
    """Whether a backbone takes images of this size: its own, or any multiple of the patch size."""
    from regvit.models.backbones import resized

    try:
        resized(backbone, img_size)
    except ValueError:
        return False
    return True
