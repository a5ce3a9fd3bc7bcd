"""How much memory is left, of a GPU or of the machine: decides where data is kept, never what comes out."""

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")  # v2, as containers see their own: psutil tells of the whole machine


def available(device: str | torch.device = "cpu", cgroup: Path = CGROUP) -> int:
    """Bytes that can still be taken without harm: free on a GPU; else what the machine, or the container, has left."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = psutil.virtual_memory().available
    limit = cgroup / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return left
    stat = (cgroup / "memory.stat").read_text().split()
    droppable = int(dict(zip(stat[::2], stat[1::2], strict=True)).get("inactive_file", 0))  # pages of files
    used = int((cgroup / "memory.current").read_text()) - droppable
    return max(0, min(left, int(limit.read_text()) - used))
