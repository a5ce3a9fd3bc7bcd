"""How many images a forward takes: few on a CPU, on a GPU as many as its memory has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from regvit.data.progress import progress as Progress
from regvit.features.cuda_streams import CudaLane, usual_batch_size
from regvit.features.forward import blank_batch, features_of
from regvit.features.memory import available
from regvit.models.backbones import Backbone
from regvit.models.hooks import watch_outputs

# Of a batch on a GPU: values in the largest tensor that a part of the model puts out, 0.6 GB in float32. It is 128 images
# of 224 px for a ViT-L/14, which fill large GPUs too.
LARGEST_ACTIVATION = 150_000_000
LARGEST_BATCH = 1024  # images, of models however small
# Largest tensors that a forward holds at once, at most: 2.3 to 4.5 of them, measured on the CPU over ViT-S, -B and -g,
# DINOv3 and EVA-02, attention fused or not, float32 and bfloat16. The weights lie there already.
LIVE_ACTIVATIONS = 5
UNITS_ON_DEVICE = 3  # being computed, on its way down, and one whose memory is not yet free again
# Of a GPU's free memory that batches may take: the allocator loses some to gaps, the libraries want space to work in.
SHARE = 0.8


def default_batch_size(
    backbone: Backbone, device: torch.device | str, precision: str = "float32", room: float = math.inf
) -> int:
    """Images a forward where none are given, a power of two.

    8 on a CPU, see `usual_batch_size`. On a GPU as many as keep the largest tensor that a part of the model puts out
    within LARGEST_ACTIVATION values, which is the same in every process and on every GPU; and fewer where those would not
    fit into `room`:

        bytes of a forward = images · (LIVE_ACTIVATIONS · bytes of the largest tensor + 3 · side² · (4 + 3))

    with 4 bytes for a normalised value, and 1 for each of the three batches of uint8 that are on the device. Without fused
    attention the largest tensor may be the attention matrix. It is read off one blank image, wherever the model is.

    Args:
        precision: of the forward; decides the bytes of the largest tensor.
        room: bytes of the device that the forward may take.
    """
    if not has_own_memory(torch.device(device)):
        return usual_batch_size(device)
    values, size = _largest_output(backbone, precision)
    fitting = room / (LIVE_ACTIVATIONS * size + _input_bytes(backbone))
    images = max(1, int(min(LARGEST_BATCH, LARGEST_ACTIVATION // values, fitting)))
    return 1 << (images.bit_length() - 1)


def _largest_output(backbone: Backbone, precision: str) -> tuple[int, int]:
    """Of one image: values of the largest tensor that a part of the model puts out, and the most bytes of one."""
    values = size = 1

    def see(_: int, output: object) -> None:
        nonlocal values, size
        if isinstance(output, Tensor):
            values, size = max(values, output.numel()), max(size, output.nbytes)

    where = next((parameter.device for parameter in backbone.model.parameters()), torch.device("cpu"))
    blank = blank_batch(backbone, 1, where)
    with watch_outputs(dict(enumerate(backbone.model.modules())), see):
        features_of(backbone, backbone.model.forward_features, blank, precision, ("patch_mean",))
    return values, size


def _input_bytes(backbone: Backbone) -> int:
    """Of one image on its way into the model: normalised to float32, and as uint8 in as many batches as are on a GPU."""
    return 3 * backbone.transform.size**2 * (4 + 1 + CudaLane.ahead)


def room_on(device: torch.device, shapes: Mapping[str, tuple[int, ...]], rows_per_unit: int) -> float:
    """Bytes that forwards may take on a device that holds the model already: a share of what units leave of the rest."""
    if not has_own_memory(device):
        return math.inf
    unit = 4 * rows_per_unit * sum(math.prod(shape) for shape in shapes.values())  # float32
    return SHARE * (available(device) - UNITS_ON_DEVICE * unit)


def has_own_memory(device: torch.device) -> bool:
    """Whether batches have to fit into memory of the device's own, and choose its kernels: a GPU, not a CPU."""
    return device.type == "cuda"


def find_batch_size(
    try_out: Callable[[int], None],
    device: torch.device,
    usual: int,
    estimate: int,
    begun: int | None,
    progress: Progress | None,
) -> int:
    """Images a forward for which a GPU here has room, as a blank batch shows.

    Args:
        try_out: has a blank batch of so many images computed.
        usual: `default_batch_size` of the model alone; a line tells where it is not reached.
        estimate: `default_batch_size` for the memory that is free; halved as often as it does not fit.
        begun: that of the unfinished store, which is taken instead. Fewer would begin the store anew, and so are left to
            whoever calls.
    Raises:
        torch.OutOfMemoryError: there is no room for those of the unfinished store, or not for a single image.
    """
    if begun is not None:
        try:
            return _tried(try_out, begun, least=begun)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the unfinished store was made in batches of {begun} images and is only gone on with in such; a smaller "
                f"batch_size begins it anew: {error}"
            ) from error
    size = _tried(try_out, estimate, least=1)
    if size < usual and progress is not None:
        progress.line(f"batches of {size} images instead of {usual}, as {device} has no room for more")
    return size


def _tried(try_out: Callable[[int], None], size: int, least: int) -> int:
    """`size`, or as often halved as a blank batch of it does not fit.

    Raises:
        torch.OutOfMemoryError: half of what does not fit is less than `least`.
    """
    while True:
        try:
            try_out(size)
            return size
        except torch.OutOfMemoryError:
            if size // 2 < least:
                raise
        torch.cuda.empty_cache()  # what a larger batch got before it failed lies in pieces of other sizes
        size //= 2
