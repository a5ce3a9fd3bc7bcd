"""What every benchmark needs: the machine in words, and the times of two pieces of work in turn."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGES = ("torch", "timm", "numpy", "zarr", "scikit-learn", "torchvision", "dvc")
ROUNDS = 6  # the fewest whose least and largest ratio hold the median with 95 %


@dataclass(frozen=True)
class Timed:
    """Two pieces of work that ran in turn in one process, so that a loaded machine slows both alike.

    Attributes:
        first, second: seconds of each round, of the CPU; on a GPU by the clock.
        ratios: second / first of each round: how many times as fast the first one is.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [b / a for a, b in zip(self.first, self.second, strict=True)]

    def row(self, name: str, wanted: float | None, detail: str, times: float = 1.0) -> dict:
        """A row of the table: the median of the ratios with its interval.

        Args:
            wanted: the least ratio, or None.
            times: as much work was done first as second.
        """
        ratio, lo, hi = (times * value for value in median_with_interval(self.ratios))
        return {
            "name": name,
            "ratio": ratio,
            "ratio_lo": lo,
            "ratio_hi": hi,
            "rounds": len(self.first),
            "wanted": wanted,
            "detail": detail,
        }


def in_words(row: dict) -> str:
    """The ratio of a row with its interval."""
    return f"{row['ratio']:.2f} [{row['ratio_lo']:.2f}, {row['ratio_hi']:.2f}]"


def median_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the two values between which that of many more rounds lies with 95 % at least.

    They are order statistics, of whatever distribution: the k-th from below and from above, where fewer than k of n fair
    coins show heads in at most 2.5 % of the cases. Of fewer than six values they are the least and the largest, and hold
    it with 1 - 2 / 2ⁿ.
    """
    ordered, n = sorted(values), len(values)
    k, tail = 0, 1.0
    while k < n and tail / 2**n <= 0.025:
        k += 1
        tail += math.comb(n, k)
    k = max(k, 1)
    return statistics.median(ordered), ordered[k - 1], ordered[n - k]


def in_turn(
    first: Callable[[], object],
    second: Callable[[], object],
    rounds: int = ROUNDS,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> Timed:
    """Times both in turn, after one run of each that is not counted.

    Args:
        say: is told the seconds of each round.
    """
    took = ([], [])
    for i in range(rounds + 1):
        for work, seconds in zip((first, second), took, strict=True):
            found = seconds_of(work, device)
            if i:
                seconds.append(found)
        if i:
            say(f"round {i}: {took[0][-1]:.2f} s and {took[1][-1]:.2f} s, ratio {took[1][-1] / took[0][-1]:.3f}")
    return Timed(*map(tuple, took))


def seconds_of(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds that it takes: of the CPU, over all threads of the process; on a GPU by the clock, to its end there."""
    on_gpu = torch.device(device).type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def describe() -> dict:
    """Processor, cores, memory, GPU, system and versions; nothing that names the machine or its owner."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "kind": kind(gpu or processor()),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "versions": versions,
    }


def save(out: Path | None, found: dict) -> None:
    """Writes what was measured as JSON, with the machine where it is not in it; None writes nothing."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": describe()} | found, indent=1) + "\n")


def kind(name: str) -> str:
    """A name for files: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its model name where the system says it, else its architecture."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
