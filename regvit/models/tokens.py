"""Where CLS, register and patch tokens stand in a sequence: the only place that slices them.

Letters used for shapes throughout: b image, l layer, n token, p patch, r register, d channel, k neuron, c class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenLayout:
    """The order of a sequence: CLS, trained registers, test-time registers, patches.

    Args:
        cls: number of class tokens (0 or 1; 2 where a distillation token stands beside CLS).
        trained: number of registers that were trained with the model.
        test_time: number of registers added after training.
    """

    cls: int
    trained: int
    test_time: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> TokenLayout:
        """The layout of a timm vision transformer, test-time registers included.

        Raises:
            ValueError: the model does not say how many prefix tokens it has.
        """
        prefix = getattr(model, "num_prefix_tokens", None)
        if not isinstance(prefix, int):
            raise ValueError(
                f"{type(model).__name__} has no num_prefix_tokens, so its tokens cannot be told apart; "
                "use a timm vision transformer that has one (ViT, DeiT, EVA, DINOv2, DINOv3, CLIP, SigLIP, …)"
            )
        surgery = getattr(model, "test_time_registers", None)
        if surgery is not None:
            return replace(surgery.layout, test_time=surgery.num_registers)
        token = getattr(model, "reg_token", getattr(getattr(model, "embeds", None), "reg_token", None))
        trained = 0 if token is None else token.shape[1]
        return cls(cls=prefix - trained, trained=trained)

    @property
    def prefix(self) -> int:
        """Tokens before the first patch."""
        return self.cls + self.trained + self.test_time

    @property
    def num_registers(self) -> int:
        """Registers of either kind."""
        return self.trained + self.test_time

    def cls_token(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """The CLS token.

        Raises:
            ValueError: the model has none.
        """
        if not self.cls:
            raise ValueError("this model has no CLS token; read its patches or registers instead")
        return x[:, 0]

    def prefix_tokens(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """All tokens before the first patch: class tokens and registers."""
        return x[:, : self.prefix]

    def registers(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b r d"]:
        """All registers: the trained ones, then the test-time ones."""
        return x[:, self.cls : self.prefix]

    def test_time_registers(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b r d"]:
        """The registers that were added after training."""
        return x[:, self.cls + self.trained : self.prefix]

    def patches(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b p d"]:
        """The patch tokens: neither CLS nor any register."""
        return x[:, self.prefix :]

    def cls_and_patches(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """The class tokens and the patches: no register."""
        return torch.cat([x[:, : self.cls], self.patches(x)], dim=1)

    def with_registers(self, x: Float[Tensor, "b n d"], registers: Float[Tensor, "b r d"]) -> Float[Tensor, "b n d"]:
        """A sequence with other registers of both kinds."""
        return torch.cat([x[:, : self.cls], registers, self.patches(x)], dim=1)

    def with_patches(self, x: Float[Tensor, "b n d"], patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b n d"]:
        """A sequence with other patches."""
        return torch.cat([self.prefix_tokens(x), patches], dim=1)

    def untrained(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b rp d"]:
        """Test-time registers and patches: the tokens among which a register neuron's activation is moved."""
        return x[:, self.cls + self.trained :]

    def join(
        self, kept: Float[Tensor, "b n d"], registers: Float[Tensor, "b r d"], patches: Float[Tensor, "b p d"]
    ) -> Float[Tensor, "b n d"]:
        """A sequence with CLS and trained registers of `kept`, and new test-time registers and patches."""
        return torch.cat([kept[:, : self.cls + self.trained], registers, patches], dim=1)
