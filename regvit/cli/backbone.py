"""Opens the backbone that BACKBONE means: a folder, one of data/backbones, or a source of weights."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from regvit.cli.errors import WrongInput

if TYPE_CHECKING:
    import torch

    from regvit.models.backbones import Backbone


def repository() -> Path | None:
    """The nearest folder upwards that holds `data/backbones`, where the pipeline leaves what it makes."""
    return next((f for f in (Path.cwd(), *Path.cwd().parents) if (f / "data" / "backbones").is_dir()), None)


def default_backbone(root: Path | None) -> str:
    """The planted backbone of the default run, or the first by name that has neurons."""
    names = [name for name in _names(root) if (root / "features" / "neurons" / f"{name}.json").is_file()]
    if not names:
        raise WrongInput(f"no backbone with its neurons is here; {_where(root)}, or name one with --backbone")
    return "focus_planted" if "focus_planted" in names else names[0]


def open_backbone(
    source: str, architecture: str | None = None, img_size: int | None = None, default_size: int | None = None
) -> Backbone:
    """The backbone that BACKBONE means, on the CPU.

    Args:
        source: folder, name in data/backbones, or source of weights.
        architecture: in timm, of `file:` weights.
        img_size: side of the input that it must take.
        default_size: side that it gets where it takes it, when `img_size` is None.
    Raises:
        WrongInput: BACKBONE is none of these.
    """
    from regvit.models.backbones import Backbone, load_backbone, resized  # why here and not above: see __init__
    from regvit.models.sources import build

    root = repository()
    places = [Path(source), (root or Path()) / "data" / "backbones" / source] if source else []
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None and ":" not in source and len(Path(source).parts) > 1:
        folder = Path(source)  # meant as a folder, which load_backbone says is missing
    if folder is not None:
        backbone = load_backbone(folder)
    else:
        source = source if ":" in source else _timm_source(source, root)
        cache = root / "work" / "packages" if root else Path.home() / ".cache" / "regvit" / "packages"
        built = build(source, architecture, cache_dir=cache, progress=lambda text: print(text, file=sys.stderr))
        name = source.removeprefix("timm:")
        backbone = Backbone(name, built.model, built.transform, "", None, {"name": name, **built.about})
    if img_size is None and default_size is not None:
        try:
            return resized(backbone, default_size)
        except ValueError:  # it takes images of its own size only, or of multiples of another patch size
            return backbone
    return resized(backbone, img_size)


def named_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one."""
    import torch  # why here and not above: see __init__

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        here = device.type != "meta" and torch.empty(0, device=device).device.type == device.type
    except (RuntimeError, AssertionError):  # torch knows no such device, or was built without it
        here = False
    if not here:
        raise WrongInput(f"--device {name} is not here; use auto, cpu, cuda or cuda:<n>")
    return device


def _names(root: Path | None) -> list[str]:
    return sorted(file.parent.name for file in root.glob("data/backbones/*/backbone.json")) if root else []


def _where(root: Path | None) -> str:
    """Which names there are; outside of the repository none, and how to come by them."""
    if root is None:
        return "run `make repro` first, or go into a repository that has data/backbones"
    return f"{root / 'data' / 'backbones'} holds {', '.join(_names(root)) or 'none'}"


def _timm_source(name: str, root: Path | None) -> str:
    """`timm:<name>` of a model of timm's.

    Raises:
        WrongInput: timm has none of that name; the message gives the nearest names.
    """
    import timm  # why here and not above: see __init__

    base = name.partition(".")[0]
    if timm.is_model(base):
        return f"timm:{name}"
    if own := difflib.get_close_matches(name, _names(root), n=1):
        raise WrongInput(f"there is no backbone {name!r}: did you mean {own[0]}?")
    near = " or ".join(difflib.get_close_matches(base, timm.list_models(), n=3)) or "timm:<model>"
    raise WrongInput(f"there is no backbone {name!r}: {_where(root)}, or give a folder, file:<path> or {near}")
