"""What each cure computes, held to values worked by hand, to scikit-learn, or to a few lines of another kind."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor
from stock_models import features, images, make
from torch.nn import functional as F

from regvit import TokenLayout, add_test_time_registers
from regvit.models.attention import prefix_attention, watch_attention
from regvit.models.hooks import watch_outputs
from regvit.registers.cures.average_views import View, _view
from regvit.registers.cures.cure import add_cure
from regvit.registers.cures.given import Given
from regvit.registers.cures.interpolate import interpolated
from regvit.registers.cures.interpolate_lof import largest, local_outlier_factor
from regvit.registers.cures.mask_attention import both, visible
from regvit.registers.cures.remove_direction import linearised, singular_direction
from regvit.registers.neurons import find_register_neurons
from regvit.registers.outliers import Detection, patch_norms
from regvit.registers.planting import plant


@pytest.fixture(scope="module")
def planted(tiny_vit, noise_images):
    model, x = tiny_vit(3), noise_images(12)
    plant(model, x, seed_layer=1, amplifier_layer=2, edit_keys=True)
    return model, x, find_register_neurons(model, x)


def outliers_of(planted) -> torch.Tensor:
    model, x, found = planted
    return torch.from_numpy(patch_norms(model, [x], [found.detection.layer])[0] > found.detection.threshold)


def test_an_outlier_becomes_the_mean_of_its_neighbours_that_are_none():
    x = torch.arange(16.0).reshape(1, 16, 1).repeat(1, 1, 2)
    outliers = torch.zeros(1, 16, dtype=torch.bool)
    outliers[0, [0, 5, 6]] = True
    x[0, 5] = 1000
    out = interpolated(x, outliers)[0, :, 0]
    assert out[0] == pytest.approx((1 + 4) / 2)  # the corner; 5 is an outlier
    assert out[5] == pytest.approx((1 + 2 + 4 + 8 + 9 + 10) / 6)
    assert out[6] == pytest.approx((1 + 2 + 3 + 7 + 9 + 10 + 11) / 7)
    assert torch.equal(out[~outliers[0]], x[0, ~outliers[0], 0])
    alone = torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(interpolated(x[:, :4], alone), x[:, :4])  # no neighbour that is none: it stays


def test_the_local_outlier_factor_is_that_of_scikit_learn():
    x = torch.randn(3, 49, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, 7] *= 9
    ours = local_outlier_factor(x, 10)
    for image, values in zip(x, ours, strict=True):
        reference = LocalOutlierFactor(n_neighbors=10).fit(image.numpy())
        assert np.allclose(values.numpy(), -reference.negative_outlier_factor_)
    assert largest(ours, 0.05).sum(1).tolist() == [3, 3, 3]
    assert largest(ours, 0.05)[1, 7]


def test_a_clipped_patch_keeps_its_direction_and_has_the_norm_of_the_threshold(planted):
    model, x, found = planted
    seen, block = [], model.blocks[found.detection.layer]
    with watch_outputs({0: block}, lambda _, out: seen.append(out)):
        features(model, x)
        with add_cure(model, "clip_norm", found):
            features(model, x)
    before, after = (each[:, 1:][outliers_of(planted)] for each in seen)
    assert torch.allclose(after.norm(dim=-1), torch.tensor(found.detection.threshold), rtol=1e-5)
    assert (after.norm(dim=-1) < found.detection.threshold).all()
    assert F.cosine_similarity(before, after).min() > 0.99999


@pytest.mark.parametrize("queries", ["all", "cls"])
def test_no_attention_falls_on_outliers_after_the_detection_block(planted, queries):
    model, x, found = planted
    outliers, layer = outliers_of(planted), found.detection.layer
    plain = prefix_attention(model, x)[:, :, :, 0, 1:]  # (l, b, h, p) of CLS
    with add_cure(model, "mask_attention", found, queries=queries):
        masked = prefix_attention(model, x)[:, :, :, 0, 1:]
        unaware = features(model, x)
    at = outliers[:, None].expand_as(plain[0])
    assert plain[layer + 1][at].max() > 0.1
    assert (masked[layer + 1 :, at] == 0).all()
    assert torch.equal(masked[: layer + 1], plain[: layer + 1])
    # the first block after detection: what is left is shared out again
    kept = torch.where(at, 0, plain[layer + 1])
    rest = prefix_attention(model, x)[layer + 1, :, :, 0, :1] + kept.sum(-1, keepdim=True)
    assert torch.allclose(masked[layer + 1], kept / rest, atol=1e-6)
    assert not torch.allclose(unaware, features(model, x), atol=1e-3)


def test_of_a_model_with_two_class_tokens_the_queries_of_both_are_masked_and_no_other():
    model = make("deit_tiny_distilled_patch16_224", img_size=64, depth=3)
    x = images(model)
    norms = torch.from_numpy(patch_norms(model, [x], [0])[0])
    threshold = float(norms.median())
    seen = {}
    with (
        add_cure(model, "mask_attention", Given(Detection(0, threshold, 1.0)), queries="cls"),
        watch_attention(model, [1, 2], lambda layer, rows: seen.update({layer: rows[:]})),
    ):
        features(model, x)
    at = (norms > threshold)[:, None, None].expand(-1, 3, 2, -1)
    for rows in seen.values():
        assert (rows[:, :, :2, 2:][at] == 0).all()
        assert (rows[:, :, 2:] > 0).all()


def test_masks_are_joined_and_never_hide_every_key():
    outliers = torch.tensor([[True, False], [True, True]])
    assert visible(outliers, 1)[:, 0, 0].tolist() == [[True, False, True], [True, False, False]]
    assert visible(outliers, 0)[:, 0, 0].tolist() == [[False, True], [True, True]]
    allowed = visible(outliers[:1], 0)
    assert both(torch.tensor([[[[True, True]]]]), allowed).tolist() == [[[[False, True]]]]
    assert both(torch.tensor([[[[0.5, 0.25]]]]), allowed).tolist() == [[[[-float("inf"), 0.25]]]]


@torch.no_grad()
def test_a_prefix_gives_what_a_token_with_that_key_and_value_would_give(planted):
    model, x, found = planted
    layer = found.detection.layer + 1
    block, inputs = model.blocks[layer], []
    handle = block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with add_cure(model, "prefix_kv", found, images=x) as cure:
        inputs.clear()
        seen = []
        after = block.attn.register_forward_hook(lambda _, __, out: seen.append(out))
        features(model, x)
        after.remove()
        assert prefix_attention(model, x)[layer].shape[-1] == 65
        assert (prefix_attention(model, x)[layer].sum(-1) < 0.999).any()  # the rest falls on the prefix
        rows = {}
        with watch_attention(model, [layer], lambda at, all_rows: rows.update({at: all_rows[:]})):
            features(model, x)
    handle.remove()
    tokens, sink = inputs[0], cure.measured["sinks"][0].expand(len(x), -1, -1)
    extended = torch.cat([tokens[:, :1], sink, tokens[:, 1:]], dim=1)
    q, k, v = block.attn.qkv(extended).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT * 16**-0.5
    hidden = torch.cat([torch.zeros(len(x), 2, dtype=torch.bool), outliers_of(planted)], dim=1)
    weights = logits.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    wanted = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(seen[0], torch.cat([wanted[:, :1], wanted[:, 2:]], dim=1), atol=1e-5)
    tokens_alone = [0, *range(2, 66)]
    assert torch.allclose(rows[layer], weights[:, :, tokens_alone][..., tokens_alone], atol=1e-5)


def test_the_sinks_of_a_prefix_are_those_of_the_largest_norms(planted):
    model, x, found = planted
    norms = torch.from_numpy(patch_norms(model, [x], [found.detection.layer])[0])
    image, patch = divmod(int(norms.flatten().argmax()), 64)
    seen = []
    handle = model.blocks[found.detection.layer + 1].attn.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    features(model, x)
    handle.remove()
    with add_cure(model, "prefix_kv", found, images=x.split(5), tokens=2) as cure:
        assert torch.equal(cure.measured["sinks"][0, 0], seen[0][image, 1 + patch])
    with pytest.raises(ValueError, match="have fewer than 999 outliers to take sinks from"):
        add_cure(model, "prefix_kv", found, images=x, tokens=999)


@torch.no_grad()
def test_a_linearised_block_is_the_product_of_its_weights_and_of_the_mlp_by_least_squares(tiny_vit):
    block = tiny_vit(0, layer_scale=0.5).blocks[0]
    for parameter in block.parameters():  # biases and scales that would show
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    ours = linearised(block, 4_000, torch.Generator().manual_seed(0))
    d = 64
    centre = torch.eye(d) - torch.ones(d, d) / d
    values = block.attn.qkv.weight.chunk(3)[2]
    x = torch.randn(4_000, d, generator=torch.Generator().manual_seed(0))
    hidden = torch.linalg.lstsq(x, block.mlp.act(block.mlp.fc1(x))).solution.T
    attend = block.ls1.gamma.diag() @ block.attn.proj.weight @ values @ block.norm1.weight.diag() @ centre
    write = block.ls2.gamma.diag() @ block.mlp.fc2.weight @ hidden @ block.norm2.weight.diag() @ centre
    reference = (torch.eye(d) + write) @ (torch.eye(d) + attend)
    assert torch.allclose(ours.float(), reference, atol=1e-4)


def test_the_singular_direction_is_the_one_along_which_the_blocks_stretch_most(tiny_vit):
    model = tiny_vit(1)
    u = singular_direction(model, 1, samples=2_000)
    generator = torch.Generator().manual_seed(0)
    product = torch.eye(64, dtype=torch.float64)
    for block in model.blocks[:2]:
        product = linearised(block, 2_000, generator) @ product
    assert u.norm() == pytest.approx(1, abs=1e-6)
    assert (product.T @ u.double()).norm() == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-5)


def test_patches_have_nothing_left_along_the_removed_direction_and_prefix_tokens_are_as_they_were(planted):
    model, x, found = planted
    seen = []
    with watch_outputs({0: model.blocks[found.detection.layer]}, lambda _, out: seen.append(out)):
        with add_cure(model, "remove_direction", found, images=x, direction="outliers") as cure:
            seen.clear()  # of the images that were measured
            features(model, x)
        features(model, x)
    assert (seen[0][:, 1:] @ cure.measured["direction"]).abs().max() < 1e-4
    assert (seen[1][:, 1:] @ cure.measured["direction"]).abs().max() > 10
    assert torch.equal(seen[0][:, 0], seen[1][:, 0])


def test_a_view_is_moved_and_flipped():
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    moved = _view(x, 2, 0, False)
    assert torch.equal(moved[..., 2:, :], x[..., :-2, :])
    assert torch.equal(moved[..., :2, :], x[..., :1, :].expand(-1, -1, 2, -1))
    assert torch.equal(_view(x, -2, 4, True).flip(-1)[..., :4, 4:], x[..., 2:, :2])
    assert View(0.6, -1, False).within(2) == (1, -2)


def test_views_of_a_model_that_sees_each_patch_alone_average_to_what_it_says_of_the_image(tiny_vit):
    model = tiny_vit(0)
    for block in model.blocks:  # nothing passes from one patch to another, and no place has a position
        block.attn.proj.weight.zero_()
        block.attn.proj.bias.zero_()
    model.pos_embed.zero_()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).kron(torch.ones(8, 8))
    plain = features(model, x)
    with add_cure(model, "average_views", views=6):
        assert torch.allclose(features(model, x), plain, atol=1e-5)


@pytest.mark.parametrize("content", ["mean", "noise", "other"])
def test_registers_hold_what_was_measured_of_all_images_in_every_block(content):
    model = make("test_vit")
    x, other = images(model, 8), images(model, 3)
    with add_test_time_registers(model, {0: [1, 2]}, 2):
        layout, seen = TokenLayout.of(model), {}
        with watch_outputs(
            dict(enumerate(model.blocks)), lambda layer, out: seen.update({layer: layout.registers(out)})
        ):
            features(model, x)
        held = torch.stack([seen[layer] for layer in sorted(seen)])  # (l, b, r, d)
        with add_cure(model, "constant_registers", images=x, content=content) as cure:
            found, tokens = cure.measured["content"].float(), features(model, other)
        assert torch.equal(layout.registers(tokens), model.norm(found[-1]).expand(3, -1, -1))
    if content == "mean":
        assert torch.allclose(found, held.mean(1), atol=1e-5)
    elif content == "noise":
        z = (found - held.mean(1)) / held.std(1, correction=0)
        assert abs(float(z.mean())) < 0.1
        assert float(z.std()) == pytest.approx(1, abs=0.1)
    else:
        assert any(torch.allclose(found, held[:, i], atol=1e-6) for i in range(8))
