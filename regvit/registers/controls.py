"""Controls: what happens when other neurons are moved, or when the right ones are silenced without a register.

A cure by test-time registers says little until its controls fail. Four are known by name:

- `empty`: the registers are there, but nothing is moved into them. One more token alone can change what neurons near
  their threshold do, and draws some attention away from the outliers: this, not the untreated model, is what the next
  two are held against;
- `random`: as many neurons of each layer, drawn from those that were not selected. Should do no more than `empty`;
- `same_activation`: in each layer the unselected neurons that fire most nearly as hard at outliers, but write less than
  `MIN_SHARE` of their excess. No more than `empty` either: it is not activity that matters, but what is written;
- `ablated`: the selected neurons are zero at all patches, and no register takes their activation over. Outliers should
  go. Where the neurons were planted this is the upper bound; elsewhere what they carried is lost to the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.hooks import blocks, output_projection
from regvit.models.tokens import TokenLayout
from regvit.registers.neurons import MIN_SHARE, Neuron

CONTROLS = ("empty", "random", "same_activation", "ablated")


def control_neurons(
    control: str,
    selected: Mapping[int, Sequence[int]],
    widths: Mapping[int, int],
    candidates: Iterable[Neuron] = (),
    seed: int = 0,
) -> dict[int, tuple[int, ...]]:
    """The neurons that a control takes instead of the selected ones: as many in each layer (`ablated`: the same, `empty`: none).

    Args:
        selected: the register neurons, `{layer: (neuron, …)}`.
        widths: neurons of each layer's MLP.
        candidates: neurons with their scores; used by `same_activation` only.
        seed: of `random`; each layer draws on its own, so that one layer more changes no other.
    Returns: `{layer: (neuron, …)}`, sorted; of `random` and `same_activation` none is among the selected.
    Raises:
        ValueError: the control is not known, or a layer has too few other neurons.
    """
    if control not in CONTROLS:
        raise ValueError(f"control is {control!r}; expected one of {', '.join(CONTROLS)}")
    if control == "empty":
        return {}
    if control == "ablated":
        return {layer: tuple(sorted(units)) for layer, units in sorted(selected.items())}
    candidates = tuple(candidates)
    chosen = {}
    for layer, units in sorted(selected.items()):
        others = np.setdiff1d(np.arange(widths[layer]), np.array(units, dtype=int))
        if len(others) < len(units):
            raise ValueError(
                f"layer {layer} has {widths[layer]} neurons, of which {len(units)} are selected: "
                f"too few are left for {len(units)} others; select fewer (identify.top_k)"
            )
        if control == "random":
            rng = np.random.default_rng([seed, layer])
            chosen[layer] = tuple(sorted(rng.choice(others, len(units), replace=False).tolist()))
        else:
            chosen[layer] = _as_active([n for n in candidates if n.layer == layer], units, layer)
    return chosen


def _as_active(scored: Sequence[Neuron], units: Sequence[int], layer: int) -> tuple[int, ...]:
    """For each selected neuron, the most active first, the unused idle writer whose activation is nearest to its own."""
    own = sorted((n for n in scored if n.neuron in set(units)), key=lambda n: (-n.activation, n.neuron))
    if missing := sorted(set(units) - {n.neuron for n in own}):
        raise ValueError(f"neuron {missing[0]} of layer {layer} is selected, but has no scores; run identify again")
    if any(n.attribution is None for n in scored):
        raise ValueError(
            "the search scored by activation only, so what a neuron writes is not known; "
            "search by attribution, or use neurons: random"
        )
    idle = [n for n in scored if n.neuron not in set(units) and abs(n.attribution) < MIN_SHARE]
    if len(idle) < len(units):
        raise ValueError(
            f"layer {layer} has {len(idle)} scored neurons that write less than {MIN_SHARE:g} of the excess, but "
            f"{len(units)} are wanted; use neurons: random, or select fewer (identify.top_k)"
        )
    chosen = []
    for neuron in own:
        nearest = min(idle, key=lambda n: (abs(n.activation - neuron.activation), n.neuron))
        idle.remove(nearest)
        chosen.append(nearest.neuron)
    return tuple(sorted(chosen))


def read_candidates(text: str) -> tuple[Neuron, ...]:
    """All neurons whose scores the identify stage wrote: the best by attribution, and the most active where it has them.

    Raises:
        ValueError: a key is missing.
    """
    document = json.loads(text)
    if "neurons" not in document:
        raise ValueError("the neurons file lacks neurons; run the identify stage again")
    entries = [*document["neurons"], *document.get("active", [])]
    return tuple({(entry["layer"], entry["neuron"]): Neuron(**entry) for entry in entries}.values())


def mlp_widths(model: nn.Module, layers: Iterable[int]) -> dict[int, int]:
    """How many neurons the MLPs of these blocks have."""
    every = blocks(model)
    return {layer: output_projection(every[layer]).in_features for layer in layers}


class _Silence:
    """MLP output-projection pre-hook that takes the ablated neurons' activation from the patches."""

    def __init__(self, layout: TokenLayout):
        self.layout = layout

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (silence(args[0], module.ablated_neurons, self.layout), *args[1:])


def silence(x: Float[Tensor, "b n k"], index: Tensor, layout: TokenLayout) -> Float[Tensor, "b n k"]:
    """A copy of `x` in which the neurons `index` are zero at all patches; prefix tokens keep theirs."""
    chosen = x[..., index]  # (b, n, u)
    kept = layout.test_time_registers(chosen)
    return x.index_copy(2, index, layout.join(chosen, kept, torch.zeros_like(layout.patches(chosen))))


def ablate(model: nn.Module, neurons: Mapping[int, Iterable[int]]) -> None:
    """Silences neurons at all patches, in place, until `remove_ablation`; copies and exports of the model follow.

    Args:
        model: any timm ViT without test-time registers.
        neurons: `{layer: [neuron, …]}`; the indices move with the model from device to device, but into no state dict.
    Raises:
        ValueError: the model has test-time registers or is ablated already, or a neuron is out of range.
    """
    if getattr(model, "test_time_registers", None) is not None:
        raise ValueError("the model has test-time registers, which hold these neurons' activation; remove them first")
    if getattr(model, "ablated_layers", None) is not None:
        raise ValueError("neurons of the model are ablated already; call remove_ablation(model) first")
    every, hook = blocks(model), _Silence(TokenLayout.of(model))
    indices = {layer: sorted({int(unit) for unit in units}) for layer, units in sorted(neurons.items())}
    for layer, units in indices.items():
        if not 0 <= layer < len(every):
            raise ValueError(
                f"layer {layer} is out of range: the model has {len(every)} blocks (0 to {len(every) - 1})"
            )
        width = output_projection(every[layer]).in_features
        if outside := [unit for unit in units if not 0 <= unit < width]:
            raise ValueError(
                f"neuron {outside[0]} of layer {layer} is out of range: its MLP has {width} (0 to {width - 1})"
            )
    for layer, units in indices.items():
        if units:
            projection = output_projection(every[layer])
            index = torch.tensor(units, device=projection.weight.device)
            projection.register_buffer("ablated_neurons", index, persistent=False)
            projection.register_forward_pre_hook(hook)
    model.ablated_layers = tuple(indices)


def remove_ablation(model: nn.Module) -> None:
    """Undoes `ablate`; a model that is not ablated is left alone."""
    if getattr(model, "ablated_layers", None) is None:
        return
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Silence)]:
            del hooks[key]
        if "ablated_neurons" in module._buffers:
            delattr(module, "ablated_neurons")
            module._non_persistent_buffers_set.discard("ablated_neurons")
    del model.ablated_layers
