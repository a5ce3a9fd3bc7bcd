"""Register tokens in vision transformers: find the neurons, add test-time registers, measure what changes."""

from .neurons import RegisterNeurons, find_register_neurons
from .registers import TestTimeRegisters, add_test_time_registers, remove_test_time_registers
from .tokens import TokenLayout

__all__ = [
    "RegisterNeurons",
    "TestTimeRegisters",
    "TokenLayout",
    "add_test_time_registers",
    "find_register_neurons",
    "remove_test_time_registers",
]
