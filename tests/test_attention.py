import pytest
import timm
import torch

from regvit.attention import cls_attention, unfused


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False).eval()


def test_weights_are_the_softmax_of_queries_and_keys(model):
    x = torch.randn(2, 3, 160, 160)
    attn, seen = model.blocks[3].attn, []
    handle = attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.forward_features(x)
        handle.remove()
        b, n, d = seen[0].shape
        q, k, _ = attn.qkv(seen[0]).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)  # (b, h, n, d) each
        expected = (q[:, :, :1] @ k.mT / (d / attn.num_heads) ** 0.5).softmax(-1)[:, :, 0].mean(1)
    assert torch.allclose(cls_attention(model, x, [3])[0], expected, atol=1e-6)


def test_weights_sum_to_one_in_every_layer(model):
    weights = cls_attention(model, torch.randn(2, 3, 160, 160))
    assert weights.shape == (6, 2, 101)
    assert torch.allclose(weights.sum(-1), torch.ones(6, 2), atol=1e-5)


def test_fused_attention_is_switched_back_also_after_an_error(model):
    before = [block.attn.fused_attn for block in model.blocks]
    cls_attention(model, torch.randn(1, 3, 160, 160))
    with pytest.raises(RuntimeError, match="on purpose"), unfused(model):
        assert not any(block.attn.fused_attn for block in model.blocks)
        raise RuntimeError("on purpose")
    assert [block.attn.fused_attn for block in model.blocks] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_without_cls_is_refused():
    with pytest.raises(ValueError, match="no CLS token"):
        cls_attention(timm.create_model("test_vit2", pretrained=False), torch.randn(1, 3, 160, 160))
