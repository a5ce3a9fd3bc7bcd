"""`constant_registers`: what the registers hold is the same for every image.

At the output of every block the registers, trained or test-time, become what was measured beforehand over other images:

    content: mean     mean of that block's registers over the images
             noise    mean + standard deviation (over the images) · ε, ε standard normal, drawn once
             other    the registers of one of the images

It tells whether registers help by what they hold of the image, or by being there. A readout of the registers is the same
for every image then. It changes every image.

Source: Parodi et al. 2026, arXiv:2604.14433 (mean, noise and shuffled registers, at every block's output); constants in the
place of massive activations are of Sun et al. 2024, arXiv:2402.17762. Drawing noise and the other image once, and not for
each image, is ours: so an image's features do not depend on what stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.hooks import blocks, watch_outputs
from regvit.models.tokens import TokenLayout
from regvit.registers.cures.given import Given
from regvit.registers.cures.mixins import edit_output


class _Replace(nn.Module):
    """Tokens with constant registers."""

    def __init__(self, layout: TokenLayout, content: Float[Tensor, "r d"]):
        super().__init__()
        self.layout = layout
        self.register_buffer("content", content, persistent=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        content = self.content.to(x.dtype).expand(x.shape[0], -1, -1)
        return self.layout.with_registers(x, content)


@torch.inference_mode()
def calibrate(
    model: nn.Module, batches: Iterable[Float[Tensor, "b 3 h w"]], given: Given, content: str
) -> dict[str, Tensor]:
    """`content` (l, r, d): what the registers shall hold after each block.

    Raises:
        ValueError: the model has no registers.
    """
    layout, every = _with_registers(model), dict(enumerate(blocks(model)))
    seen: dict[int, list[Tensor]] = {layer: [] for layer in every}
    parameter = next(model.parameters())
    with watch_outputs(every, lambda layer, x: seen[layer].append(layout.registers(x).float().cpu())):
        for images in batches:
            model.forward_features(images.to(parameter.device, parameter.dtype))
    held = torch.stack([torch.cat(parts) for parts in seen.values()]).double()  # (l, b, r, d)
    generator = torch.Generator().manual_seed(given.seed)
    if content == "other":
        return {"content": held[:, int(torch.randint(held.shape[1], (), generator=generator))]}
    mean = held.mean(1)
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64) if content == "noise" else 0
    return {"content": mean + held.std(1, correction=0) * noise}


def apply(model: nn.Module, given: Given, content: str) -> None:
    """Replaces the registers at the output of every block.

    Raises:
        ValueError: the model has no registers.
    """
    layout, device = _with_registers(model), next(model.parameters()).device
    for block, held in zip(blocks(model), given.measured["content"].float().to(device), strict=True):
        edit_output(block, _Replace(layout, held))


def _with_registers(model: nn.Module) -> TokenLayout:
    layout = TokenLayout.of(model)
    if not layout.num_registers:
        raise ValueError(
            f"{type(model).__name__} has no registers, trained or test-time, so there is no content to replace: add test-time "
            "registers first, or take a backbone with trained ones"
        )
    return layout
