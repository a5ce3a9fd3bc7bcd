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

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.hooks import blocks, output_projection
from regvit.models.tokens import TokenLayout
from regvit.registers.mixed_class import Mixed, mix, unmix
from regvit.registers.test_time import checked_neurons
from regvit.registers.treatable import uncompiled


def mlp_widths(model: nn.Module, layers: Iterable[int]) -> dict[int, int]:
    """How many neurons the MLPs of these blocks have."""
    every = blocks(model)
    return {layer: output_projection(every[layer]).in_features for layer in layers}


class _Silenced(Mixed):
    """An MLP's output projection that sees nothing of the ablated neurons at the patches."""

    def forward(self, x: Float[Tensor, "b n k"]) -> Float[Tensor, "b n d"]:
        return super().forward(silence(x, self.ablated_neurons, self.silenced_layout))


def silence(x: Float[Tensor, "b n k"], index: Tensor, layout: TokenLayout) -> Float[Tensor, "b n k"]:
    """A copy of `x` in which the neurons `index` are zero at all patches; prefix tokens keep theirs."""
    chosen = x[..., index]  # (b, n, u)
    kept = layout.test_time_registers(chosen)
    return x.index_copy(2, index, layout.join(chosen, kept, torch.zeros_like(layout.patches(chosen))))


def ablate(model: nn.Module, neurons: Mapping[int, Iterable[int]]) -> None:
    """Silences neurons at all patches, in place, until `remove_ablation`; copies, compiled models and exports follow.

    Args:
        model: any timm ViT without test-time registers.
        neurons: `{layer: [neuron, …]}`; the indices move with the model from device to device, but into no state dict.
    Raises:
        ValueError: the model has test-time registers or is ablated already, or a neuron is out of range.
    """
    model = uncompiled(model)
    if getattr(model, "test_time_registers", None) is not None:
        raise ValueError("the model has test-time registers, which hold these neurons' activation; remove them first")
    if getattr(model, "ablated_layers", None) is not None:
        raise ValueError("neurons of the model are ablated already; call remove_ablation(model) first")
    every, layout = blocks(model), TokenLayout.of(model)
    indices = checked_neurons(model, neurons)
    for layer, units in indices.items():
        projection = output_projection(every[layer])
        index = torch.tensor(units, device=projection.weight.device)
        projection.register_buffer("ablated_neurons", index, persistent=False)
        mix(projection, _Silenced, silenced_layout=layout)
    model.ablated_layers = tuple(indices)


def remove_ablation(model: nn.Module) -> None:
    """Undoes `ablate`; a model that is not ablated is left alone."""
    model = uncompiled(model)
    if getattr(model, "ablated_layers", None) is None:
        return
    for module in model.modules():
        unmix(module, _Silenced)
        if "ablated_neurons" in module._buffers:
            delattr(module, "ablated_neurons")
            module._non_persistent_buffers_set.discard("ablated_neurons")
    del model.ablated_layers


@contextmanager
def ablated(model: nn.Module, neurons: Mapping[int, Iterable[int]]) -> Iterator[None]:
    """`ablate`, inside the `with` block only."""
    ablate(model, neurons)
    try:
        yield
    finally:
        remove_ablation(model)
