"""Checkpoints of training that takes long: one file in a locked folder, which only the very same training goes on from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regvit.features.stored_readouts import StoredReadout, blocks
from regvit.files import locked, write_atomic

CHECKPOINT = "checkpoint.safetensors"
KEY = "regvit_training"
SAVE_EVERY = 30.0  # seconds between two checkpoints: training that takes less pays nothing


class Checkpoint:
    """The checkpoint of a training in a folder of its own.

    Args:
        folder: made when it is needed, left to the caller to remove.
        save_every: seconds between two checkpoints; None: `SAVE_EVERY`.
        tell: is called with one line on what was resumed, or why not, and on what is safe after Ctrl-C.
    Attributes:
        step: the last one that is safe.
    """

    def __init__(self, folder: Path | str, save_every: float | None = None, tell: Callable[[str], object] = print):
        self._path, self.tell = Path(folder) / CHECKPOINT, tell
        self._every = SAVE_EVERY if save_every is None else save_every
        self._key: Callable[[], str] = str
        self._saved, self.step = time.monotonic(), 0

    @contextmanager
    def of(self, described: dict, data: Sequence[np.ndarray | Mapping], code: Sequence[Path | str]) -> Iterator[None]:
        """Holds the folder locked for the block, for a training of

        Args:
            described: plain JSON values, all that decides the training besides data and code; `steps` among them.
            data: labels, and features by readout.
            code: files whose bytes decide what a step does.
        Raises:
            FolderLocked: another process trains there.
        """
        made: list[
            str
        ] = []  # once, and only if there is a checkpoint to compare with or to write: it reads all features

        def key() -> str:
            if not made:
                made.append(_digest(described | {"torch": torch.__version__}, data, code))
            return made[0]

        self._key, self._saved, self.step = key, time.monotonic(), 0
        with locked(self._path.parent):
            try:
                yield
            except KeyboardInterrupt:
                self.tell(f"interrupted: {self.step} of {described['steps']} steps are safe in {self._path.parent}; "
                          "run the same again to go on from there")  # fmt: skip
                raise

    def resume(self) -> dict[str, Tensor]:
        """What `save` was given, if it was this very training; else nothing, and a line says why."""
        if not self._path.exists():
            return {}
        try:
            with safe_open(str(self._path), framework="pt") as file:
                if (file.metadata() or {}).get(KEY) == self._key():
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            self.tell(f"started anew: the checkpoint in {self._path.parent} is damaged ({error})")
            return {}
        self.tell(f"started anew: the checkpoint in {self._path.parent} is of other data, settings or code")
        return {}

    def save(self, step: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Writes the checkpoint in one step, if the last one is old enough."""
        if time.monotonic() - self._saved < self._every:
            return
        with write_atomic(self._path) as beside:
            save_file(
                {name: value.contiguous().cpu() for name, value in tensors().items()},
                str(beside),
                metadata={KEY: self._key()},
            )
        self._saved, self.step = time.monotonic(), step


def _digest(described: dict, data: Sequence[np.ndarray | Mapping], code: Sequence[Path | str]) -> str:
    """SHA-256 over all of it; of features in a store over their chunks' checksums."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for module in code:
        digest.update(Path(module).read_bytes())
    for part in data:
        for name, values in part.items() if isinstance(part, Mapping) else [("labels", part)]:
            digest.update(f"{name} {values.shape} {values.dtype}".encode())
            if isinstance(values, StoredReadout):
                digest.update(values.identity().encode())
                continue
            for rows in blocks(len(values)):
                digest.update(np.ascontiguousarray(values[rows]).data)
    return digest.hexdigest()
