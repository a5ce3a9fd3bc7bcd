import pytest
import timm
import torch
from timm.models.eva import Eva

from regvit.models.hooks import blocks
from regvit.models.token_features import Feature, patch_features, watch_patch_features


class Mixing(torch.nn.Module):
    """An attention that has no projections."""

    def forward(self, x, **_):
        return x.mean(1, keepdim=True).expand_as(x)


def projections(model, images, layer):
    """Output of the block's fused projection, caught where the published code of LOST catches it."""
    caught = []
    handle = blocks(model)[layer].attn.qkv.register_forward_hook(lambda _, __, out: caught.append(out))
    model.forward_features(images)
    handle.remove()
    return caught[0].chunk(3, dim=-1)  # q, k, v


def test_keys_queries_and_values_are_those_of_the_blocks_projection(tiny_vit, noise_images):
    model, images = tiny_vit(registers=2), noise_images(3)
    found = patch_features(model, images, [Feature(kind, 4) for kind in "kqv"])
    q, k, v = projections(model, images, 4)
    for kind, expected in (("q", q), ("k", k), ("v", v)):
        assert torch.allclose(found[Feature(kind, 4)], expected[:, 3:], atol=1e-6)  # CLS and two registers left out


def test_tokens_are_normed_block_outputs_as_timm_gives_them(tiny_vit, noise_images):
    model, images = tiny_vit(), noise_images(2)
    expected = model.forward_intermediates(images, indices=[2, 5], norm=True, output_fmt="NLC", intermediates_only=True)
    found = patch_features(model, images, [Feature("token", 2), Feature("token", 5)])
    for layer, tokens in zip((2, 5), expected, strict=True):
        assert torch.allclose(found[Feature("token", layer)], tokens, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_projections_with_a_bias_apart_or_of_their_own_are_read_too(fused):
    torch.manual_seed(0)
    model = Eva(img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, qkv_fused=fused).eval()
    model.requires_grad_(False)
    attention = model.blocks[1].attn
    with torch.no_grad():
        biases = (attention.q_bias, attention.v_bias) if fused else (attention.q_proj.bias, attention.v_proj.bias)
        for bias in biases:
            bias.normal_()
    inputs = []
    attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    images = torch.randn(2, 3, 64, 64)
    found = patch_features(model, images, [Feature("v", 1), Feature("q", 1), Feature("k", 1)])
    x = inputs[0]
    if fused:
        expected = x @ attention.qkv.weight.T + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    else:
        expected = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], dim=-1)
    for kind, one in zip("qkv", expected.chunk(3, dim=-1), strict=True):
        assert torch.allclose(found[Feature(kind, 1)], one[:, 1:], atol=1e-5)


def test_features_come_in_the_order_asked_for_and_leave_no_trace(tiny_vit, noise_images):
    model = tiny_vit()
    wanted = [Feature("v", 5), Feature("token", 1), Feature("k", 0)]
    assert list(patch_features(model, noise_images(1), wanted)) == wanted
    with watch_patch_features(model, wanted) as seen:
        model.forward_features(noise_images(2))
        model.forward_features(noise_images(3))
    assert all(values.shape[0] == 3 for values in seen.values())  # the last batch only: nothing piles up
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_read_is_refused(tiny_vit):
    for feature, message in (
        (Feature("x", 0), "feature kind is 'x'; expected one of k, q, v, token"),
        (Feature("k", 6), "layer 6 is out of range: the model has 6 blocks"),
    ):
        with pytest.raises(ValueError, match=message), watch_patch_features(tiny_vit(), [feature]):
            pass
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1, num_classes=0)
    model.blocks[0].attn = Mixing()
    with (
        pytest.raises(ValueError, match=r"block 0 \(Block\) has neither attn.qkv nor attn.q_proj"),
        watch_patch_features(model, [Feature("k", 0)]),
    ):
        pass
    with watch_patch_features(model, [Feature("token", 0)]) as seen:
        model.forward_features(torch.zeros(1, 3, 32, 32))
    assert list(seen) == [Feature("token", 0)]
