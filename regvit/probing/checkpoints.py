"""Checkpoints of training that takes long: one file in a locked folder, which only the very same training goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regvit.data.progress import progress as Progress
from regvit.durable import lock_folder, sync, sync_folder
from regvit.features.stored_readouts import StoredReadout, blocks

CHECKPOINT = "checkpoint.safetensors"
KEY = "regvit_training"


class Resumable(Protocol):
    """A training: how many steps are done, and all of it as tensors."""

    step: int

    def tensors(self) -> dict[str, Tensor]: ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None: ...


class Checkpoint:
    """The checkpoint in a working folder, which it holds locked; without a folder it does nothing.

    The key says what it belongs to: settings, data, code, torch and device. It is a digest over all the features (over
    their checksums, where they lie in a store), so it is made only when there is a checkpoint to compare with or to
    write.

    Args:
        work: the folder, made when it is needed; None: no checkpoint.
        save_every: seconds between two checkpoints.
        described: plain JSON values, all that decides the training besides data and code; `steps` among them.
        data: labels, and features by readout.
        code: files whose bytes decide what a step does.
        device: of the training.
        progress: is told of what was resumed and what is safe; None is silent.
    Raises:
        FolderLocked: on entering the block, another process trains in `work`.
    """

    def __init__(
        self,
        work: Path | str | None,
        save_every: float,
        described: dict,
        data: Sequence[np.ndarray | Mapping[str, np.ndarray | StoredReadout]],
        code: Sequence[Path | str],
        device: str | torch.device,
        progress: Progress | None,
    ):
        self._folder, self._every, self._progress = None if work is None else Path(work), save_every, progress
        self._described, self._data, self._code, self._device = described, data, code, device
        self._key: str | None = None
        self._lock: int | None = None
        self._saved, self._steps_saved = time.monotonic(), 0

    def __enter__(self) -> Checkpoint:
        if self._folder is not None:
            self._lock = lock_folder(self._folder)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._folder is None:
            return
        os.close(self._lock)
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._tell(f"interrupted: {self._steps_saved} of {self._described['steps']} steps are safe in "
                       f"{self._folder}; run the same again to go on from there")  # fmt: skip

    def resume(self, state: Resumable) -> None:
        """Puts the training where the checkpoint is, if there is one of this very training; says so, or why not."""
        if self._folder is None or not (self._folder / CHECKPOINT).exists():
            return
        try:
            with safe_open(str(self._folder / CHECKPOINT), framework="pt") as file:
                known = (file.metadata() or {}).get(KEY) == self._make_key()
                tensors = {name: file.get_tensor(name) for name in file.keys()} if known else {}  # noqa: SIM118
        except SafetensorError as error:
            self._tell(f"started anew: the checkpoint in {self._folder} is damaged ({error})")
            return
        if not known:
            self._tell(f"started anew: the checkpoint in {self._folder} is of other data, settings or code")
            return
        state.restore(tensors)
        self._steps_saved = state.step
        self._tell(f"resumed: {state.step} of {self._described['steps']} steps were done")
        if self._progress is not None:
            self._progress.skip(state.step)

    def save_if_due(self, state: Resumable) -> None:
        """Writes the checkpoint in one step, if the last one is old enough."""
        if self._folder is None or time.monotonic() - self._saved < self._every:
            return
        path = self._folder / CHECKPOINT
        new = path.with_name(f"{path.name}.partial")
        tensors = {name: value.contiguous().cpu() for name, value in state.tensors().items()}
        save_file(tensors, str(new), metadata={KEY: self._make_key()})
        sync(new)
        os.replace(new, path)
        sync_folder(path.parent)
        self._saved, self._steps_saved = time.monotonic(), state.step

    def _make_key(self) -> str:
        if self._key is None:
            device = torch.device(self._device)
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            versions = {"torch": torch.__version__, "device": name}
            digest = hashlib.sha256(json.dumps(self._described | versions, sort_keys=True).encode())
            for module in self._code:
                digest.update(Path(module).read_bytes())
            for part in self._data:
                arrays = part.items() if isinstance(part, Mapping) else [("labels", part)]
                for name, values in arrays:
                    digest.update(f"{name} {values.shape} {values.dtype}".encode())
                    if isinstance(values, StoredReadout):
                        digest.update(values.identity().encode())
                        continue
                    for rows in blocks(len(values)):
                        digest.update(np.ascontiguousarray(values[rows]).data)
            self._key = digest.hexdigest()
        return self._key

    def _tell(self, text: str) -> None:
        if self._progress is not None:
            self._progress.line(text)
