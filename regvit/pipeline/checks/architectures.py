"""What timm's architectures are made of, by name, so that parameters can be held to them before anything is computed.

timm takes seconds to import. What it said is kept in work/ under its version, so that it is asked for new names only.
"""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from regvit.files import write_json

KEPT = Path(f"work/architectures-{version('timm')}.json")


@dataclass(frozen=True)
class Architecture:
    """Number of blocks, and of the register tokens that it was trained with."""

    depth: int
    trained: int


def architecture(name: str) -> Architecture:
    """The architecture of a name in timm, with or without a tag of weights.

    Raises:
        ValueError: timm has no such model (the nearest names are given), or it is no transformer with a list of blocks.
        OSError: the file of those known cannot be written.
    """
    try:
        known = json.loads(KEPT.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if name not in known:
        known[name] = asdict(_ask(name))
        KEPT.parent.mkdir(exist_ok=True)
        write_json(KEPT, known)
    return Architecture(**known[name])


def _ask(name: str) -> Architecture:
    import torch  # here, as these three take seconds

    from regvit.models.backbones import create
    from regvit.models.hooks import blocks
    from regvit.models.tokens import TokenLayout

    try:
        with torch.device("meta"):
            model = create(name)
    except RuntimeError as error:  # a tag of weights that timm does not know
        raise ValueError(f"timm {version('timm')} cannot make {name!r}: {error}") from error
    return Architecture(len(blocks(model)), TokenLayout.of(model).trained)
