"""What cures put into a model: modules that edit the output of another, without a hook and without a weight.

As with test-time registers, a module is given a class made from its own (`regvit.registers.mixed_class`). What edits it is
a child without parameters, whose tensors are buffers outside the state dict: they move with the model, and copies,
`torch.compile` and `torch.export` follow.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from regvit.models.hooks import blocks
from regvit.models.tokens import TokenLayout
from regvit.registers.mixed_class import Mixed, mix, unmix
from regvit.registers.outliers import Detection


class CureMixin(Mixed):
    """Base of the mixins of cures, by which they are told from those of test-time registers."""

    holds: tuple[str, ...] = ()  # attributes that go with the mixin


class _EditedOutput(CureMixin):
    """A module whose output is edited."""

    holds = ("output_edits",)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        x = super().forward(x, *args, **kwargs)
        for edit in self.output_edits:
            x = edit(x)
        return x


def edit_output(module: nn.Module, edit: nn.Module) -> None:
    """From now on the module's output is `edit` of it; of several edits, the first one comes first."""
    if not isinstance(module, _EditedOutput):
        mix(module, _EditedOutput, output_edits=nn.ModuleList())
    module.output_edits.append(edit)


def take_out(model: nn.Module) -> None:
    """Gives all modules that a cure has edited their own classes back."""
    for module in list(model.modules()):
        while isinstance(module, CureMixin):
            held = type(module).mixin.holds
            unmix(module, CureMixin)
            for name in held:
                delattr(module, name)


class ToldOutliers:
    """Which patches of the batch that is going through are outliers: told at the detection block, and read after it."""

    patches: Bool[Tensor, "b p"]


class _Tell(nn.Module):
    """Tells the outliers among tokens, and lets these through as they are."""

    def __init__(self, layout: TokenLayout, threshold: float, told: ToldOutliers):
        super().__init__()
        self.layout, self.threshold, self.told = layout, threshold, told

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        self.told.patches = over(self.layout.patches(x), self.threshold)
        return x


def tell_outliers(model: nn.Module, detection: Detection) -> ToldOutliers:
    """Where the outliers of each batch will stand, once it has passed the detection block."""
    told = ToldOutliers()
    edit_output(blocks(model)[detection.layer], _Tell(TokenLayout.of(model), detection.threshold, told))
    return told


def over(patches: Float[Tensor, "b p d"], threshold: float) -> Bool[Tensor, "b p"]:
    """Which patches are outliers, as `regvit.registers.outliers` counts them."""
    return patches.float().norm(dim=-1) > threshold


class PatchEdit(nn.Module):
    """An edit of the patches alone; a subclass has `patches(x)`, and prefix tokens stay as they are."""

    def __init__(self, layout: TokenLayout):
        super().__init__()
        self.layout = layout

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.layout.with_patches(x, self.patches(self.layout.patches(x)))
