"""Register tokens in vision transformers: find the neurons, add test-time registers, measure what changes.

The names below are imported when they are first used, so that `regvit --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regvit.models.tokens import TokenLayout
    from regvit.registers.cures.cure import add_cure, remove_cure
    from regvit.registers.cures.recursive import find_recursively
    from regvit.registers.export import load
    from regvit.registers.neurons import RegisterNeurons, find_register_neurons
    from regvit.registers.test_time import (
        TestTimeRegisters,
        add_test_time_registers,
        remove_test_time_registers,
    )

_HOMES = {
    "RegisterNeurons": "registers.neurons",
    "TestTimeRegisters": "registers.test_time",
    "TokenLayout": "models.tokens",
    "add_cure": "registers.cures.cure",
    "add_test_time_registers": "registers.test_time",
    "find_recursively": "registers.cures.recursive",
    "find_register_neurons": "registers.neurons",
    "load": "registers.export",
    "remove_cure": "registers.cures.cure",
    "remove_test_time_registers": "registers.test_time",
}
__all__ = [
    "RegisterNeurons",
    "TestTimeRegisters",
    "TokenLayout",
    "add_cure",
    "add_test_time_registers",
    "find_recursively",
    "find_register_neurons",
    "load",
    "remove_cure",
    "remove_test_time_registers",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'regvit' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
