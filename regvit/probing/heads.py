"""Linear heads by the dozen: every readout × learning rate × seed in batched matrix products.

A head has weight W and bias b on features z = (x − μ) / σ of its readout; autograd differentiates all of them at once.
Where the probe pools the registers (`readouts.POOLED`), z = [CLS; Σ_r w_r reg_r] with weights of each head's own,

    cls_reg_learned: w = softmax(a)                      a: (r,), the same for all images
    cls_reg_attn:    w = softmax_r(q · reg_r / √d)       q: (d,)

and U_r = reg_r W_reg is computed before the sum, (b · r, d) times (d, h · c) at once for all heads.

W starts normal with standard deviation 0.01 by the seed, as in DINOv2, the same for every readout of a width and every
learning rate; all else starts at zero, pooling so at the mean. μ is the mean per channel (of the registers: over all of
them, as a softmax does not see what they have in common) and σ one number for all channels, the root of their mean variance
after pooling by the mean. One scale per channel conditions no better and would magnify channels that hardly vary.

Features are standardised once and held on the device where they fit there, else as they are read (`stored_readouts`). Both
ways see the same rows in the same order and do the same arithmetic with them.

Shape letters: b image, d channel, c class, g readout (of one width), s seed, n readout × seed (g · s), h learning rate,
r register. Column h · c + k of a weight belongs to class k of head h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regvit.features.readouts import POOLED
from regvit.features.stored_readouts import blocks

AT_ONCE = 1 << 23  # validation logits, and features, held at once: 32 MiB of float32 each
INITIAL = 0.01  # standard deviation of the first weights, DINOv2's


@dataclass(frozen=True)
class Standard:
    """What standardises a readout: z = (x − mean) / scale. The mean is (d',) of the features that a head multiplies."""

    mean: Float[np.ndarray, " d"]
    scale: float = 1.0


class Heads(nn.Module):
    """All heads of the readouts of one width, or of one readout that is pooled.

    Args:
        names: of the readouts.
        standards: of each of them.
        seeds: of the initialisation.
        rates: learning rates, one head each.
        n_classes: columns of a head.
        n_registers: that these heads pool; 0: none.
    """

    def __init__(
        self,
        names: Sequence[str],
        standards: Sequence[Standard],
        seeds: Sequence[int],
        rates: Sequence[float],
        n_classes: int,
        n_registers: int = 0,
    ):
        super().__init__()
        self.names, self.standards, self.n_registers = tuple(names), tuple(standards), n_registers
        self.shape = len(self.names), len(seeds), len(rates)  # (g, s, h)
        d, n = len(self.standards[0].mean), len(self.names) * len(seeds)
        first = [INITIAL * torch.randn(d, n_classes, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.weight = nn.Parameter(torch.stack(first).repeat(len(self.names), 1, len(rates)))  # (n, d, h · c)
        self.bias = nn.Parameter(torch.zeros(n, 1, len(rates) * n_classes))
        self.attends = "cls_reg_attn" in self.names
        if n_registers:
            self.pool = nn.Parameter(torch.zeros(n, d // 2 if self.attends else n_registers, len(rates)))

    def forward(self, x: Float[Tensor, "n b *t d"]) -> Float[Tensor, "n b h c"]:
        """Logits of every head."""
        n, b, d = len(x), x.shape[1], x.shape[-1]
        if not self.n_registers:
            return torch.baddbmm(self.bias, x, self.weight).view(n, b, self.shape[2], -1)
        registers = x[:, :, 1:].flatten(1, 2)  # (n, b · r, d)
        u = (registers @ self.weight[:, d:]).view(n, b, self.n_registers, self.shape[2], -1)  # (n, b, r, h, c)
        scores = (
            (registers @ self.pool).view(n, b, self.n_registers, -1) / math.sqrt(d)
            if self.attends
            else self.pool[:, None]
        )
        logits = torch.baddbmm(self.bias, x[:, :, 0], self.weight[:, :d]).view(n, b, self.shape[2], -1)
        return logits + (scores.softmax(2)[..., None] * u).sum(2)

    def losses(self, x: Float[Tensor, "n b *t d"], labels: Int[Tensor, "n b"]) -> Float[Tensor, "n h"]:
        """Mean cross-entropy of every head."""
        logits = self(x)
        truth = labels[:, :, None].expand(logits.shape[:3])
        return (
            nn.functional.cross_entropy(logits.flatten(0, 2), truth.flatten(), reduction="none")
            .view(truth.shape)
            .mean(1)
        )

    def finite(self) -> Bool[np.ndarray, "g s h"]:
        """Whether each head has not diverged."""
        whole = [value.isfinite().all(1).view(*self.shape, -1).all(-1) for value in self.parameters()]
        return torch.stack(whole).all(0).cpu().numpy()

    @torch.no_grad()
    def correct(self, features: Features, labels: Int[Tensor, " v"]) -> Int[np.ndarray, "g s h"]:
        """Validation images that each head gets right."""
        n, d, columns = self.weight.shape
        total = torch.zeros(n, self.shape[2], dtype=torch.int64, device=labels.device)
        for rows in blocks(len(labels), max(1, AT_ONCE // (n * max(columns, d * (1 + self.n_registers))))):
            x = features[rows].repeat_interleave(self.shape[1], 0)
            total += (self(x).argmax(-1) == labels[rows, None]).sum(1)
        return total.view(self.shape).cpu().numpy()

    def export(self, g: int, s: int, h: int) -> dict[str, np.ndarray | int | None]:
        """One head folded back to raw features: weight (c, d'), bias (c,), pool and n_registers of a `Probe`."""
        n, standard, c = g * self.shape[1] + s, self.standards[g], self.bias.shape[2] // self.shape[2]
        columns = slice(h * c, (h + 1) * c)
        weight = self.weight[n, :, columns].detach().double().cpu().numpy() / standard.scale  # (d', c)
        bias = self.bias[n, 0, columns].detach().double().cpu().numpy() - standard.mean @ weight
        # What all classes share, the first weights' noise, no softmax sees; energies and largest logits shall not either.
        weight, bias = weight - weight.mean(1, keepdims=True), bias - bias.mean()
        pool = None
        if self.n_registers:  # q · (reg − μ) / σ: the softmax does not see q · μ
            pool = self.pool[n, :, h].detach().double().cpu().numpy() / (standard.scale if self.attends else 1)
            pool = pool.astype(np.float32)
        weight = np.ascontiguousarray(weight.T, dtype=np.float32)
        return {"weight": weight, "bias": bias.astype(np.float32), "pool": pool, "n_registers": self.n_registers}


class Features:
    """Standardised features of the readouts of some heads: `features[rows]` is (g, b, d), of pooled ones (1, b, 1 + r, d).

    Args:
        values: by readout, arrays or `StoredReadout`.
        heads: whose readouts, on their device.
        hold: whether to keep all of them on the device, or to read rows when they are asked for.
    """

    def __init__(self, values: Mapping[str, Float[np.ndarray, "b d"]], heads: Heads, hold: bool):
        self._heads, self._values = heads, [values[name] for name in heads.names]
        self.held: Tensor | None = None
        if hold:
            n, one = len(self._values[0]), self[slice(0, 1)]
            held = one.new_empty(one.shape[0], n, *one.shape[2:])
            for rows in blocks(n):
                held[:, rows] = self[rows]
            self.held = held

    def __getitem__(self, rows: slice | Int[np.ndarray, " b"]) -> Float[Tensor, "g b *t d"]:
        if self.held is not None:
            return self.held[:, rows if isinstance(rows, slice) else torch.from_numpy(rows).to(self.held.device)]
        return torch.stack([
            _standardised(values[rows], standard, self._heads)
            for values, standard in zip(self._values, self._heads.standards, strict=True)
        ])  # fmt: skip


def _standardised(values: Float[np.ndarray, "b d"], standard: Standard, heads: Heads) -> Float[Tensor, "b *t d"]:
    device, mean = heads.weight.device, torch.from_numpy(standard.mean.astype(np.float32))
    x = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)
    if heads.n_registers:
        x, mean = x.view(len(x), 1 + heads.n_registers, -1), mean.view(2, -1)[[0] + [1] * heads.n_registers]
    return (x - mean.to(device)).div_(standard.scale)


def standards_of(
    train: Mapping[str, Float[np.ndarray, "b d"]], channels: int | None, standardise: bool
) -> dict[str, Standard]:
    """μ and σ of each readout, in one pass over blocks of the rows that all of them share; sums are float64.

    Constant features get σ = 1: they are 0 then, and harmless. Registers that the probe pools are taken by their mean.
    """
    n = len(next(iter(train.values())))
    sums: dict[str, list] = {}
    for rows in blocks(n):
        for name, values in train.items():
            x = values[rows].astype(np.float64)
            if name in POOLED:
                tokens = x.reshape(len(x), -1, channels)
                x = np.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], axis=1)
            total = sums.setdefault(name, [0, 0])
            total[0], total[1] = total[0] + x.sum(0), total[1] + (x**2).sum(0)
    if not standardise:
        return {name: Standard(np.zeros_like(total)) for name, (total, _) in sums.items()}
    standards = {}
    for name, (total, squares) in sums.items():
        variance = float((squares / n - (total / n) ** 2).mean())
        constant = variance <= 1e-12 * float(squares.mean()) / n  # but for rounding
        standards[name] = Standard(total / n, 1.0 if constant else math.sqrt(variance))
    return standards
