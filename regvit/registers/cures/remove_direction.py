"""`remove_direction`: patches lose their component along one direction where the detection block puts them out.

    x ← x − u (u · x),   for every patch, outlier or not

`direction: singular`: u is the first left singular vector of A_l … A_1 A_0, the blocks up to the detection block as linear
maps, x ↦ A_k x without constants:

    A_k = (I + S₂ M W₂ C) (I + S₁ O V W₁ C)

with C = I − 11ᵀ/d the centring of LayerNorm, W its scale, V and O the value and output projections (each token attends to
itself), S the LayerScale, and M the linear map nearest to the MLP on standard normal inputs. It is a fact of the weights
alone: no image is looked at. `direction: outliers` takes the mean of outliers minus the mean of other patches over images.

Source: Wang et al. 2024 (SINDER), arXiv:2407.16826, and its `singular_defect.py` (100,000 normal inputs; here `samples`).
There the model is fine-tuned until its outliers lose that direction; projecting it out is ours, and so is `outliers`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.hooks import blocks, forward_until, output_projection, residual_scale, watch_outputs
from regvit.models.token_features import project
from regvit.models.tokens import TokenLayout
from regvit.registers.cures.given import Given
from regvit.registers.cures.mixins import PatchEdit, edit_output, over

CHUNK = 2_000  # normal inputs at a time


class _Project(PatchEdit):
    def __init__(self, layout: TokenLayout, direction: Float[Tensor, " d"]):
        super().__init__(layout)
        self.register_buffer("direction", direction, persistent=False)

    def patches(self, x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        u = self.direction
        along = (x.float() * u).sum(-1, keepdim=True)  # no matrix product, whose sums may depend on the batch
        return (x.float() - along * u).to(x.dtype)


def calibrate(
    model: nn.Module, batches: Iterable[Float[Tensor, "b 3 h w"]], given: Given, direction: str, samples: int
) -> dict[str, Tensor]:
    """`direction` (d), of length 1.

    Raises:
        ValueError: a block cannot be linearised, or no patch of the images is an outlier.
    """
    if direction == "singular":
        return {"direction": singular_direction(model, given.detection.layer, samples, given.seed)}
    return {"direction": _outlier_direction(model, batches, given)}


def apply(model: nn.Module, given: Given, direction: str, samples: int) -> None:
    """Projects the direction that was measured out at the detection block."""
    block = blocks(model)[given.detection.layer]
    found = given.measured["direction"].float().to(next(model.parameters()).device)
    edit_output(block, _Project(TokenLayout.of(model), found))


@torch.no_grad()
def singular_direction(model: nn.Module, layer: int, samples: int = 20_000, seed: int = 0) -> Float[Tensor, " d"]:
    """The first left singular vector of the linearised blocks 0 to `layer`; its entry of largest size is positive.

    Raises:
        ValueError: a block normalises elsewhere than before attention and MLP, or its values cannot be read.
    """
    generator, product = torch.Generator().manual_seed(seed), None
    for block in blocks(model)[: layer + 1]:
        linear = linearised(block, samples, generator)
        product = linear if product is None else linear @ product
    u = torch.linalg.svd(product)[0][:, 0]
    return (u * u[u.abs().argmax()].sign()).float()


def linearised(block: nn.Module, samples: int, generator: torch.Generator) -> Float[Tensor, "d d"]:
    """A block as a linear map of one token, float64 on the CPU; see the head of the file.

    Raises:
        ValueError: the block is not one of attention and MLP, each after a norm of its own.
    """
    parts = [getattr(block, name, None) for name in ("norm1", "attn", "norm2", "mlp")]
    attention = parts[1]
    if None in parts or not isinstance(getattr(attention, "proj", None), nn.Linear) or hasattr(block, "norm3"):
        raise ValueError(
            f"{type(block).__name__} is not attention and MLP, each after its norm, so it has no such linear map; set "
            "direction: outliers"
        )
    mlp_scale = residual_scale(block)  # raises where the norms come after
    weight = attention.proj.weight
    width = weight.shape[0]
    eye, zero = torch.eye(width, device=weight.device, dtype=weight.dtype), weight.new_zeros(1, width)

    def attended(x: Tensor) -> Tensor:
        return attention.proj(project(attention, x, "v"))

    attend = (attended(eye) - attended(zero)).T.double().cpu()
    inputs = torch.randn(samples, width, generator=generator)
    bias = output_projection(block).bias
    square, cross = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for x in inputs.split(CHUNK):
        y = block.mlp(x[None].to(weight))[0] - (0 if bias is None else bias)
        square += (x.T @ x).double()
        cross += (x.T @ y.float().cpu()).double()
    mlp = torch.linalg.solve(square, cross).T
    identity = torch.eye(width, dtype=torch.float64)
    first = identity + _scaled(_attention_scale(block), attend @ _normed(block.norm1, width))
    return (identity + _scaled(mlp_scale, mlp @ _normed(block.norm2, width))) @ first


def _normed(norm: nn.Module, width: int) -> Float[Tensor, "d d"]:
    """A norm as a linear map: its scale after centring, which RMSNorm does not do."""
    centred = torch.eye(width, dtype=torch.float64) - (1 / width if isinstance(norm, nn.LayerNorm) else 0)
    weight = getattr(norm, "weight", None)
    return centred if weight is None else weight.detach().double().cpu()[:, None] * centred


def _attention_scale(block: nn.Module) -> Tensor | float:
    for owner, name in ((getattr(block, "ls1", None), "gamma"), (block, "gamma_1")):
        if isinstance(gamma := getattr(owner, name, None), Tensor):
            return gamma.detach()
    return 1.0


def _scaled(scale: Tensor | float, linear: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    return linear * scale if isinstance(scale, float) else scale.double().cpu()[:, None] * linear


@torch.inference_mode()
def _outlier_direction(
    model: nn.Module, batches: Iterable[Float[Tensor, "b 3 h w"]], given: Given
) -> Float[Tensor, " d"]:
    block, layout = blocks(model)[given.detection.layer], TokenLayout.of(model)
    parameter, seen = next(model.parameters()), []
    out = rest = torch.zeros(())
    counts = [0, 0]
    with watch_outputs({0: block}, lambda _, x: seen.append(layout.patches(x))):
        for images in batches:
            forward_until(model, images.to(parameter.device, parameter.dtype), block)
            x = seen.pop()
            outliers = over(x, given.detection.threshold)
            out = out + x[outliers].double().sum(0).cpu()
            rest = rest + x[~outliers].double().sum(0).cpu()
            counts = [counts[0] + int(outliers.sum()), counts[1] + int((~outliers).sum())]
    if not all(counts):
        raise ValueError(
            f"{counts[0]} of {sum(counts)} patches are outliers, so they differ from no others; give more images"
        )
    return nn.functional.normalize(out / counts[0] - rest / counts[1], dim=0).float()
