"""What the pipeline left in the repository: its default backbone, the neurons of a backbone, a run by its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regvit.cli.errors import WrongInput

if TYPE_CHECKING:
    from regvit.models.backbones import Backbone


def repository(start: Path) -> Path | None:
    """The nearest folder upwards that holds `data/backbones`, where the pipeline leaves what it makes."""
    return next((folder for folder in (start, *start.parents) if (folder / "data" / "backbones").is_dir()), None)


def default_backbone(root: Path | None) -> str:
    """The planted backbone of the default run, or the first by name that has neurons."""
    folders = sorted((root / "data" / "backbones").iterdir()) if root else []
    names = [f.name for f in folders if (root / "features" / "neurons" / f"{f.name}.json").is_file()]
    if not names:
        raise WrongInput(
            "there is no data/backbones with features/neurons here or above; run `make repro` first, go into the "
            "repository, or name one: --backbone timm:vit_small_patch14_dinov2.lvd142m"
        )
    return "focus_planted" if "focus_planted" in names else names[0]


def neurons_beside(backbone: Backbone, root: Path | None) -> Path | None:
    """The identify stage's file of a backbone of the pipeline, if there is one."""
    file = (root or Path()) / "features" / "neurons" / f"{backbone.name}.json"
    return file if backbone.weights_sha256 and file.is_file() else None


def run_file(run: str, root: Path | None) -> Path:
    """The `run.json` that a name or a path means."""
    places = [Path(run), Path(run) / "run.json", (root or Path()) / "features" / run / "run.json"]
    for path in places:
        if path.is_file():
            return path
    known = sorted(file.parent.name for file in (root or Path()).glob("features/*/run.json"))
    hint = f"there are {', '.join(known)}" if known else "give a name in features/ or a run.json"
    raise WrongInput(f"there is no run {run!r} ({places[-1]} is missing); {hint}")
