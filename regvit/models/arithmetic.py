"""The arithmetic of a forward pass, by name.

float32          the model's own type, products at full precision
float32_medium   faster products of float32 matrices, error about 1e-4
bfloat16         autocast: products in bfloat16, residual stream in float32
float16          autocast: products in float16, which overflow beyond 65,504

A processor without instructions for half types emulates them, several times slower than float32: it is said once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = ("float32", "float32_medium", *AUTOCAST)
NO_HALF = ("DEFAULT", "AVX2")  # the instructions that torch found, where no half types are among them
ONE_AT_A_TIME = threading.RLock()  # what torch is told of float32 products holds for all threads of the process


def check_precision(precision: str) -> None:
    """Refuses a name that stands for no arithmetic.

    Raises:
        ValueError: the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Puts torch's arithmetic into the state that the precision names, whatever it was, and back.

    Threads take turns: where one is in such a block, another waits before its own. A block may hold others.

    Raises:
        ValueError: the precision is unknown.
    """
    check_precision(precision)
    medium = precision == "float32_medium"
    if precision in AUTOCAST and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in NO_HALF:
        warnings.warn(
            f"this processor ({torch.backends.cpu.get_cpu_capability()}) has no instructions for {precision}: it is "
            "emulated, and float32 is several times faster",
            stacklevel=3,
        )
    with ONE_AT_A_TIME:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        try:
            torch.set_float32_matmul_precision("medium" if medium else "highest")
            torch.backends.cudnn.allow_tf32 = medium  # the patch embedding is a convolution
            with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
                yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
