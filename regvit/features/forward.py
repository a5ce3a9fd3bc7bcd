"""One forward: a batch of images to the arrays that are stored.

`Forward` is a backbone and a function of what it says; `Readouts` is the function of the stage `extract`, of the tokens that
`forward_features` returns, that is after the model's last norm (models that normalise only what they pooled, timm's
`fc_norm`, give their tokens before it):

    cls         CLS token                                  only where the model has one
    registers   trained registers, then test-time ones     only where the model has any
    patch_mean  mean over the patch tokens, in float32
    patches     the patch tokens themselves, row by row of the grid; only where asked for, as they are large
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from regvit.features.store import ArraySpec
from regvit.models.arithmetic import arithmetic, check_precision
from regvit.models.backbones import Backbone
from regvit.models.tokens import TokenLayout

ARRAYS = ("cls", "registers", "patch_mean")  # what is stored where nothing else is asked for
Compute = Callable[[nn.Module, Float[Tensor, "b 3 s s"]], Mapping[str, Shaped[Tensor, "b ..."]]]
# Images a forward where none are given. On a CPU more are slower: the hidden activations of a block outgrow 32 MiB, and
# what is larger glibc takes from the system and gives back again each time (ViT-S/14, 224 px, two cores: 24 images/s with
# 8, 13 with 32). On a GPU 256 images fill the largest, and half of what is free leaves room for gaps and for units.
CPU_BATCH, LARGEST_BATCH, SHARE, TRIED = 8, 256, 0.5, 4


@dataclass(frozen=True)
class Forward:
    """A backbone, and what is kept of a batch; it can be sent to another process.

    Attributes:
        backbone: with its test-time registers in place.
        compute: `compute(model, images)` gives arrays of one row an image from normalised images, within the arithmetic of
            `precision` and without gradients. Floats are stored as float16, booleans and whole numbers as they are.
        precision: see `regvit.models.arithmetic`; it is part of what makes the features.
        float32: names of arrays that are stored as float32.
    Raises:
        ValueError: the precision is unknown.
    """

    backbone: Backbone
    compute: Compute
    precision: str = "float32"
    float32: tuple[str, ...] = ()

    def __post_init__(self):
        check_precision(self.precision)

    def to(self, device: torch.device | str) -> Forward:
        """Itself, with the model moved."""
        self.backbone.model.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "b 3 s s"]) -> dict[str, Shaped[Tensor, "b ..."]]:
        """The arrays of a batch as they are stored, on its device; what float16 cannot hold is infinite.

        Raises:
            torch.OutOfMemoryError: the device has no room for so many images.
        """
        try:
            found = self.unrounded(images)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{images.device} has no room for {len(images)} images of {self.backbone.name} at once; give a smaller "
                f"batch_size, or free memory of the device and run the same again ({error})"
            ) from error
        return {
            name: values.to(torch.float32 if name in self.float32 else torch.float16) if values.is_floating_point() else values
            for name, values in found.items()
        }  # fmt: skip

    @torch.inference_mode()
    def unrounded(self, images: UInt8[Tensor, "b 3 s s"]) -> Mapping[str, Shaped[Tensor, "b ..."]]:
        """The arrays of a batch as they are computed."""
        with arithmetic(self.precision, images.device):
            return self.compute(self.backbone.model, self.backbone.transform.normalise(images))

    def blank(self, images: int, device: torch.device | str) -> UInt8[Tensor, "b 3 s s"]:
        """Black images of the size that the backbone takes."""
        side = self.backbone.transform.size
        return torch.zeros(images, 3, side, side, dtype=torch.uint8, device=device)

    def arrays(self, device: torch.device | str = "cpu") -> dict[str, ArraySpec]:
        """What each array holds of one image, from a forward of a blank one; the model is moved there.

        Raises:
            ValueError: see `compute`.
        """
        found = self.to(device)(self.blank(1, device))
        return {name: ArraySpec(tuple(v.shape[1:]), str(v.dtype).removeprefix("torch.")) for name, v in found.items()}

    def batch_size(self, device: torch.device) -> int:
        """Images a forward where none are given: 8 on a CPU; on a GPU the largest power of two up to 256 that takes no more
        than half of its free memory, by the peak of a few blank images."""
        if device.type != "cuda":
            return CPU_BATCH
        self(self.blank(TRIED, device))  # libraries take their own memory the first time
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self(self.blank(TRIED, device))
        each = max(1, (torch.cuda.max_memory_allocated(device) - before) // TRIED)
        fitting = int(SHARE * torch.cuda.mem_get_info(device)[0]) // each
        return 1 << (max(1, min(LARGEST_BATCH, fitting)).bit_length() - 1)


@dataclass(frozen=True)
class Readouts:
    """Some of `cls` (b, d), `registers` (b, r, d), `patch_mean` (b, d), `patches` (b, p, d) of a token sequence, float32.

    What the model does not have is left out.

    Raises:
        ValueError: an array is unknown, the model has none of them, or returns no token sequence.
    """

    names: tuple[str, ...] = ARRAYS

    def __post_init__(self):
        if unknown := [name for name in self.names if name not in (*ARRAYS, "patches")]:
            raise ValueError(f"array {unknown[0]!r} is unknown; expected some of {', '.join(ARRAYS)}, patches")

    def __call__(self, model: nn.Module, images: Float[Tensor, "b 3 s s"]) -> dict[str, Float[Tensor, "b ..."]]:
        tokens = model.forward_features(images)
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"{type(model).__name__}.forward_features returns {found}, expected a token sequence (image, token, "
                "channel); use a timm vision transformer"
            )
        return self.of_tokens(TokenLayout.of(model), tokens)

    def of_tokens(self, layout: TokenLayout, tokens: Float[Tensor, "b n d"]) -> dict[str, Float[Tensor, "b ..."]]:
        """The same of tokens that are there already."""
        tokens = tokens.float()
        make = {
            "cls": layout.cls_token if layout.cls else None,
            "registers": layout.registers if layout.num_registers else None,
            "patch_mean": lambda tokens: layout.patches(tokens).mean(1),
            "patches": layout.patches,
        }
        if not (names := [name for name in self.names if make[name] is not None]):
            raise ValueError(f"the model has none of the arrays asked for ({', '.join(self.names)})")
        return {name: make[name](tokens) for name in names}
