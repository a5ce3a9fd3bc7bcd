"""Which neurons a control takes instead of the selected ones; which controls there are, says `controls`. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from regvit.registers.neurons_file import MIN_SHARE, Neuron

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
