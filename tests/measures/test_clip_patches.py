"""Patches of timm's tower against open_clip's own, and against float64 arithmetic on open_clip's weights."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from measures.test_zeroshot import ARCHITECTURES, images, save_clip, save_tower

from regvit.measures.training_free.clip_patches import FOILS, attributions, patch_embeddings
from regvit.measures.zeroshot import open_text_tower
from regvit.registers.test_time import add_test_time_registers

HEADS = 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip_folder = save_clip(folder / "text", True)
    backbone = save_tower(folder / "tower", clip_folder, ARCHITECTURES[True])
    return open_text_tower(f"folder:{clip_folder}"), backbone, open_clip.create_model(f"local-dir:{clip_folder}").eval()


def traced(whole, x):
    """Input of every block of open_clip's tower, float64, batch first."""
    seen = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block in whole.visual.transformer.resblocks
    ]
    whole.visual(x)
    for handle in handles:
        handle.remove()
    return seen


def qkv(block, y):
    """(b, h, n, c) each, from the weights alone."""
    b, n, d = y.shape
    found = y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
    return (part.reshape(b, n, HEADS, d // HEADS).transpose(1, 2) for part in found.split(d, dim=-1))


def reference(whole, x, foil):
    """The foil by its paper, on open_clip's weights."""
    visual, block = whole.visual, whole.visual.transformer.resblocks[-1]
    before = traced(whole, x)[-1]
    q, k, v = qkv(block, block.ln_1(before))
    s = (q.shape[-1]) ** -0.5
    side, n = 4, before.shape[1]
    window = torch.zeros(n, n, dtype=torch.float64)
    for i in range(side**2):
        for j in range(side**2):
            square = (i // side - j // side) ** 2 + (i % side - j % side) ** 2
            window[1 + i, 1 + j] = np.exp(-square / 50)
    weights = {
        "qq": (s * q @ q.mT).softmax(-1),
        "kk_gaussian": (s * k @ k.mT + window).softmax(-1),
        "qq_kk": (s * q @ q.mT).softmax(-1) + (s * k @ k.mT).softmax(-1),
    }[foil]
    out = block.attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
    if foil == "qq_kk":
        out = before + out
        out = out + block.mlp(block.ln_2(out))
    return F.normalize(visual.ln_post(out)[:, 1:] @ visual.proj, dim=-1)


@pytest.mark.parametrize("foil", FOILS)
def test_patches_are_those_of_open_clip_and_foils_are_what_their_papers_say(pair, foil):
    clip, backbone, whole = pair
    x = images(3)
    found = patch_embeddings(backbone.model, clip.projection, x, foil)
    with torch.no_grad():
        if foil == "plain":
            whole.visual.output_tokens = True
            expected = F.normalize(whole.visual(x)[1] @ whole.visual.proj, dim=-1)
            whole.visual.output_tokens = False
        else:
            expected = reference(whole.double(), x.double(), foil)
            whole.float()
    assert found.shape == (3, 16, 48) and (found - expected).abs().max() < 1e-5


def published_attributions(whole, x):
    """PRSLogger of clip_text_span in float64: every layer and head by itself, normalised, projected, then summed."""
    visual, layers = whole.visual, whole.visual.transformer.resblocks
    inputs, total = traced(whole, x), 0
    z = visual(x)
    final = visual.ln_post  # of CLS
    seen = []
    handle = final.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    visual(x)
    handle.remove()
    cls = seen[0][:, 0] if seen[0].ndim == 3 else seen[0]
    mean, std = cls.mean(-1)[:, None, None, None], (cls.var(-1, unbiased=False) + final.eps).sqrt()[:, None, None, None]
    for block, before in zip(layers, inputs, strict=True):
        q, k, v = qkv(block, block.ln_1(before))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]  # (b, h, n)
        by_head = block.attn.out_proj.weight.T.reshape(HEADS, -1, before.shape[-1])
        parts = torch.einsum("bhn,bhnc,hcd->bnhd", weights, v, by_head)
        n = before.shape[1]
        parts = parts + block.attn.out_proj.bias / (n * HEADS)
        share = (2 * len(layers) + 1) * n * HEADS
        normed = final.weight * (parts - mean / share) / std + final.bias / share
        total = total + (normed @ visual.proj / z.norm(dim=-1)[:, None, None, None]).sum(2)
    return F.normalize(z, dim=-1), total[:, 1:]


def test_what_patches_add_to_an_embedding_is_what_the_published_code_says(pair):
    clip, backbone, whole = pair
    x = images(3)
    found = attributions(backbone.model, clip.projection, x)
    with torch.no_grad():
        expected = published_attributions(whole.double(), x.double())
        whole.float()
    assert (found.images - expected[0]).abs().max() < 1e-5
    assert found.patches.shape == (3, 16, 48) and (found.patches - expected[1]).abs().max() < 1e-5


def test_registers_are_tokens_that_get_attention_and_are_no_patches(pair):
    clip, backbone, _ = pair
    x = images(2)
    plain = {foil: patch_embeddings(backbone.model, clip.projection, x, foil) for foil in FOILS}
    before = attributions(backbone.model, clip.projection, x)
    with add_test_time_registers(backbone.model, {0: [3, 5]}, 1, scale=50.0):
        for foil in FOILS:
            cured = patch_embeddings(backbone.model, clip.projection, x, foil)
            assert cured.shape == plain[foil].shape and not torch.allclose(cured, plain[foil])
        after = attributions(backbone.model, clip.projection, x)
    assert after.patches.shape == before.patches.shape and not torch.allclose(after.patches, before.patches)
