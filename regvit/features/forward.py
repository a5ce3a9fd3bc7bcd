"""One forward: a batch of images to the features that are stored.

They are taken from the tokens that `forward_features` returns, that is after the model's last norm (models that
normalise only what they pooled, timm's `fc_norm`, give their tokens before it):

    cls         CLS token                                  only where the model has one
    registers   trained registers, then test-time ones     only where the model has any
    patch_mean  mean over the patch tokens, in float32
    patches     the patch tokens themselves, row by row of the grid; only where asked for, as they are large
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from regvit.models.arithmetic import arithmetic
from regvit.models.backbones import Backbone
from regvit.models.tokens import TokenLayout

ARRAYS = ("cls", "registers", "patch_mean")  # what is stored where nothing else is asked for


def readouts(
    layout: TokenLayout, tokens: Float[Tensor, "b n d"], arrays: Sequence[str] = ARRAYS
) -> dict[str, Float[Tensor, "b ..."]]:
    """What is stored of a token sequence, in float32: `cls` (b, d), `registers` (b, r, d), `patch_mean` (b, d),
    `patches` (b, p, d), whichever of them are asked for.

    `cls` and `registers` are left out where the model has none.

    Raises:
        ValueError: an array is unknown.
    """
    tokens = tokens.float()
    make = {
        "cls": layout.cls_token if layout.cls else None,
        "registers": layout.registers if layout.num_registers else None,
        "patch_mean": lambda tokens: layout.patches(tokens).mean(1),
        "patches": layout.patches,
    }
    if unknown := [name for name in arrays if name not in make]:
        raise ValueError(f"array {unknown[0]!r} is unknown; expected some of {', '.join(make)}")
    return {name: make[name](tokens) for name in arrays if make[name] is not None}


def row_shapes(
    backbone: Backbone, precision: str, device: torch.device | str = "cpu", arrays: Sequence[str] = ARRAYS
) -> dict[str, tuple[int, ...]]:
    """Shape of one row of each array, from a forward of one blank image; the model is moved to `device`.

    Raises:
        ValueError: see `Extractor`.
    """
    forward = backbone.model.to(device).forward_features
    found = features_of(backbone, forward, blank_batch(backbone, 1, device), precision, arrays)
    if not found:
        raise ValueError(f"backbone {backbone.name} has none of the arrays asked for ({', '.join(arrays)})")
    return {name: tuple(values.shape[1:]) for name, values in found.items()}


@torch.inference_mode()
def features_of(
    backbone: Backbone,
    forward: Callable[[Tensor], Tensor],
    batch: UInt8[Tensor, "b 3 s s"],
    precision: str,
    arrays: Sequence[str],
) -> dict[str, Float[Tensor, "b ..."]]:
    """The readouts of one batch of uint8 images, on its device."""
    with arithmetic(precision, batch.device):
        tokens = forward(backbone.transform.normalise(batch))
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"{type(backbone.model).__name__}.forward_features returns {found}, expected a token sequence "
                "(image, token, channel); use a timm vision transformer"
            )
        return readouts(TokenLayout.of(backbone.model), tokens, arrays)


def blank_batch(backbone: Backbone, images: int, device: torch.device | str) -> UInt8[Tensor, "b 3 s s"]:
    """Black images of the size that the backbone takes."""
    return torch.zeros(images, 3, backbone.transform.size, backbone.transform.size, dtype=torch.uint8, device=device)
