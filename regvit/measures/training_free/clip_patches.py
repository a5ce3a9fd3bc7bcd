"""What single patches say in the space that a CLIP model's images and texts share, nothing trained.

`patch_embeddings`: unit vectors of patches, to be held against those of class names. With x the input of the last block,
y = norm1(x) and q, k, v its queries, keys and values a head (scale s = 1/√(channels of a head)):

    plain        the model's own patch tokens after the last norm
    qq           softmax(s q qᵀ) v, no residual, no MLP                         ClearCLIP, Lan et al. 2024, arXiv:2407.12442
    kk_gaussian  softmax(s k kᵀ + ω) v, no residual, no MLP; ω of two patches   NACLIP, Hajimiri et al. 2024, arXiv:2404.08181
                 is exp(−distance² / 2σ²), σ = 5 patches, and 0 of other tokens
    qq_kk        (softmax(s q qᵀ) + softmax(s k kᵀ)) v, in place of the         SCLIP, Wang et al. 2023, arXiv:2312.01597
                 block's attention; residual and MLP stay

each then through the last norm and the projection. They are the foils of test-time registers: training-free repairs of
the last block, where registers repair what comes before.

`attributions`: what each patch adds to an image's embedding through the attention of CLS, summed over layers and heads:

    c_j = P (γ ⊙ (Σ_l a_lj − L μ / m) / σ + L β / m) / |z|,   a_lj = Σ_heads A_l[CLS, j] v_lj W_l + b_l / n,   m = (2 L + 1) n

with W and b of the attention's output, μ, σ, γ and β of the last norm at CLS, z the embedding before it is made of unit
length, L blocks and n tokens. Test-time registers are tokens, and no patches. Source: Gandelsman et al. 2024,
arXiv:2310.05916, and its code `clip_text_span`, which arXiv:2506.08010 (table 4) measures by.

Shape letters: b image, n token, p patch, h head, d channel, e channel of the shared space.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regvit.models.attention import watch_prefix_attention
from regvit.models.hooks import blocks, forward_until, watch_inputs
from regvit.models.token_features import project
from regvit.models.tokens import TokenLayout

FOILS = ("plain", "qq", "kk_gaussian", "qq_kk")
SIGMA = 5.0  # patches


class Attributions(NamedTuple):
    """Of a batch: unit embeddings of the images, and what each patch adds to them."""

    images: Float[Tensor, "b e"]
    patches: Float[Tensor, "b p e"]


@torch.inference_mode()
def patch_embeddings(
    model: nn.Module, projection: nn.Module, images: Float[Tensor, "b 3 s s"], foil: str = "plain"
) -> Float[Tensor, "b p e"]:
    """Unit vectors of patches in the shared space.

    Args:
        model: a timm backbone without a head, with or without registers.
        projection: from its pooled feature into the shared space.
        images: normalised, on the model's device.
        foil: one of `FOILS`.
    Raises:
        ValueError: the foil is unknown.
    """
    layout, block = TokenLayout.of(model), blocks(model)[-1]
    if foil not in FOILS:
        raise ValueError(f"foil is {foil!r}; expected one of {', '.join(FOILS)}")
    if foil == "plain":
        return F.normalize(projection(layout.patches(model.forward_features(images))), dim=-1)
    seen: list[Tensor] = []
    with watch_inputs({0: block}, lambda _, x: seen.append(x)):
        forward_until(model, images, block)
    x = seen[0]
    attended = block.ls1(_attended(block.attn, block.norm1(x), foil, layout.prefix))
    if foil == "qq_kk":
        x = x + attended
        attended = x + block.ls2(block.mlp(block.norm2(x)))
    return F.normalize(projection(layout.patches(model.norm(attended))), dim=-1)


def _attended(attention: nn.Module, y: Float[Tensor, "b n d"], foil: str, prefix: int) -> Float[Tensor, "b n d"]:
    """The attention's output with other weights than its own."""
    q, k, v = (_heads(attention, project(attention, y, kind)) for kind in "qkv")
    q, k = attention.q_norm(q), attention.k_norm(k)  # (b, h, n, c)
    logits = {"qq": q @ q.mT * attention.scale, "kk": k @ k.mT * attention.scale}
    if foil == "kk_gaussian":
        weights = (logits["kk"] + _window(y.shape[1], prefix).to(y)).softmax(-1)
    else:
        weights = sum(logits[name].softmax(-1) for name in foil.split("_"))
    return attention.proj((weights @ v).transpose(1, 2).flatten(2))


def _window(tokens: int, prefix: int) -> Float[Tensor, "n n"]:
    side = round((tokens - prefix) ** 0.5)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    window = torch.zeros(tokens, tokens, dtype=torch.float64)
    window[prefix:, prefix:] = torch.exp(-torch.cdist(places, places).square() / (2 * SIGMA**2))
    return window


@torch.inference_mode()
def attributions(model: nn.Module, projection: nn.Module, images: Float[Tensor, "b 3 s s"]) -> Attributions:
    """Embeddings of the images, and the part of each patch in them.

    Args:
        model, projection, images: see `patch_embeddings`.
    Raises:
        ValueError: the model does not read out CLS after a last norm, or the projection is not linear.
    """
    layout, last = TokenLayout.of(model), model.norm
    if not layout.cls or not isinstance(last, nn.LayerNorm):
        raise ValueError(
            f"{type(model).__name__} does not read out CLS after a layer norm; take a CLIP model that does"
        )
    zero = torch.zeros(1, last.weight.numel(), device=images.device)
    if projection(zero).any():
        raise ValueError("the projection adds a bias, so that what patches add to it cannot be told; take a CLIP model")
    attention = {layer: block.attn for layer, block in enumerate(blocks(model))}
    inputs, final = {}, []
    with (
        watch_inputs(attention, lambda layer, y: inputs.update({layer: y})),
        watch_inputs({0: last}, lambda _, x: final.append(x)),
        watch_prefix_attention(model) as weights,
    ):
        tokens = model.forward_features(images)
    added = torch.zeros_like(tokens)
    for layer, own in attention.items():
        v = _heads(own, project(own, inputs[layer], "v"))
        from_cls = weights[layer][:, :, 0, :, None] * v  # (b, h, n, c)
        out = F.linear(from_cls.transpose(1, 2).flatten(2), own.proj.weight)
        out = out if own.proj.bias is None else out + own.proj.bias / tokens.shape[1]
        added += blocks(model)[layer].ls1(out)
    x, embedding = final[0][:, 0], projection(tokens[:, 0])
    mean, spread = x.mean(-1), (x.var(-1, unbiased=False) + last.eps).sqrt()
    share = len(attention) / ((2 * len(attention) + 1) * tokens.shape[1])
    centred = layout.patches(added) - share * mean[:, None, None]
    normed = last.weight * centred / spread[:, None, None] + share * last.bias
    return Attributions(F.normalize(embedding, dim=-1), projection(normed) / embedding.norm(dim=-1)[:, None, None])


def _heads(attention: nn.Module, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n c"]:
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
