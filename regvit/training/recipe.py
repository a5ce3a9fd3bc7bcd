"""How a backbone is trained: which of its weights, by which rates, on what readout.

AdamW (β 0.9, 0.999) on cross-entropy with label smoothing; the rate η of each part goes linearly up and then by a cosine to 0,

    η(t) = η · min(1, (t + 1) / warmup) · ½ (1 + cos(π t / steps)),   t = 0 … steps − 1

and is, in the backbone, layer_decay^(layers above) of `learning_rate`. That is BEiT's recipe of fine-tuning (Bao et al. 2022,
arXiv:2106.08254) with timm's groups; neither bias, norms nor tokens decay. New registers have a rate of their own, since a
token that must grow from nothing wants steps a hundred times as large as trained weights do, as in prompt tuning (Jia et al.
2022, arXiv:2203.12119).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from timm.optim import param_groups_layer_decay
from torch import nn

from regvit.models.hooks import blocks

READOUTS = ("cls", "reg_mean", "patch_mean", "cls_reg", "cls_patch")
FINAL = ("norm", "fc_norm")  # what stands behind the last block


@dataclass(frozen=True)
class Recipe:
    """The settings.

    Attributes:
        steps, batch_size: updates, and images of each.
        registers: that are added.
        unfreeze: `all`; `last_<n>`: the last n blocks and the norm behind them; `none`: the new registers alone.
        readout: what the head sees; one of `READOUTS`, of the tokens that `forward_features` returns.
        learning_rate, token_learning_rate, head_learning_rate: of the backbone's last layer, the new registers, the head.
        layer_decay, weight_decay, label_smoothing: see above.
        warmup: steps.
        crop_scale: least share of an image's area that a random crop keeps; 1 with no flip and jitter: no augmentation.
        flip: half of the crops are mirrored.
        colour_jitter: of brightness, contrast and saturation.
        validate_every: steps; the weights of the best top-1 on the val split are kept.
        checkpoints: steps at which norms are looked at.
        precision: `float32`, or `bfloat16` by autocast.
    """

    steps: int
    batch_size: int = 32
    registers: int = 0
    unfreeze: str = "all"
    readout: str = "cls"
    learning_rate: float = 1e-4
    token_learning_rate: float = 1e-2
    head_learning_rate: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup: int = 0
    crop_scale: float = 0.4
    flip: bool = True
    colour_jitter: float = 0.0
    validate_every: int = 50
    checkpoints: tuple[int, ...] = ()
    precision: str = "float32"

    def rate(self, step: int) -> float:
        """What every learning rate is multiplied by in a step."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def unfreeze(model: nn.Module, recipe: Recipe) -> None:
    """Lets gradients come to the parts that the recipe trains.

    Raises:
        ValueError: there are not so many blocks, or nothing would be trained.
    """
    model.requires_grad_(recipe.unfreeze == "all")
    if recipe.unfreeze.startswith("last_"):
        depth, count = len(blocks(model)), int(recipe.unfreeze.removeprefix("last_"))
        if not 1 <= count <= depth:
            raise ValueError(
                f"train.unfreeze is {recipe.unfreeze!r}, but the model has {depth} blocks; use last_1 to last_{depth}"
            )
        for part in (*blocks(model)[-count:], *(getattr(model, name, None) for name in FINAL)):
            if part is not None:
                part.requires_grad_(True)
    if recipe.registers:
        model.reg_token.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "train.unfreeze is 'none' and train.registers 0, so nothing would be trained; change one of them"
        )


def parameter_groups(model: nn.Module, head: nn.Module, recipe: Recipe) -> Iterator[dict]:
    """Groups of an optimiser with their first learning rates, `lr`; new registers and head have one each."""
    token = model.reg_token if recipe.registers else None
    if token is not None:
        token.requires_grad_(False)  # not among the layers
    layers = param_groups_layer_decay(
        model, recipe.weight_decay, model.no_weight_decay(), layer_decay=recipe.layer_decay
    )
    for group in layers:
        yield {"params": group["params"], "weight_decay": group["weight_decay"],
               "lr": recipe.learning_rate * group["lr_scale"]}  # fmt: skip
    if token is not None:
        token.requires_grad_(True)
        yield {"params": [token], "weight_decay": 0.0, "lr": recipe.token_learning_rate}
    yield {"params": list(head.parameters()), "weight_decay": recipe.weight_decay, "lr": recipe.head_learning_rate}
