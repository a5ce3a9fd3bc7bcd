"""Register tokens in vision transformers: find the neurons, add test-time registers, measure what changes.

The names below are imported when they are first used, so that `regvit --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .export import load
    from .neurons import RegisterNeurons, find_register_neurons
    from .registers import TestTimeRegisters, add_test_time_registers, remove_test_time_registers
    from .tokens import TokenLayout

_HOMES = {
    "RegisterNeurons": "neurons",
    "TestTimeRegisters": "registers",
    "TokenLayout": "tokens",
    "add_test_time_registers": "registers",
    "find_register_neurons": "neurons",
    "load": "export",
    "remove_test_time_registers": "registers",
}
__all__ = [
    "RegisterNeurons",
    "TestTimeRegisters",
    "TokenLayout",
    "add_test_time_registers",
    "find_register_neurons",
    "load",
    "remove_test_time_registers",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'regvit' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
