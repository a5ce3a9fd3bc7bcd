"""Reading the inside of a timm vision transformer: hooks that live in a `with` block and leave no trace.

Inside of the block, what `torch.compile` made of the model stands back: compiled code runs past hooks that came after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Stop(Exception):
    """Raised by `stop_after` to end a forward early."""


def inside(module: nn.Module) -> nn.Module:
    """The module that a wrapper of `torch.compile` holds, or the module itself."""
    return getattr(module, "_orig_mod", module)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a timm model, first to last.

    Raises:
        ValueError: the model has no flat list of blocks.
    """
    found = inside(getattr(model, "blocks", None))
    if not isinstance(found, nn.Sequential | nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of transformer blocks at `.blocks`; use a timm ViT")
    return list(found)


def output_projection(block: nn.Module) -> nn.Linear:
    """The linear layer through which a block's MLP writes; its inputs are the block's MLP neurons.

    Raises:
        ValueError: the block has no single such layer.
    """
    mlp = getattr(block, "mlp", None)
    for owner, name in ((mlp, "fc2"), (mlp, "w3"), (block, "mlp_out_proj")):
        layer = inside(getattr(owner, name, None))
        if isinstance(layer, nn.Linear):
            return layer
    raise ValueError(
        f"{type(block).__name__} has no single MLP output projection (mlp.fc2, mlp.w3 or mlp_out_proj), "
        "so its register neurons cannot be moved"
    )


def writes_linearly(block: nn.Module) -> bool:
    """Whether the MLP's output joins the residual stream without a norm in between."""
    return type(block).__name__ not in ("ResPostBlock", "EvaBlockPostNorm")


def residual_scale(block: nn.Module) -> Float[Tensor, " d"] | float:
    """What the MLP's output is multiplied by before it joins the residual stream (LayerScale), or 1.

    Raises:
        ValueError: the block normalises after the MLP, so that no neuron writes into the residual stream linearly.
    """
    if not writes_linearly(block):
        raise ValueError(
            f"{type(block).__name__} normalises after its MLP, so a neuron's share of the residual is not defined; "
            "select by activation instead: score='activation' with top_k or percentile"
        )
    for owner, name in (
        (getattr(block, "ls2", None), "gamma"),
        (block, "gamma_2"),
        (getattr(block, "ls", None), "gamma"),
    ):
        gamma = getattr(owner, name, None)
        if isinstance(gamma, Tensor):
            return gamma.detach()
    return 1.0


@contextmanager
def watch_outputs(modules: Mapping[int, nn.Module], watcher: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls `watcher(key, output)` after each module runs, inside the `with` block only."""
    handles = [
        module.register_forward_hook(lambda _, __, out, key=key: watcher(key, out)) for key, module in modules.items()
    ]
    with _removing(handles):
        yield


@contextmanager
def watch_inputs(modules: Mapping[int, nn.Module], watcher: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Calls `watcher(key, input)` before each module runs, inside the `with` block only; a tensor it returns is used."""

    def hook(key: int) -> Callable:
        def before(_: nn.Module, args: tuple) -> tuple | None:
            new = watcher(key, args[0])
            return None if new is None else (new, *args[1:])

        return before

    with _removing([module.register_forward_pre_hook(hook(key)) for key, module in modules.items()]):
        yield


def forward_until(model: nn.Module, images: Float[Tensor, "b 3 h w"], module: nn.Module) -> None:
    """Runs the model up to and including `module` and no further; watchers see what happened."""

    def stop(*_: object) -> None:
        raise _Stop

    with suppress(_Stop), _removing([module.register_forward_hook(stop)]):
        model.forward_features(images)


@contextmanager
def _removing(handles: list[RemovableHandle]) -> Iterator[None]:
    """Takes the hooks away at the end of the block; inside of it nothing runs compiled."""
    _eager.enter()
    try:
        yield
    finally:
        _eager.leave()
        for handle in handles:
            handle.remove()


class _Eager:
    """torch's stance, which holds for the whole process, while any thread is inside of a block."""

    def __init__(self):
        self._lock, self._inside, self._stance = threading.Lock(), 0, None

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stance.__exit__(None, None, None)


_eager = _Eager()
