"""Test-time registers: extra tokens that take over the activation of register neurons, without training.

K zero tokens are inserted right after the existing prefix tokens, before block 0, and `num_prefix_tokens` is raised
wherever timm keeps it, so that pooling, `forward_intermediates` and rotary embeddings go on working by themselves.
Then, at the input a of each block's MLP output projection, for every register neuron u of that block:

    a[register, u] = scale * m_u          a[patch, u] = 0

where m_u is the activation of largest magnitude, with its sign, over the image's patches and test-time registers.
CLS and trained registers take no part and are not edited. Source: Jiang et al. 2025, arXiv:2506.08010.

No weight is touched. The model's parameters, its state dict and what an optimiser holds of it are those of the plain model
before, while and after it has the registers; so they may be saved, loaded, moved, cast, resized and trained meanwhile, and
the registers stay zero where they enter block 0: they have no gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regvit.models.hooks import blocks, output_projection
from regvit.models.tokens import TokenLayout
from regvit.registers.insertion import OfRegisters, insert_zero_tokens
from regvit.registers.mixed_class import mix, unmix
from regvit.registers.neurons import RegisterNeurons
from regvit.registers.treatable import check_treatable, uncompiled

STATISTICS = ("per_neuron", "per_neuron_patches", "reference")
PATCH_TREATMENTS = ("zero", "mean", "only_outliers", "same")
MAX_REGISTERS = 64  # more tokens than any model was trained with; a mistyped number would take all memory


@dataclass
class TestTimeRegisters:
    """What was done to a model; a `with` block undoes it at its end."""

    __test__ = False  # pytest would take the name for a test class

    model: nn.Module = field(repr=False)
    num_registers: int
    neurons: dict[int, tuple[int, ...]]

    @property
    def layout(self) -> TokenLayout:
        """Where the tokens of the model as it now is stand."""
        return TokenLayout.of(self.model)

    def remove(self) -> None:
        """Takes the registers out of the model; whatever else was done to it meanwhile stays."""
        remove_test_time_registers(self.model)

    def __enter__(self) -> TestTimeRegisters:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@dataclass(frozen=True)
class Surgery:
    """The record left on the model as `model.test_time_registers`: enough to undo the surgery, also on a deep copy.

    Args:
        layout: before the surgery.
        counted: the modules whose `num_prefix_tokens` was raised.
        removable: False where the registers are baked in (`regvit.registers.export`).
    """

    num_registers: int
    layout: TokenLayout
    counted: tuple[str, ...]
    removable: bool = True


@dataclass(frozen=True)
class Shift:
    """How activation is moved, see `shift`."""

    layout: TokenLayout
    statistic: str = "per_neuron"
    patches: str = "zero"
    scale: float = 1.0


class _Shifting(OfRegisters):
    """An MLP's output projection that first moves the register neurons' activation into the registers."""

    def forward(self, x: Float[Tensor, "b n k"]) -> Float[Tensor, "b n d"]:
        how = self.shift
        return super().forward(shift(x, self.register_neurons, how.layout, how.statistic, how.patches, how.scale))


def signed_max(x: Tensor, dim: int) -> Tensor:
    """The value of largest magnitude along `dim`, with its sign; the positive one of a tie."""
    high, low = x.amax(dim), x.amin(dim)
    return torch.where(high >= -low, high, low)


def shift(
    x: Float[Tensor, "b n k"],
    index: Int[Tensor, " u"],
    layout: TokenLayout,
    statistic: str = "per_neuron",
    patches: str = "zero",
    scale: float = 1.0,
) -> Float[Tensor, "b n k"]:
    """Moves the activation of neurons `index` from the patches into the test-time registers.

    Args:
        x: input of the MLP's output projection, all tokens.
        layout: with at least one test-time register.
        statistic: what a register gets, one value an image and a neuron.
            `per_neuron`: largest magnitude over patches and test-time registers.
            `per_neuron_patches`: over patches only, as the paper words it.
            `reference`: over all neurons in `index` and all tokens, CLS included, as the published code does it.
        patches: what the patches keep. `zero`: nothing; `mean`: their mean; `only_outliers`: those above mean +
            standard deviation get the mean; `same`: everything.
        scale: factor on the register's value.
    Returns: a new tensor; all neurons but `index`, and all of CLS and trained registers, are as in `x`.
    Source: Jiang et al. 2025, arXiv:2506.08010, section 4, and its code for `reference`.
    """
    chosen = x[..., index]  # (b, n, u)
    values = layout.patches(chosen)
    if statistic == "per_neuron":
        peak = signed_max(layout.untrained(chosen), 1)
    elif statistic == "per_neuron_patches":
        peak = signed_max(values, 1)
    else:
        peak = signed_max(chosen.flatten(1), 1)[:, None].expand(-1, chosen.shape[-1])
    if patches == "zero":
        values = torch.zeros_like(values)
    elif patches == "mean":
        values = values.mean(1, keepdim=True).expand_as(values)
    elif patches == "only_outliers":
        mean = values.mean(1, keepdim=True)
        values = torch.where(values > mean + values.std(1, keepdim=True), mean, values)
    registers = (scale * peak)[:, None].expand(-1, layout.test_time, -1)
    return x.index_copy(2, index, layout.join(chosen, registers, values).to(x.dtype))


def add_test_time_registers(
    model: nn.Module,
    neurons: RegisterNeurons | Mapping,
    num_registers: int = 1,
    *,
    statistic: str = "per_neuron",
    patches: str = "zero",
    scale: float = 1.0,
) -> TestTimeRegisters:
    """Adds test-time registers to a timm vision transformer, in place.

    The model may be fine-tuned with them, as any other: no optimiser needs to be made anew, and `state_dict()` is that of
    the plain model. What was compiled of the model before is compiled anew when it next runs; `torch.compile` may also
    come after. Wrap in DistributedDataParallel or export to other formats after the registers were added.

    Args:
        model: any timm ViT (ViT, DeiT, DINOv2, DINOv3, EVA, CLIP, SigLIP, …), on any device, of any dtype.
        neurons: what `find_register_neurons` returned, the document that it writes (as `json.load` gives it), or
            `{layer: [neuron, …]}`. Where a search found none, a warning says so and the model stays as it is; `{}` adds
            registers that nothing writes to.
        num_registers: 0 changes nothing; 1 is right for most, each further one copies the attention sink; 64 at most.
        statistic, patches, scale: see `shift`.
    Returns: a handle with `.remove()`; also usable in a `with` block.
    Raises:
        ValueError: the model cannot be treated (the reason is given), has test-time registers already, or a layer,
            neuron or option is out of range.
    Source: Jiang et al. 2025, arXiv:2506.08010.
    """
    model = uncompiled(model)
    _check_options(model, num_registers, statistic, patches)
    selected = _selected(model, neurons)
    if selected is None:
        warnings.warn("the search found no register neurons, so no test-time register is added", stacklevel=2)
        selected, num_registers = {}, 0
    if num_registers == 0:
        return TestTimeRegisters(model, 0, selected)
    check_treatable(model)

    layout, counted = TokenLayout.of(model), []
    for name, module in model.named_modules():
        if isinstance(
            vars(module).get("num_prefix_tokens"), int
        ):  # its own: a wrapper of torch.compile shows another's
            module.num_prefix_tokens += num_registers
            counted.append(name)
    insert_zero_tokens(model, layout.prefix, num_registers)
    model.test_time_registers = Surgery(num_registers, layout, tuple(counted))
    how = Shift(TokenLayout.of(model), statistic, patches, scale)
    for layer, units in selected.items():
        projection = output_projection(blocks(model)[layer])
        index = torch.tensor(units, device=projection.weight.device)
        projection.register_buffer("register_neurons", index, persistent=False)
        mix(projection, _Shifting, shift=how)
    return TestTimeRegisters(model, num_registers, selected)


def remove_test_time_registers(model: nn.Module) -> None:
    """Undoes `add_test_time_registers`; a model without test-time registers is left alone.

    Raises:
        ValueError: the registers are baked in, or a cure was added after them.
    """
    model = uncompiled(model)
    surgery = getattr(model, "test_time_registers", None)
    if surgery is None:
        return
    if getattr(model, "cure", None) is not None:
        raise ValueError(f"the cure {model.cure} was added after the registers; call remove_cure(model) first")
    if not surgery.removable:
        raise ValueError("these test-time registers are baked in and cannot be removed; open the backbone without them")
    for name in surgery.counted:
        model.get_submodule(name).num_prefix_tokens -= surgery.num_registers
    for module in model.modules():
        unmix(module, OfRegisters)
        if "register_neurons" in module._buffers:
            delattr(module, "register_neurons")
            module._non_persistent_buffers_set.discard("register_neurons")
    del model.test_time_registers


def _check_options(model: nn.Module, num_registers: int, statistic: str, patches: str) -> None:
    if getattr(model, "test_time_registers", None) is not None:
        raise ValueError("the model already has test-time registers; call remove_test_time_registers(model) first")
    if layers := getattr(model, "ablated_layers", None):
        raise ValueError(
            f"neurons of the model in its layers {', '.join(map(str, layers))} are ablated; call remove_ablation(model) first"
        )
    if getattr(model, "cure", None) is not None:
        raise ValueError(
            f"the model has the cure {model.cure}, which comes after registers; call remove_cure(model) first"
        )
    if isinstance(num_registers, bool) or not isinstance(num_registers, int):
        raise ValueError(
            f"num_registers is {num_registers!r}; expected a whole number, not {type(num_registers).__name__}"
        )
    if not 0 <= num_registers <= MAX_REGISTERS:
        raise ValueError(
            f"num_registers is {num_registers}; expected 0 to {MAX_REGISTERS}: one holds what all outliers carry, and each "
            "is a token more in every image"
        )
    for name, value, known in (("statistic", statistic, STATISTICS), ("patches", patches, PATCH_TREATMENTS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")


def _selected(model: nn.Module, neurons: RegisterNeurons | Mapping) -> dict[int, tuple[int, ...]] | None:
    """The neurons, held to the model; None where they are those of a search that found none."""
    if not isinstance(neurons, RegisterNeurons | Mapping):
        raise ValueError(
            f"the neurons are a {type(neurons).__name__}; expected what find_register_neurons returned, json.load(…) of its "
            "file, or {layer: [neuron, …]}"
        )
    searched = isinstance(neurons, RegisterNeurons) or "selected" in neurons
    if searched:
        neurons = neurons.selected if isinstance(neurons, RegisterNeurons) else neurons["selected"]
    checked = checked_neurons(model, neurons)
    return None if searched and not checked else checked


def checked_neurons(model: nn.Module, neurons: Mapping) -> dict[int, tuple[int, ...]]:
    """`{layer: [neuron, …]}` as sorted tuples, without layers that have none.

    Raises:
        ValueError: a layer or neuron is no number, or the model does not have it.
    """
    every, checked = blocks(model), {}
    for layer, units in sorted((_whole(layer, "a layer"), units) for layer, units in neurons.items()):
        if not 0 <= layer < len(every):
            raise ValueError(
                f"layer {layer} is out of range: the model has {len(every)} blocks (0 to {len(every) - 1})"
            )
        if not isinstance(units, Iterable) or isinstance(units, str):
            raise ValueError(
                f"the neurons of layer {layer} are {units!r}; expected a list, as in {{{layer}: [{units}]}}"
            )
        width = output_projection(every[layer]).in_features
        units = tuple(sorted({_whole(unit, "a neuron") for unit in units}))
        if outside := [unit for unit in units if not 0 <= unit < width]:
            raise ValueError(
                f"neuron {outside[0]} of layer {layer} is out of range: its MLP has {width} (0 to {width - 1})"
            )
        if units:
            checked[layer] = units
    return checked


def _whole(value: object, what: str) -> int:
    """A number of a layer or neuron, which JSON and NumPy write in their own ways."""
    try:
        if int(value) == float(value):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{what} is {value!r}; expected a whole number, as in {{4: [12, 345]}}")
