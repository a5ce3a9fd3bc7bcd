"""Extraction: images through a backbone into a feature store, one forward an image.

    decode (threads) -> uint8 -> device -> normalise -> forward_features -> readouts -> float16 units (writer thread)

Features are taken from the tokens that `forward_features` returns, that is after the model's last norm (models that
normalise only what they pooled, timm's `fc_norm`, give their tokens before it):

    cls         CLS token                                  only where the model has one
    registers   trained registers, then test-time ones     only where the model has any
    patch_mean  mean over the patch tokens, in float32
    patches     the patch tokens themselves, row by row of the grid; only where asked for, as they are large
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .backbones import Backbone
from .images import load_batches
from .manifest import Dataset
from .progress import progress as Progress
from .store import StoreWriter, UnstorableFeature, image_ids_digest
from .tokens import TokenLayout

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = ("float32", "float32_medium", *AUTOCAST)
ARRAYS = ("cls", "registers", "patch_mean")  # what is stored where nothing else is asked for
UNITS_IN_FLIGHT = 2  # computed and waiting for the disk; more would only cost memory


class BadFeatures(ValueError):
    """The features of an image cannot be stored; the message names the image, the array and the cure."""


def describe(backbone: Backbone, dataset: Dataset, precision: str) -> dict:
    """Attributes of the store that `extract` makes: what decides the features, but for a run's registers.

    Raises:
        ValueError: the precision is unknown.
    """
    _check_precision(precision)
    return {
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        **{key: backbone.info[key] for key in ("architecture", "model_args") if key in backbone.info},
        "transform": backbone.transform.to_dict(),
        "precision": precision,
        "dataset": dataset.name,
        "manifest_sha256": dataset.digest,
        "image_ids_sha256": image_ids_digest(row.image_id for row in dataset.rows),
    }


def extract(
    backbone: Backbone,
    dataset: Dataset,
    final: Path | str,
    partial: Path | str,
    attributes: Mapping,
    precision: str = "float32",
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    workers: int = 0,
    rows_per_unit: int | None = None,
    progress: Progress | None = None,
    arrays: Sequence[str] = ARRAYS,
) -> None:
    """Extracts the features of a data set, or what an interrupted extraction left to do, into a feature store.

    Batches end where units end, so that an image shares its batch with the same images whether or not there was an
    interruption; the finished store is then the same, byte for byte. Another batch size, number of threads or device
    may move a float32 in its last bits (measured: 1e-6 for a tiny model on two threads, nothing for a ViT-S).

    Args:
        backbone: with its test-time registers in place; its model is moved to `device`.
        final, partial, rows_per_unit: of the store, see `StoreWriter`.
        attributes: of the store: those of `describe` and what describes the run.
        precision: `float32` is exact (no TF32); `float32_medium` lets matrix products run in TF32 or bfloat16
            (`torch.set_float32_matmul_precision("medium")`; what the machine makes of it differs);
            `bfloat16` and `float16` are autocast. It is part of what makes the features.
        device, batch_size, workers: where and how fast; images per forward (lowered to a divisor of the rows of a
            unit), and decoding threads, which run ahead of the forward (0 decodes in between).
        progress: is told of every image, and of what was resumed; None is silent.
        arrays: what to store, see `readouts`; what the model does not have is left out.
    Raises:
        ValueError: the precision or an array is unknown, the model has none of the arrays, the data set is empty, or the model returns no token sequence.
        BadFeatures: an image gives NaN, infinity, or a value beyond float16.
        UnreadableImage, FileExistsError, FolderLocked: see `load_batches` and `StoreWriter`.
        KeyboardInterrupt: passed on; finished units stay in `partial`, and calling again goes on from there.
    """
    _check_precision(precision)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    arrays = tuple(arrays)
    model, device = backbone.model.to(device), torch.device(device)
    blank = torch.zeros(1, 3, backbone.transform.size, backbone.transform.size, dtype=torch.uint8)
    with _arithmetic(precision, device):
        shapes = {name: values.shape[1:] for name, values in _features(backbone, model, blank, device, arrays).items()}
        if not shapes:
            raise ValueError(f"backbone {backbone.name} has none of the arrays asked for ({', '.join(arrays)})")
        with (
            StoreWriter(final, partial, len(dataset), shapes, attributes, rows_per_unit, _resume_key()) as writer,
            ThreadPoolExecutor(1, thread_name_prefix="store") as pool,  # leaving waits for the units in flight
        ):
            _tell(progress, writer)
            try:
                _fill(writer, pool, backbone, model, dataset, device, batch_size, workers, progress, arrays)
            except UnstorableFeature as error:
                row = dataset.rows[error.row]
                raise BadFeatures(
                    f"image {row.image_id!r} ({row.path}): {error}; take the image out of the manifest, "
                    f"or extract with another precision than {precision}"
                ) from error
            except KeyboardInterrupt:
                pool.shutdown()
                if progress is not None:
                    units = writer.units - len(writer.missing_units())
                    done = f"{units} of {writer.units} units are safe in {writer.partial}"
                    progress.line(f"interrupted: {done}; run the same again to go on from there")
                raise
            writer.finish()


def readouts(
    layout: TokenLayout, tokens: Float[Tensor, "b n d"], arrays: Sequence[str] = ARRAYS
) -> dict[str, Float[Tensor, "b ..."]]:
    """What is stored of a token sequence, in float32: `cls` (b, d), `registers` (b, r, d), `patch_mean` (b, d),
    `patches` (b, p, d), whichever of them are asked for.

    `cls` and `registers` are left out where the model has none.

    Raises:
        ValueError: an array is unknown.
    """
    tokens = tokens.float()
    make = {
        "cls": layout.cls_token if layout.cls else None,
        "registers": layout.registers if layout.num_registers else None,
        "patch_mean": lambda tokens: layout.patches(tokens).mean(1),
        "patches": layout.patches,
    }
    if unknown := [name for name in arrays if name not in make]:
        raise ValueError(f"array {unknown[0]!r} is unknown; expected some of {', '.join(make)}")
    return {name: make[name](tokens) for name in arrays if make[name] is not None}


def _fill(
    writer: StoreWriter,
    pool: ThreadPoolExecutor,
    backbone: Backbone,
    model: nn.Module,
    dataset: Dataset,
    device: torch.device,
    batch_size: int,
    workers: int,
    progress: Progress | None,
    wanted: Sequence[str],
) -> None:
    """Computes the missing units in order and hands them to the writer thread."""
    missing = writer.missing_units()
    rows = [dataset.rows[i] for unit in missing for i in range(*writer.unit_rows(unit))]
    batches = load_batches(
        replace(dataset, rows=tuple(rows)), backbone.transform, _divisor(writer.rows_per_unit, batch_size), workers
    )
    in_flight: deque[Future] = deque()
    for unit in missing:
        start, stop = writer.unit_rows(unit)
        parts, gathered = [], 0
        while gathered < stop - start:
            _, batch = next(batches)
            features = _features(backbone, model, batch, device, wanted)
            parts.append({name: values.cpu().numpy() for name, values in features.items()})
            gathered += len(batch)
            if progress is not None:
                progress.advance(len(batch))
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if len(in_flight) == UNITS_IN_FLIGHT:
            in_flight.popleft().result()
        in_flight.append(pool.submit(writer.write, unit, arrays))
    for write in in_flight:
        write.result()


@torch.inference_mode()
def _features(
    backbone: Backbone, model: nn.Module, batch: Tensor, device: torch.device, arrays: Sequence[str]
) -> dict[str, Float[Tensor, "b ..."]]:
    """The readouts of one batch of uint8 images, on the device."""
    images = backbone.transform.normalise(batch.to(device))
    tokens = model.forward_features(images)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"{type(model).__name__}.forward_features returns {found}, expected a token sequence "
            "(image, token, channel); use a timm vision transformer"
        )
    return readouts(TokenLayout.of(model), tokens, arrays)


@contextmanager
def _arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Puts torch's arithmetic into the state that the precision names, whatever it was, and back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    medium = precision == "float32_medium"
    try:
        torch.set_float32_matmul_precision("medium" if medium else "highest")
        torch.backends.cudnn.allow_tf32 = medium  # the patch embedding is a convolution
        with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _resume_key() -> dict:
    """What decides features and is not in the attributes: digest of our own code that is loaded, library versions."""
    code = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] == __package__:
            code.update(name.encode() + b"\0" + Path(module.__file__).read_bytes())
    return {"code_sha256": code.hexdigest(), **{name: version(name) for name in ("torch", "timm", "pillow")}}


def _divisor(rows: int, batch_size: int) -> int:
    """The largest divisor of `rows` that is at most `batch_size`."""
    return next(size for size in range(min(rows, batch_size), 0, -1) if rows % size == 0)


def _tell(progress: Progress | None, writer: StoreWriter) -> None:
    """Shows what was found in the working folder, and counts the rows that are done."""
    if progress is None:
        return
    if writer.note:
        progress.line(writer.note)
    missing = sum(stop - start for start, stop in map(writer.unit_rows, writer.missing_units()))
    progress.skip(writer.rows - missing)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
