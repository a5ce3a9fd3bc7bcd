"""Test-time registers: extra tokens that take over the activation of register neurons, without training.

K zero tokens are inserted right after the existing prefix tokens, before block 0, and `num_prefix_tokens` is raised
wherever timm keeps it, so that pooling, `forward_intermediates` and rotary embeddings go on working by themselves.
Then, at the input a of each block's MLP output projection, for every register neuron u of that block:

    a[register, u] = scale * m_u          a[patch, u] = 0

where m_u is the activation of largest magnitude, with its sign, over the image's patches and test-time registers.
CLS and trained registers take no part and are not edited. Source: Jiang et al. 2025, arXiv:2506.08010.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regvit.models.hooks import blocks, output_projection
from regvit.models.tokens import TokenLayout
from regvit.registers.neurons import RegisterNeurons

STATISTICS = ("per_neuron", "per_neuron_patches", "reference")
PATCH_TREATMENTS = ("zero", "mean", "only_outliers", "same")
MAX_REGISTERS = 64  # more tokens than any model was trained with; a mistyped number would take all memory


@dataclass
class TestTimeRegisters:
    """What was done to a model, kept on it as `model.test_time_registers`; a `with` block undoes it at its end."""

    __test__ = False  # pytest would take the name for a test class

    model: nn.Module = field(repr=False)
    num_registers: int
    neurons: dict[int, tuple[int, ...]]
    layout: TokenLayout

    def remove(self) -> None:
        """Gives the model back as it was."""
        remove_test_time_registers(self.model)

    def __enter__(self) -> TestTimeRegisters:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@dataclass
class _Surgery:
    """The record left on the model: enough to undo the surgery, also on a deep copy."""

    num_registers: int
    layout: TokenLayout
    prefix_counts: dict[str, int]
    replaced: dict[str, object]


class _Insert:
    """Block 0 pre-hook for models without a usable `reg_token`: zero tokens after the prefix."""

    def __init__(self, prefix: int, num_registers: int):
        self.prefix, self.num_registers = prefix, num_registers

    def __call__(self, _: nn.Module, args: tuple) -> tuple:
        x = args[0]
        new = x.new_zeros(x.shape[0], self.num_registers, x.shape[2])
        return (torch.cat([x[:, : self.prefix], new, x[:, self.prefix :]], dim=1), *args[1:])


class _Strip:
    """Attention-pooling pre-hook for models that pool over prefix tokens: leaves the test-time registers out."""

    def __init__(self, start: int, num_registers: int):
        self.start, self.stop = start, start + num_registers

    def __call__(self, _: nn.Module, args: tuple) -> tuple:
        x = args[0]
        return (torch.cat([x[:, : self.start], x[:, self.stop :]], dim=1), *args[1:])


class _Shift:
    """MLP output-projection pre-hook that moves the register neurons' activation into the registers."""

    def __init__(self, layout: TokenLayout, statistic: str, patches: str, scale: float):
        self.layout, self.statistic, self.patches, self.scale = layout, statistic, patches, scale

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        index = module.register_neurons
        return (shift(args[0], index, self.layout, self.statistic, self.patches, self.scale), *args[1:])


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
    neurons: RegisterNeurons | Mapping[int, Iterable[int]],
    num_registers: int = 1,
    *,
    statistic: str = "per_neuron",
    patches: str = "zero",
    scale: float = 1.0,
) -> TestTimeRegisters:
    """Adds test-time registers to a timm vision transformer, in place.

    Args:
        model: any timm ViT (ViT, DeiT, DINOv2, DINOv3, EVA, CLIP, SigLIP, …), on any device, of any dtype.
        neurons: what `find_register_neurons` returned, or `{layer: [neuron, …]}`.
        num_registers: 0 changes nothing; 1 is right for most, each further one copies the attention sink; 64 at most.
        statistic, patches, scale: see `shift`.
    Returns: a handle with `.remove()`; also usable in a `with` block.
    Raises:
        ValueError: the model cannot be treated (the reason is given), has test-time registers already, or a layer,
            neuron or option is out of range.
    Source: Jiang et al. 2025, arXiv:2506.08010.
    """
    selected = _checked(model, neurons, num_registers, statistic, patches)
    layout = TokenLayout.of(model)
    handle = TestTimeRegisters(model, num_registers, selected, layout)
    if num_registers == 0:
        return handle
    _refuse_unsupported(model, layout)

    surgery = _Surgery(num_registers, layout, {}, {})
    for name, module in model.named_modules():
        if isinstance(getattr(module, "num_prefix_tokens", None), int):
            surgery.prefix_counts[name] = module.num_prefix_tokens
            module.num_prefix_tokens += num_registers
    if _has_usable_reg_token(model):
        _extend_reg_token(model, layout, num_registers, surgery)
    else:
        blocks(model)[0].register_forward_pre_hook(_Insert(layout.prefix, num_registers))
    model.test_time_registers = surgery
    if _pools_prefix_by_attention(model):
        model.attn_pool.register_forward_pre_hook(_Strip(layout.prefix, num_registers))

    hook = _Shift(TokenLayout.of(model), statistic, patches, scale)
    for layer, units in selected.items():
        projection = output_projection(blocks(model)[layer])
        index = torch.tensor(units, device=projection.weight.device)
        projection.register_buffer("register_neurons", index, persistent=False)
        projection.register_forward_pre_hook(hook)
    return handle


def remove_test_time_registers(model: nn.Module) -> None:
    """Undoes `add_test_time_registers`; a model without test-time registers is left alone."""
    surgery = getattr(model, "test_time_registers", None)
    if surgery is None:
        return
    for name, count in surgery.prefix_counts.items():
        model.get_submodule(name).num_prefix_tokens = count
    for name, value in surgery.replaced.items():
        setattr(model, name, value)
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Insert | _Strip | _Shift)]:
            del hooks[key]
        if "register_neurons" in module._buffers:
            delattr(module, "register_neurons")
            module._non_persistent_buffers_set.discard("register_neurons")
    del model.test_time_registers


def _checked(
    model: nn.Module,
    neurons: RegisterNeurons | Mapping[int, Iterable[int]],
    num_registers: int,
    statistic: str,
    patches: str,
) -> dict[int, tuple[int, ...]]:
    """The neurons as sorted tuples by layer, after every option was held to its range."""
    if getattr(model, "test_time_registers", None) is not None:
        raise ValueError("the model already has test-time registers; call remove_test_time_registers(model) first")
    if not 0 <= num_registers <= MAX_REGISTERS:
        raise ValueError(
            f"num_registers is {num_registers}; expected 0 to {MAX_REGISTERS}: one holds what all outliers carry, and each "
            "is a token more in every image"
        )
    for name, value, known in (("statistic", statistic, STATISTICS), ("patches", patches, PATCH_TREATMENTS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    all_blocks = blocks(model)
    selected = neurons.selected if isinstance(neurons, RegisterNeurons) else neurons
    checked = {}
    for layer, units in sorted(selected.items()):
        if not 0 <= layer < len(all_blocks):
            raise ValueError(
                f"layer {layer} is out of range: the model has {len(all_blocks)} blocks (0 to {len(all_blocks) - 1})"
            )
        width = output_projection(all_blocks[layer]).in_features
        units = tuple(sorted({int(unit) for unit in units}))
        outside = [unit for unit in units if not 0 <= unit < width]
        if outside:
            raise ValueError(
                f"neuron {outside[0]} of layer {layer} is out of range: its MLP has {width} (0 to {width - 1})"
            )
        if units:
            checked[layer] = units
    return checked


def _has_usable_reg_token(model: nn.Module) -> bool:
    """Whether the model's own `_pos_embed` concatenates `reg_token` (timm's ViT and EVA; not distilled DeiT)."""
    embed = getattr(type(model), "_pos_embed", None)
    return embed is not None and hasattr(model, "reg_token") and "reg_token" in embed.__code__.co_names


def _extend_reg_token(model: nn.Module, layout: TokenLayout, num_registers: int, surgery: _Surgery) -> None:
    """Appends zero rows to `reg_token`, and to `pos_embed` where that covers the prefix tokens."""

    def put(name: str, value: object) -> None:
        surgery.replaced[name] = getattr(model, name)
        setattr(model, name, value)

    like = next(model.parameters()) if model.reg_token is None else model.reg_token
    zeros = like.new_zeros(1, num_registers, model.embed_dim)
    rows = zeros if model.reg_token is None else torch.cat([model.reg_token.detach(), zeros], dim=1)
    put("reg_token", nn.Parameter(rows, requires_grad=like.requires_grad))
    if hasattr(model, "num_reg_tokens"):
        put("num_reg_tokens", model.num_reg_tokens + num_registers)
    if model.pos_embed is not None and not model.no_embed_class:
        old = model.pos_embed.detach()
        padded = torch.cat([old[:, : layout.prefix], zeros.to(old), old[:, layout.prefix :]], dim=1)
        put("pos_embed", nn.Parameter(padded, requires_grad=model.pos_embed.requires_grad))


def _pools_prefix_by_attention(model: nn.Module) -> bool:
    """Whether `attn_pool` sees prefix tokens: timm's EVA always, its ViT and NaFlex with `pool_include_prefix`."""
    return getattr(model, "attn_pool", None) is not None and bool(getattr(model, "pool_include_prefix", True))


def _refuse_unsupported(model: nn.Module, layout: TokenLayout) -> None:
    """Names the reason why a model cannot take test-time registers.

    Raises:
        ValueError: its attention is tied to a number of tokens, it pools registers, or its blocks see other tokens
            than prefix + patches.
    """
    name = type(model).__name__
    for module in model.modules():
        if any(
            getattr(module, bias, None) is not None
            for bias in ("relative_position_bias_table", "rel_pos", "rel_pos_bias")
        ):
            raise ValueError(
                f"{name} adds a relative position bias for a fixed number of tokens, so no token can be inserted; "
                "use a model with absolute or rotary position embeddings"
            )
    if getattr(model, "pool_include_prefix", False) and getattr(model, "attn_pool", None) is None:
        raise ValueError(
            f"{name} averages its prefix tokens (pool_include_prefix), so registers would enter the pooled feature"
        )
    entering, num_patches = _tokens_entering_block_0(model)
    if entering != layout.prefix + num_patches:
        raise ValueError(
            f"{name} sends {entering} tokens into its first block where {layout.prefix} prefix tokens and {num_patches} "
            "patches were expected, so registers cannot be told apart from patches"
        )


@torch.no_grad()
def _tokens_entering_block_0(model: nn.Module) -> tuple[int, int]:
    """How many tokens enter block 0, and how many of them the patch embedding made, for one blank image."""

    class Entered(Exception):
        pass

    counts = {}
    embed_dim = model.embed_dim

    def embedded(_: nn.Module, __: tuple, out: Tensor | tuple) -> None:
        out = out[0] if isinstance(out, tuple) else out
        counts["patches"] = out.numel() // embed_dim

    def entering(_: nn.Module, args: tuple) -> None:
        counts["entering"] = args[0].shape[1] if args[0].ndim == 3 else -1
        raise Entered

    embed = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    if embed is None:
        raise ValueError(f"{type(model).__name__} has no patch embedding at `.patch_embed`; use a timm ViT")
    parameter = next(model.parameters())
    size = getattr(embed, "img_size", None) or model.default_cfg["input_size"][1:]
    channels = model.default_cfg["input_size"][0] if hasattr(model, "default_cfg") else 3
    image = torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype)
    handles = [embed.register_forward_hook(embedded), blocks(model)[0].register_forward_pre_hook(entering)]
    try:
        model.forward_features(image)
    except Entered:
        pass
    finally:
        for handle in handles:
            handle.remove()
    patches = counts["patches"]
    if embed is getattr(model, "embeds", None):  # NaFlex: the embedding already holds the prefix tokens
        patches -= model.num_prefix_tokens
    return counts["entering"], patches
