"""The model with a linear head on one of its readouts, as it is trained."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.tokens import TokenLayout

INITIAL = 0.01  # standard deviation of the head's first weights, as of the probes


class ReadoutClassifier(nn.Module):
    """Logits of images by [CLS; mean of registers] and the like, after `forward_features`.

    Args:
        readout: parts of `_PARTS`, by the names that the stage `probe` gives them.
        seed: of the head's first weights.
    Raises:
        ValueError: the model has no CLS or no registers, and the readout needs them.
    """

    def __init__(self, model: nn.Module, readout: str, n_classes: int, seed: int = 0):
        super().__init__()
        self.model, self.layout = model, TokenLayout.of(model)
        self.parts = {"cls_reg": ("cls", "reg_mean"), "cls_patch": ("cls", "patch_mean")}.get(readout, (readout,))
        lacking = {"cls": not self.layout.cls, "reg_mean": not self.layout.num_registers}
        if missing := [part for part in self.parts if lacking.get(part)]:
            raise ValueError(f"train.readout is {readout!r}, but the model has no {missing[0]}; take another readout")
        self.head = nn.Linear(len(self.parts) * model.num_features, n_classes)
        with torch.no_grad():
            self.head.weight.normal_(std=INITIAL, generator=torch.Generator().manual_seed(seed))
            self.head.bias.zero_()

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c"]:
        tokens = self.model.forward_features(images)
        read = {
            "cls": self.layout.cls_token,
            "reg_mean": lambda x: self.layout.registers(x).mean(1),
            "patch_mean": lambda x: self.layout.patches(x).mean(1),
        }
        return self.head(torch.cat([read[part](tokens) for part in self.parts], dim=1))
