"""NaN and infinity in what a model says of an image, traced to the layer where they begin.

`check_finite` looks at the outputs of a forward, with one wait for the device; only where it finds something does the
image go through the model again, alone, with every block watched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.hooks import watch_outputs

if TYPE_CHECKING:  # manifests need pandas, and a model without a data set does not
    from regvit.data.manifest import Row


class BadFeatures(ValueError):
    """The features of an image cannot be used; the message names the image, the array, the layer and the cure."""


def check_finite(
    model: nn.Module,
    images: Float[Tensor, "b 3 h w"],
    arrays: Mapping[str, Float[Tensor, "b ..."]],
    rows: Sequence[Row | str | None] | None = None,
    start: int = 0,
) -> None:
    """Stops where an output of a forward is NaN or infinite.

    Args:
        images: normalised, as the forward got them.
        arrays: outputs by name, each with a row an image.
        rows: of the data set that the images are from, or their paths; None where that is not known.
        start: number of the first image in `rows`, or in what is gone through.
    Raises:
        BadFeatures: names the first such image, its first such array, and the layer where it begins.
    """
    if torch.stack([values.isfinite().all() for values in arrays.values()]).all():
        return
    bad = torch.stack([~values.isfinite().reshape(len(values), -1).all(1) for values in arrays.values()])  # (array, b)
    image = int(bad.any(0).int().argmax())
    array = list(arrays)[int(bad[:, image].int().argmax())]
    raise BadFeatures(
        f"{_named(rows, start + image)}: array {array!r} is NaN or infinite; "
        f"{where_it_begins(model, images[image : image + 1])}; check the weights, or take the image out of the data set"
    )


def where_it_begins(model: nn.Module, image: Float[Tensor, "1 3 h w"]) -> str:
    """The layer that first puts out NaN or infinity, from a forward of one image alone: `it begins in layer 3`.

    Args:
        image: normalised, on the model's device.
    """
    if not image.isfinite().all():
        return "the normalised image has it already"
    watched = {f"layer {i}": block for i, block in enumerate(getattr(model, "blocks", ()))}
    for name, part in (("the patch embedding", "patch_embed"), ("the last norm", "norm")):
        if isinstance(getattr(model, part, None), nn.Module):
            watched[name] = getattr(model, part)
    found: list[str] = []

    def see(name: str, output: Tensor) -> None:
        if not found and not output.isfinite().all():
            found.append(name)

    with torch.inference_mode(), watch_outputs(watched, see):
        tokens = model.forward_features(image)
    if found:
        return f"it begins in {found[0]}"
    if tokens.isfinite().all():
        return "no layer gives it when the image goes through the model alone"
    return "it begins after the last norm"


def _named(rows: Sequence[Row | str | None] | None, number: int) -> str:
    """`image 'id' (path)`, `image path`, or `image 3` of one that is known by its place alone."""
    row = None if rows is None else rows[number]
    if row is not None and not isinstance(row, str):
        return f"image {row.image_id!r} ({row.path})"
    return f"image {number if row is None else row}"
