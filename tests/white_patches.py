"""Images with a white patch, and a register neuron that fires on it: outliers in a small model, planted by hand."""

import numpy as np
import torch

LAYER, UNIT = 2, 11  # the one register neuron


def picture(i: int) -> np.ndarray:
    """Noise with one white patch of 8 px."""
    rng = np.random.default_rng(i)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    row, column = rng.integers(0, 8, 2) * 8
    pixels[row : row + 8, column : column + 8] = 255
    return pixels


def plant_one(model: torch.nn.Module, x: torch.Tensor) -> None:
    """One neuron fires on white patches and writes a norm of 200, along what separates them from noise."""
    white = (x > 0.99).all(1).unfold(1, 8, 8).unfold(2, 8, 8).all(-1).all(-1).flatten(1)  # (b, p)
    seen, mlp = [], model.blocks[LAYER].mlp
    handle = mlp.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 1:]))
    model.forward_features(x)
    handle.remove()
    hot, rest = seen[0][white], seen[0][~white]
    axis = hot.mean(0) - rest.mean(0)
    low, high = (rest @ axis).max(), (hot @ axis).min()
    assert low < high
    mlp.fc1.weight[UNIT] = axis * 20 / (high - low)
    mlp.fc1.bias[UNIT] = -10 - low * 20 / (high - low)  # at most -10 on noise, at least 10 on white
    write = torch.randn(64, generator=torch.Generator().manual_seed(0))
    mlp.fc2.weight[:, UNIT] = write * 20 / write.norm()
