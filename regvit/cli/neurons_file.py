"""Reads the file that `regvit neurons` or the identify stage wrote."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field, ValidationError, model_validator

from regvit.cli.errors import WrongInput
from regvit.registers.neurons_file import read_table

if TYPE_CHECKING:
    from regvit.models.backbones import Backbone
    from regvit.registers.outliers import Detection


class NeuronsFile(BaseModel, strict=True):
    """What of the file is used here."""

    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    detect_layer: int | None
    selected: dict[int, list[int]]
    weights_sha256: str | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> NeuronsFile:
        if (self.threshold is None) != (self.detect_layer is None):
            raise ValueError("give threshold and detect_layer, or neither")
        return self


def neurons_beside(backbone: Backbone, root: Path | None) -> Path | None:
    """The identify stage's file of a backbone of the pipeline, if there is one."""
    file = (root or Path()) / "features" / "neurons" / f"{backbone.name}.json"
    return file if backbone.weights_sha256 and file.is_file() else None


def read_neurons(path: Path, backbone: Backbone) -> tuple[Detection | None, dict[int, tuple[int, ...]]]:
    """Detection and register neurons from a file, which must be of this backbone where both say so; a table that others
    published has no detection."""
    from regvit.registers.neurons import read_selected  # why here and not above: see __init__

    text = path.read_bytes()
    if b'"selected"' not in text:
        with contextlib.suppress(ValueError):
            return None, read_table(f"file:{path}")
    try:
        about = NeuronsFile.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) + ": " if fault["loc"] else ""
        raise WrongInput(f"{path} is no neurons file: {where}{fault['msg']}; use one of `regvit neurons`") from error
    digest, own = about.weights_sha256, backbone.weights_sha256
    if digest and own and digest != own:
        raise WrongInput(
            f"{path} was made with weights {digest[:12]}…, but {backbone.name} has {own[:12]}…; "
            "give the file of this backbone"
        )
    return read_selected(text.decode())
