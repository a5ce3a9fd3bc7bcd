"""How much memory is left, of a GPU or of the machine: decides where data is kept, never what comes out."""

from __future__ import annotations

from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")  # v2, as containers see their own
UNKNOWN = 4 << 30  # bytes: what is taken to be left where the system does not say


def available(device: str | torch.device = "cpu", cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can still be taken without harm: free on a GPU; else what the machine or the container has left."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = [_machine(meminfo), _container(cgroup)]
    return min([each for each in left if each is not None], default=UNKNOWN)


def _machine(meminfo: Path) -> int | None:
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _container(cgroup: Path) -> int | None:
    """The limit less what is in use; pages of files that the system can drop do not count as in use."""
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if not (limit.is_file() and used.is_file()) or limit.read_text().strip() == "max":
        return None
    stat = (cgroup / "memory.stat").read_text().split()
    droppable = int(dict(zip(stat[::2], stat[1::2], strict=True)).get("inactive_file", 0))
    return max(0, int(limit.read_text()) - int(used.read_text()) + droppable)
