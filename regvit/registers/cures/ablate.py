"""`ablate`: the register neurons are zero at all patches, and nothing takes over what they carried.

An image without outliers loses what these neurons say of it: next to nothing where they are silent below a threshold.
The control of Jiang et al. 2025, arXiv:2506.08010; on a planted model the upper bound of what a cure can do.
"""

from __future__ import annotations

from torch import nn

from regvit.registers import controls
from regvit.registers.cures.given import Given


def apply(model: nn.Module, given: Given) -> None:
    """Silences `given.neurons`.

    Raises:
        ValueError: the model has test-time registers, or a neuron is out of range.
    """
    controls.ablate(model, given.neurons)


remove = controls.remove_ablation
