"""Norms of patch tokens by layer, in memory that does not grow with the number of images.

Up to `ONE_BY_ONE` norms of a layer are kept as they are. Beyond that they are counted in bins of 1/512 octave (0.14 to
0.2 % of the norm), each with its smallest and its largest norm. Counts, smallest and largest do not depend on the order
in which the images come, so neither does what follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ONE_BY_ONE = 65_536  # norms of a layer: 256 KiB, a thousand images of 64 patches
BINS_PER_OCTAVE = 512
LOWEST, HIGHEST = -32, 32  # octaves, log2 of the norm; what lies beyond is counted in the outermost bins
BINS = (HIGHEST - LOWEST) * BINS_PER_OCTAVE  # 512 KiB a layer
MANTISSA, BIAS = 23, 127  # of float32: bits of the mantissa, offset of the exponent


@dataclass(frozen=True)
class LayerNorms:
    """The norms in one layer, in ascending cells: each holds one norm, or the norms of one bin.

    Args:
        lows, highs: smallest and largest norm of each cell.
        counts: norms in each cell.
    """

    lows: Float[np.ndarray, " c"] = field(repr=False)
    highs: Float[np.ndarray, " c"] = field(repr=False)
    counts: Int[np.ndarray, " c"] = field(repr=False)

    @classmethod
    def of(cls, values: Float[np.ndarray, ...]) -> LayerNorms:
        """Cells of one norm each."""
        values = np.sort(np.asarray(values).ravel())
        return cls(values, values, np.ones(len(values), dtype=np.int64))

    @property
    def size(self) -> int:
        """How many norms there are."""
        return int(self.counts.sum())

    @property
    def middles(self) -> Float[np.ndarray, " c"]:
        """A norm for each cell: the only one, or the middle of its smallest and largest."""
        return (self.lows + self.highs) / 2

    def max(self) -> float:
        """The largest norm, exactly."""
        return float(self.highs[-1])

    def mean(self) -> float:
        """The mean norm; within a bin, the middle stands for each."""
        return float(np.average(self.middles, weights=self.counts))

    def std(self) -> float:
        """The standard deviation; within a bin, the middle stands for each."""
        return float(np.sqrt(np.average((self.middles - self.mean()) ** 2, weights=self.counts)))

    def quantile(self, q: float) -> float:
        """The norm that the share `q` of all norms does not exceed, linear between two of them; off by less than a bin."""
        if len(self.counts) == self.size:
            return float(np.quantile(self.lows, q))
        rank = q * (self.size - 1)
        first, last = np.searchsorted(np.cumsum(self.counts), [np.floor(rank), np.ceil(rank)], side="right")
        low, high = self.middles[first], self.middles[last]
        return float(low + (high - low) * (rank % 1))

    def median(self) -> float:
        """The middle norm."""
        return self.quantile(0.5)


class NormCounter:
    """Takes the norms of one batch after the other; where they come from is where they are counted, without waiting.

    Args:
        layers: of the model.
        device: of the norms.
    """

    def __init__(self, layers: int, device: torch.device):
        self.layers = layers
        self._seen = [0] * layers
        self._kept: Tensor | None = torch.zeros(layers, ONE_BY_ONE, device=device)
        self._counts: Int[Tensor, "l c"] | None = None

    def add(self, norms: Float[Tensor, "l b p"]) -> None:
        """Adds float32 norms of the first layers; of no more layers than the call before, as a forward may stop earlier."""
        flat = norms.flatten(1)  # (l, bp)
        start, count = self._seen[0], flat.shape[1]
        if self._seen[len(flat) - 1] != start:
            raise ValueError(
                f"norms of {len(flat)} layers come after norms of fewer; count them from the first image on"
            )
        if self._counts is None and start + count > ONE_BY_ONE:
            self._start_bins()
        if self._counts is None:
            self._kept[: len(flat), start : start + count] = flat
        else:
            self._count(0, flat)
        self._seen[: len(flat)] = [start + count] * len(flat)

    def result(self) -> tuple[LayerNorms, ...]:
        """What was seen so far, layer by layer.

        Raises:
            ValueError: nothing was.
        """
        if not self._seen[0]:
            raise ValueError("no images to measure patch norms on; give at least one batch")
        if self._counts is None:
            kept = self._kept.cpu().numpy()
            return tuple(LayerNorms.of(row[:count]) for row, count in zip(kept, self._seen, strict=True))
        arrays = (self._lows.cpu().numpy(), self._highs.cpu().numpy(), self._counts.cpu().numpy())
        return tuple(
            LayerNorms(low[count > 0], high[count > 0], count[count > 0])
            for low, high, count in zip(*arrays, strict=True)
        )

    def _start_bins(self) -> None:
        shape, device = (self.layers, BINS), self._kept.device
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._lows, self._highs = (torch.full(shape, value, device=device) for value in (torch.inf, 0.0))
        for layer, count in enumerate(self._seen):
            self._count(layer, self._kept[layer : layer + 1, :count])
        self._kept = None

    def _count(self, first: int, flat: Float[Tensor, "l bp"]) -> None:
        """Puts norms of the layers from `first` on into bins: the leading bits of a float32 are a bin of its logarithm."""
        step = BINS_PER_OCTAVE.bit_length() - 1  # bits of the mantissa that tell bins apart
        bins = (flat.contiguous().view(torch.int32) >> (MANTISSA - step)) - ((BIAS + LOWEST) << step)
        bins = bins.clamp(0, BINS - 1).long()
        layers = slice(first, first + len(flat))
        self._counts[layers].scatter_add_(1, bins, torch.ones_like(bins))
        self._lows[layers].scatter_reduce_(1, bins, flat, "amin")
        self._highs[layers].scatter_reduce_(1, bins, flat, "amax")
