"""Register neurons put into a model on purpose: ground truth for finding and moving them.

A few of the quietest MLP units of two blocks are overwritten, so that the model makes outlier tokens as large models
do: patches of low information whose norm explodes and which draw the attention of CLS.

- **Seeds** (block s): fire on low-information patches, and write a little along a direction d.
- **Amplifiers** (block a > s): fire on what the seeds wrote, and write the large norm along d.
- **d** is chosen so that later CLS queries give an outlier a wanted share of their attention, while its values stay
  quiet. With trained weights no attention weight is edited; random weights need rank-1 edits of the keys (`edit_keys`).

Everything is reckoned in float64, and what is equal but for rounding counts as equal, so that every processor plants the
same weights, to their last digit.

Notation: x residual stream, D its width, h = norm2(x) the input of `mlp.fc1`, a = GELU(fc1(h)) the neurons. A unit u of
a block with LayerScale g writes g * W2[:, u] * a_u.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regvit.models.hooks import blocks, forward_until, residual_scale, watch_inputs, watch_outputs
from regvit.models.tokens import TokenLayout
from regvit.registers.neighbourhood import low_information
from regvit.registers.planting.sink import attention_targets, edited_sink, trained_sink
from regvit.registers.planting.units import Writers, within_image_direction, write_amplifiers, write_seeds

SEED_RATIO = 8.0  # norm that the seeds write, in median patch norms of their block
NUDGE_DIRECTIONS = 3  # of the moves that an empty register causes, besides their mean: seeds are blind to them


@dataclass(frozen=True)
class PlantingRecipe:
    """What to plant.

    Args:
        seed_layer: block of the seeds.
        amplifier_layer: block of the amplifiers, after the seeds' and before the last.
        cls_share: share of the CLS query's attention that one outlier should take in the later blocks, in (0, 1); the
            knob of how much damage is done. What CLS then gives to all outliers of an image is more.
        fraction: wanted share of outlier patches, in (0, 0.2]; what comes out is near it.
        ratio: norm that the amplifiers write, in median patch norms of the last block but one.
        num_seeds, num_amplifiers: units to overwrite.
        edit_keys: also edit the keys of the later blocks (rank 1 each), for models with random weights, whose queries
            share no direction that could be used.
        seed: of the small differences between seeds, and of the lot among patches that are equal.
    """

    seed_layer: int
    amplifier_layer: int
    cls_share: float = 0.2
    fraction: float = 0.02
    ratio: float = 10.0
    num_seeds: int = 3
    num_amplifiers: int = 3
    edit_keys: bool = False
    seed: int = 0

    @property
    def units(self) -> dict[int, int]:
        """How many units to overwrite, by block."""
        return {self.seed_layer: self.num_seeds, self.amplifier_layer: self.num_amplifiers}


@dataclass(frozen=True)
class Planted:
    """What planting did to a model.

    Attributes:
        neurons: `{layer: [neuron, …]}`, seeds and amplifiers, sorted.
        replaced: the values before, of every tensor that was edited, by its name in the state dict.
        outlier_fraction: share of the patches of the given images on which the first seed fires.
    """

    neurons: dict[int, list[int]]
    replaced: dict[str, Tensor]
    outlier_fraction: float


@dataclass(frozen=True)
class _Survey:
    """What one pass over the unplanted model saw. Norms are medians over patches; loudness is E|a_u| |g * W2[:, u]|."""

    median_norm: dict[int, float]
    loudness: dict[int, Float[Tensor, " k"]]
    normed: dict[int, Float[Tensor, "b n d"]]
    hidden: Float[Tensor, "b n d"]


@torch.no_grad()
def plant(model: nn.Module, images: Float[Tensor, "b 3 s s"], batch_size: int = 8, **recipe: object) -> Planted:
    """Plants register neurons into a timm ViT, in place; a float64 copy of it is held meanwhile.

    Args:
        model: float32 ViT on the CPU with pre-norm blocks and a GELU MLP, with or without CLS, registers, LayerScale.
        images: normalised; a hundred of the kind that the model will see.
        batch_size: images per forward; changes nothing but rounding.
        recipe: see `PlantingRecipe`; its two layers have no default.
    Raises:
        ValueError: the model, the images or a parameter do not allow it; the model is left as it was.
    """
    recipe = PlantingRecipe(**recipe)
    _check(model, images, recipe)
    exact, images = copy.deepcopy(model).double(), images.double()
    neurons, edited, hot = _write(exact, images, recipe, batch_size)
    replaced = {name: model.get_parameter(name).clone() for name in edited}
    for name in edited:
        model.get_parameter(name).copy_(exact.get_parameter(name))
    return Planted({layer: sorted(units) for layer, units in neurons.items()}, replaced, hot.double().mean().item())


def _write(
    model: nn.Module, images: Float[Tensor, "b 3 s s"], recipe: PlantingRecipe, batch_size: int
) -> tuple[dict[int, list[int]], list[str], Bool[Tensor, "b p"]]:
    """Writes the units into the model; which they are, the names of the tensors edited, and the seeds' patches."""
    layout, seeds_at, amplifiers_at = TokenLayout.of(model), recipe.seed_layer, recipe.amplifier_layer
    survey = _survey(model, images, recipe, batch_size)
    neurons = {
        layer: survey.loudness[layer].argsort(stable=True)[:count].tolist() for layer, count in recipe.units.items()
    }
    targets = attention_targets(model, survey.normed, layout, recipe.cls_share)
    direction = edited_sink(model, targets) if recipe.edit_keys else trained_sink(model, targets)
    info = low_information(model, images, batch_size)
    few, more = (_lowest(info, share, recipe.seed) for share in (recipe.fraction, 3 * recipe.fraction))
    unseen = _empty_register_shift(model, images, survey.hidden, few, seeds_at, batch_size)
    base = within_image_direction(layout.patches(survey.hidden), more, layout.prefix_tokens(survey.hidden), unseen)
    every = blocks(model)
    seeds = Writers(every[seeds_at], neurons[seeds_at], SEED_RATIO * survey.median_norm[seeds_at], direction)
    hot = write_seeds(seeds, base, survey.hidden, layout, recipe.fraction, recipe.seed)
    block, norm = every[amplifiers_at], recipe.ratio * survey.median_norm[len(every) - 2]
    hidden = _inputs(model, images, {"fc1": block.mlp.fc1}, block.mlp.fc1, batch_size)["fc1"]
    write_amplifiers(Writers(block, neurons[amplifiers_at], norm, direction), hidden, hot, layout)
    edited = [f"blocks.{layer}.mlp.{part}" for layer in neurons for part in ("fc1.weight", "fc1.bias", "fc2.weight")]
    if recipe.edit_keys:
        edited += [f"blocks.{layer}.attn.qkv.weight" for layer in survey.normed]
    return neurons, edited, hot


@torch.no_grad()
def unplant(model: nn.Module, replaced: Mapping[str, Tensor]) -> None:
    """Gives back the values before planting, in place and exactly.

    Args:
        replaced: as in `Planted.replaced`.
    Raises:
        ValueError: a name or shape is not one of the model's; nothing is changed.
    """
    own = dict(model.named_parameters())
    for name, value in replaced.items():
        if name not in own or own[name].shape != value.shape:
            raise ValueError(f"{name} of shape {tuple(value.shape)} is not a parameter of this {type(model).__name__}")
    for name, value in replaced.items():
        own[name].copy_(value)


def _lowest(info: Float[Tensor, "b p"], share: float, seed: int) -> Bool[Tensor, "b p"]:
    """The share of each image's patches, at least one, that carry the least information; equal ones are drawn by lot.

    Patches of one colour differ in the last digits alone, and in those by processor.
    """
    lot = torch.rand(info.shape, generator=torch.Generator().manual_seed(seed), dtype=info.dtype)
    wanted = max(1, round(share * info.shape[1]))
    chosen = (info.round(decimals=6) + 1e-7 * lot).topk(wanted, dim=1).indices
    return torch.zeros_like(info, dtype=torch.bool).scatter_(1, chosen, True)


def _empty_register_shift(
    model: nn.Module,
    images: Tensor,
    hidden: Float[Tensor, "b n d"],
    patches: Bool[Tensor, "b p"],
    layer: int,
    batch_size: int,
) -> Float[Tensor, "m d"]:
    """How one more, empty token moves some patches' inputs of a block's MLP: the mean move, and its main variation.

    A zero token takes its share of attention like any other. Seeds that noticed would fall silent when a register is
    added in which nothing was put, and the cure would seem to work without moving a single neuron. What counts are the
    patches on which seeds fire: flat ones give the empty token more of their attention than others do.
    """
    layout = TokenLayout.of(model)

    def insert(_: int, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        return torch.cat([layout.prefix_tokens(x), torch.zeros_like(x[:, :1]), layout.patches(x)], dim=1)

    fc1 = blocks(model)[layer].mlp.fc1
    with watch_inputs({0: blocks(model)[0]}, insert):
        nudged = _inputs(model, images, {"fc1": fc1}, fc1, batch_size)["fc1"]
    moved = (nudged[:, layout.prefix + 1 :] - layout.patches(hidden))[patches]
    mean = moved.mean(0, keepdim=True)
    main = torch.linalg.eigh(torch.cov(moved.T))[1][:, -NUDGE_DIRECTIONS:].T
    return torch.cat([mean, main])


def _survey(model: nn.Module, images: Tensor, recipe: PlantingRecipe, batch_size: int) -> _Survey:
    """All that is asked of the unplanted model, in one pass over the images."""
    all_blocks, layout = blocks(model), TokenLayout.of(model)
    before_last = len(all_blocks) - 2
    later = range(recipe.amplifier_layer + 1, len(all_blocks))
    norms = {recipe.seed_layer: [], before_last: []}
    activity = {layer: [] for layer in recipe.units}
    taken = {("qkv", layer): all_blocks[layer].attn.qkv for layer in later}
    taken["fc1"] = all_blocks[recipe.seed_layer].mlp.fc1
    with (
        watch_outputs(
            {layer: all_blocks[layer] for layer in norms},
            lambda layer, x: norms[layer].append(layout.patches(x).norm(dim=-1).flatten()),
        ),
        watch_inputs(
            {layer: all_blocks[layer].mlp.fc2 for layer in activity},
            lambda layer, a: activity[layer].append(a.abs().sum((0, 1))),
        ),
    ):
        inputs = _inputs(model, images, taken, all_blocks[-1].attn.qkv, batch_size)
    tokens = inputs["fc1"].shape[0] * inputs["fc1"].shape[1]
    loudness = {}
    for layer, sums in activity.items():
        column = (residual_scale(all_blocks[layer]) * all_blocks[layer].mlp.fc2.weight.T).norm(dim=1)  # (k,)
        loudness[layer] = torch.stack(sums).sum(0) / tokens * column
    return _Survey(
        {layer: torch.cat(seen).median().item() for layer, seen in norms.items()},
        loudness,
        {layer: inputs["qkv", layer] for layer in later},
        inputs["fc1"],
    )


def _inputs(model: nn.Module, images: Tensor, modules: Mapping, last: nn.Module, batch_size: int) -> dict:
    """The inputs of modules over all images; the forward ends after `last`."""
    seen = {key: [] for key in modules}
    with watch_inputs(modules, lambda key, x: seen[key].append(x.detach())):
        for batch in images.split(batch_size):
            forward_until(model, batch, last)
    return {key: torch.cat(parts) for key, parts in seen.items()}


def _check(model: nn.Module, images: Tensor, recipe: PlantingRecipe) -> None:
    """Refuses what cannot be planted, with the reason.

    Raises:
        ValueError: as the message says.
    """
    all_blocks, name = blocks(model), type(model).__name__
    depth = len(all_blocks)
    if not 0 <= recipe.seed_layer < recipe.amplifier_layer < depth - 1:
        raise ValueError(
            f"seed_layer {recipe.seed_layer} and amplifier_layer {recipe.amplifier_layer} must satisfy 0 <= seed_layer < "
            f"amplifier_layer < {depth - 1}: amplifiers fire on what seeds wrote, and a later block must attend to it"
        )
    if not 0 < recipe.cls_share < 1 or not 0 < recipe.fraction <= 0.2:
        raise ValueError(f"cls_share {recipe.cls_share} must lie in (0, 1) and fraction {recipe.fraction} in (0, 0.2]")
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or images.device.type != "cpu":
        raise ValueError(
            f"the model is {weight.dtype} on {weight.device} and the images on {images.device}; expected float32 on the "
            "CPU, where planting gives the same weights every time: model.cpu().float(), images.cpu()"
        )
    if len(images) < 2:
        raise ValueError(f"{len(images)} image(s) cannot show what differs between images; give a hundred")
    if getattr(model, "test_time_registers", None) is not None:
        raise ValueError("the model has test-time registers; call remove_test_time_registers(model) before planting")
    if getattr(model, "rope", None) is not None:
        raise ValueError(f"{name} rotates keys by position, so one direction is no sink for all patches")
    for layer, count in recipe.units.items():
        if reason := _unfit_mlp(all_blocks[layer], count):
            raise ValueError(f"block {layer} of {name} cannot take register neurons: {reason}")
    for layer in range(recipe.amplifier_layer + 1, depth):
        if reason := _unfit_attention(all_blocks[layer]):
            raise ValueError(f"block {layer} of {name} has no attention to aim at: {reason}")


def _unfit_mlp(block: nn.Module, count: int) -> str | None:
    """Why `count` units of a block's MLP cannot be overwritten, or None."""
    mlp = getattr(block, "mlp", None)
    fc1, fc2 = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    if not isinstance(fc1, nn.Linear) or not isinstance(fc2, nn.Linear) or fc1.out_features != fc2.in_features:
        return "its MLP is not fc1, activation, fc2 (gated MLPs multiply two units)"
    if not isinstance(mlp.act, nn.GELU) or fc1.bias is None:
        return "its MLP needs GELU and a bias, to be silent below a threshold"
    if not 1 <= count <= fc2.in_features:
        return f"it has {fc2.in_features} neurons, {count} were to be overwritten"
    return None


def _unfit_attention(block: nn.Module) -> str | None:
    """Why the attention of a block cannot be reckoned with, or None."""
    attn, norm = getattr(block, "attn", None), getattr(block, "norm1", None)
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return "its norm1 is not a LayerNorm with weight and bias"
    if not isinstance(getattr(attn, "qkv", None), nn.Linear):
        return "its attention has no joint qkv projection"
    if not isinstance(getattr(attn, "q_norm", nn.Identity()), nn.Identity):
        return "its queries and keys are normalised"
    return None
