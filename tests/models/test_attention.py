import pytest
import timm
import torch

from regvit.models.attention import cls_attention, prefix_attention, query_names, unfused, watch_prefix_attention
from regvit.models.hooks import blocks, watch_inputs
from regvit.models.tokens import TokenLayout

NARROW = {"embed_dim": 128, "num_heads": 4}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False).eval()


def test_fused_attention_is_switched_back_also_after_an_error(model):
    before = [block.attn.fused_attn for block in model.blocks]
    cls_attention(model, torch.randn(1, 3, 160, 160))
    with pytest.raises(RuntimeError, match="on purpose"), unfused(model):
        assert not any(block.attn.fused_attn for block in model.blocks)
        raise RuntimeError("on purpose")
    assert [block.attn.fused_attn for block in model.blocks] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("architecture", "size", "args"),
    [
        ("test_vit3", 160, {}),  # CLS and a register
        ("vit_small_patch14_reg4_dinov2", 56, {"depth": 2}),
        ("vit_base_patch16_clip_224", 64, {"depth": 1} | NARROW),
        ("eva02_tiny_patch14_224", 56, {"depth": 2}),  # rotary positions
        ("vit_small_patch16_dinov3", 64, {"depth": 2}),  # rotary positions beside registers
        ("vit_small_patch16_rope_mixed_224", 64, {"depth": 2}),
        ("beit_base_patch16_224", 224, {"depth": 1} | NARROW),  # a bias for each pair of tokens
        ("vit_base_patch16_xp_224", 224, {"depth": 1} | NARROW),  # attention and MLP side by side
        ("vit_dwee_patch16_reg1_gap_256", 64, {"depth": 1}),  # differential: read in the open
        ("deit_tiny_distilled_patch16_224", 64, {"depth": 2}),  # two class tokens
    ],
)
def test_rows_of_prefix_tokens_are_those_of_the_full_attention_matrix(architecture, size, args):
    torch.manual_seed(0)
    args = args if size in (160, 224) else {**args, "img_size": size}
    model = timm.create_model(architecture, pretrained=False, **args).eval()
    for weight in model.parameters():
        weight.data.mul_(2 if weight.ndim > 1 else 1)  # at the start attention is nearly uniform, which hides errors
    x, prefix = torch.randn(2, 3, size, size), TokenLayout.of(model).prefix
    full = {}
    drops = {layer: getattr(block, "attn", block).attn_drop for layer, block in enumerate(blocks(model))}
    with torch.no_grad(), unfused(model), watch_inputs(drops, lambda layer, a: full.update({layer: a})):
        model.forward_features(x)
    found = prefix_attention(model, x)
    assert found.shape[-2] == prefix and found.shape[-1] == full[0].shape[-1]
    if TokenLayout.of(model).cls:
        assert torch.allclose(cls_attention(model, x, [0])[0], full[0][:, :, 0].mean(1), atol=1e-6)
    for layer, weights in full.items():
        assert torch.allclose(found[layer], weights[:, :, :prefix], atol=1e-6), layer
    assert full[0].amax() > 1.5 / full[0].shape[-1]


def test_looking_at_prefix_tokens_changes_no_output_and_leaves_no_trace(model):
    x = torch.randn(1, 3, 160, 160)
    with torch.inference_mode():
        plain = model.forward_features(x)
        with watch_prefix_attention(model, [5]) as seen:
            watched = model.forward_features(x)
            assert all(block.attn.fused_attn for block in model.blocks)  # the kernel runs on
        model.forward_features(2 * x)
    assert torch.equal(plain, watched)
    assert seen.keys() == {5}
    assert torch.allclose(seen[5], prefix_attention(model, x, [5])[0])  # not overwritten after the block
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_boolean_mask_and_a_scale_of_the_kernel_are_kept(tiny_vit, noise_images):
    model = tiny_vit()
    hidden = torch.ones(65, 65, dtype=torch.bool)
    hidden[:, 40:] = False  # nobody sees the last tokens

    def attend(x, **_):
        q, k, v = attn.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=1.0)
        kept.append((q[:, :, :1] @ k.mT)[..., :40].softmax(-1))
        return attn.proj(out.transpose(1, 2).flatten(2))

    attn, kept = model.blocks[1].attn, []
    attn.forward = attend
    found = prefix_attention(model, noise_images(2), [1])[0]
    assert torch.allclose(found[..., :40], kept[0], atol=1e-6)
    assert (found[..., 40:] == 0).all()


def test_what_has_no_attention_to_read_is_refused_and_no_trace_is_left(model, tiny_vit):
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="no CLS token"):
        cls_attention(tiny_vit(cls=False, registers=1), x)
    with pytest.raises(ValueError, match="neither CLS nor registers"):
        prefix_attention(tiny_vit(cls=False), x)
    with pytest.raises(ValueError, match="layer 6 is out of range: the model has 6 blocks"):
        prefix_attention(tiny_vit(), x, [6])
    del model.blocks[4].attn.attn_drop
    model.blocks[4].attn.fused_attn = False
    with pytest.raises(ValueError, match=r"block 4 \(Block\) has no attention weights to read"):
        prefix_attention(model, torch.randn(1, 3, 160, 160))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_queries_are_named_in_the_order_of_the_sequence():
    assert query_names(TokenLayout(1, 1, 1)) == ("cls", "register_0", "register_1")
    assert query_names(TokenLayout(2, 0)) == ("cls", "cls_1")
    assert query_names(TokenLayout(0, 1)) == ("register_0",)
