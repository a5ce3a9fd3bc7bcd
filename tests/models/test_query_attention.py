"""Attention over all queries against softmax(QKᵀ/√d), computed whole in float64."""

import numpy as np
import pytest
import torch

from regvit.models.attention import unfused
from regvit.models.query_attention import drawn_queries, watch_query_attention
from regvit.models.tokens import TokenLayout
from regvit.registers.test_time import add_test_time_registers


def dense(qkv: torch.Tensor, heads: int) -> np.ndarray:
    """(b, n, 3 d) of a block to its attention (b, h, n, n)."""
    b, n, width = qkv.shape
    q, k, _ = qkv.double().reshape(b, n, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4).numpy()
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def by_hand(a: np.ndarray, prefix: int, chosen: np.ndarray) -> tuple:
    """Entropy, largest weight and coherence of one attention matrix (n, n)."""
    n = len(a)
    side = round((n - prefix) ** 0.5)
    place = np.stack(np.divmod(np.arange(n - prefix), side), 1)
    apart = np.sqrt(((place[chosen, None] - place[None]) ** 2).sum(-1))
    share = (n - prefix) / len(chosen)  # of all patches by one that was drawn
    weights = np.concatenate([np.ones(prefix), np.full(len(chosen), share)]) / n
    rows = np.concatenate([a[:prefix], a[prefix + chosen]])
    correlation = np.corrcoef(a[prefix + chosen, prefix:].ravel(), apart.ravel())[0, 1]
    return (weights * -(rows * np.log(rows)).sum(1)).sum(), (weights * rows.max(1)).sum(), correlation


@pytest.mark.parametrize("most", [256, 20])
@pytest.mark.parametrize("kind", ["cls", "registers", "test_time", "patches alone"])
def test_the_three_numbers_are_those_of_the_whole_matrix(kind, most, tiny_vit, noise_images):
    model = tiny_vit(0, cls=kind != "patches alone", registers=2 if kind == "registers" else 0)
    if kind == "test_time":
        add_test_time_registers(model, {2: [3, 9]}, 1)
    seen, images = {}, noise_images(3)
    with torch.no_grad():
        for block in model.blocks:  # sharper than random weights make it
            block.attn.qkv.weight.mul_(3)
    layers = [1, 4]
    hooks = [
        model.blocks[i].attn.qkv.register_forward_hook(lambda _, __, out, i=i: seen.update({i: out})) for i in layers
    ]
    with torch.inference_mode(), watch_query_attention(model, layers, most) as found:
        model.forward_features(images)
    for hook in hooks:
        hook.remove()
    prefix = TokenLayout.of(model).prefix
    chosen = drawn_queries(64, most).numpy()
    assert len(chosen) == min(64, most)
    for layer in layers:
        a = dense(seen[layer], 4)
        for image in range(3):
            for head in range(4):
                expected = by_hand(a[image, head], prefix, chosen)
                assert found[layer][image, head].numpy() == pytest.approx(expected, abs=1e-5)
    with torch.inference_mode(), unfused(model), watch_query_attention(model, layers, most) as opened:
        model.forward_features(images)
    assert all(torch.allclose(opened[layer], found[layer], atol=1e-5) for layer in layers)


def test_uniform_attention_has_the_largest_entropy_and_no_coherence(tiny_vit, noise_images):
    model = tiny_vit(0, cls=False)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()
    with torch.inference_mode(), watch_query_attention(model, [0]) as found:
        model.forward_features(noise_images(1))
    entropy, largest, coherence = found[0][0, 0].tolist()
    assert (entropy, largest) == pytest.approx((np.log(64), 1 / 64), rel=1e-6)
    assert coherence == 0
