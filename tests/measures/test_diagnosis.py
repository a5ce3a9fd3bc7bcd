import copy

import numpy as np
import pytest
import torch

from regvit.measures.diagnosis import census_row, diagnose, diagnosis_table, head_table
from regvit.models.attention import prefix_attention
from regvit.models.hooks import watch_outputs
from regvit.registers.cures.cure import add_cure
from regvit.registers.neurons import find_register_neurons
from regvit.registers.outliers import patch_norms
from regvit.registers.planting import plant


@pytest.fixture(scope="module")
def planted(tiny_vit, noise_images):
    model, x = tiny_vit(3), noise_images(8)
    plant(model, x, seed_layer=1, amplifier_layer=2, edit_keys=True, cls_share=0.4)
    return model, x, find_register_neurons(model, x)


def test_attention_values_and_channels_are_those_of_the_sinks(planted):
    """In float64: where keys are edited logits are so large that float32 rounds shares by 4e-5 of themselves."""
    model, x, found = copy.deepcopy(planted[0]).double(), planted[1].double(), planted[2]
    seen = diagnose(model, x.split(3), found)
    outliers = torch.from_numpy(patch_norms(model, [x], [3])[0] > found.detection.threshold)
    has = outliers.any(1)
    attention = prefix_attention(model, x)[..., 0, 1:]  # (l, b, h, p) of CLS
    shares = (attention * outliers[None, :, None]).sum(-1)[:, has].mean(1)
    assert np.allclose(seen.cls_share, shares.numpy(), atol=1e-5)
    tokens = []
    with torch.no_grad(), watch_outputs({0: model.blocks[3]}, lambda _, out: tokens.append(out[:, 1:])):
        model.forward_features(x)
    largest = (tokens[0].abs() * outliers[..., None]).amax(1)[has].mean(0)
    assert seen.channels[0].index == int(largest.argmax())
    assert seen.channels[0].size == pytest.approx(float(largest.max()), rel=1e-5)
    assert seen.channels[0].ratio == pytest.approx(float(largest.max()) / np.median(largest.numpy()), rel=1e-4)


def test_values_and_ranks_are_what_a_head_worked_by_hand_gives(planted):
    model, x, found = planted
    layer, head = 4, 1
    seen = diagnose(model, [x], found)
    outliers = torch.from_numpy(patch_norms(model, [x], [3])[0] > found.detection.threshold)
    inputs = []
    handle = model.blocks[layer].attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model.forward_features(x)
        q, k, v = model.blocks[layer].attn.qkv(inputs[0]).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
    handle.remove()
    ratios, ranks = [], []
    for image in outliers.any(1).nonzero()[:, 0].tolist():
        norms = v[image, head, 1:].norm(dim=-1).numpy()
        at = outliers[image].numpy()
        ratios.append(np.sort(norms[at])[(at.sum() - 1) // 2] / np.sort(norms[~at])[((~at).sum() - 1) // 2])
        weights = (q[image, head] @ k[image, head].T * 16**-0.5).softmax(-1)
        singular = np.linalg.svd((weights @ v[image, head])[1:].numpy(), compute_uv=False)
        share = singular / singular.sum()
        ranks.append(np.exp(-(share * np.log(share)).sum()))
    assert seen.value_ratio[layer, head] == pytest.approx(np.mean(ratios), rel=1e-4)
    assert seen.effective_rank[layer, head] == pytest.approx(np.mean(ranks), rel=1e-3)


def test_the_verdict_tells_a_planted_model_from_a_random_one(planted, tiny_vit, noise_images):
    model, x, found = planted
    seen = diagnose(model, [x], found)
    assert seen.kind in ("no_op", "broadcast")
    assert seen.verdict().startswith(
        f"registers can help here: {seen.fraction:.2%} of the patches are outliers after block 3 ("
    )
    assert "6 neurons write 100% of their excess" in seen.verdict()
    quiet = tiny_vit(4)
    none = diagnose(quiet, [x], find_register_neurons(quiet, x))
    assert none.kind == "none"
    assert none.verdict().startswith("no outliers: largest / median norm at most ")
    assert none.norm_ratio[:-1].max() < 5 < seen.norm_ratio[3]
    assert census_row("quiet", 8, none)["outliers"] == "none"
    row = census_row("planted", 8, seen)
    assert (row["outliers"], row["layer"], row["neurons"], row["kind"]) == ("yes", 3, 6, seen.kind)


def test_a_cure_is_diagnosed_at_the_places_of_the_untreated_models_outliers(planted):
    model, x, found = planted
    treated = copy.deepcopy(model)
    with add_cure(treated, "mask_attention", found):
        masked = diagnose(treated, [x], found, model)
    before = diagnose(model, [x], found)
    assert (masked.cls_share[4:] == 0).all()
    assert before.cls_share[4:].max() > 0.1
    assert np.allclose(masked.cls_share[:4], before.cls_share[:4], atol=1e-6)
    for cure in ("prefix_kv", "average_views"):
        with add_cure(treated, cure, found, images=x):
            assert diagnose(treated, [x], found, model).effective_rank.shape == before.effective_rank.shape


def test_the_verdict_on_a_cure_is_held_against_the_untreated_model(planted):
    model, x, found = planted
    before, treated = diagnose(model, [x], found), copy.deepcopy(model)
    seen = {"untreated": before}
    for cure in ("mask_attention", "clip_norm", "ablate"):
        with add_cure(treated, cure, found):
            seen[cure] = diagnose(treated, [x], found, model)
    norms = patch_norms(model, [x], [3])[0]
    outliers = norms > found.detection.threshold
    ratios = [np.sort(n[at])[(at.sum() - 1) // 2] / np.sort(n[~at])[((~at).sum() - 1) // 2]
              for n, at in zip(norms, outliers, strict=True) if at.any()]  # fmt: skip
    assert before.sink_norm == pytest.approx(np.mean(ratios), rel=1e-4)
    table = diagnosis_table(seen).set_index("model")
    assert table["verdict"]["untreated"] == before.verdict()
    assert table["verdict"]["mask_attention"] == (  # hidden values have no norm
        f"the outliers stay: at their places {before.sink_norm:.1f} times the norm of other patches ({before.sink_norm:.1f} before)"
        f"; CLS gives these 0.0% of its attention in later blocks ({before.cls_attention:.1%} before)"
    )
    assert table["verdict"]["ablate"].startswith("the outliers are gone: ")
    assert 1 < seen["ablate"].sink_norm < 2 < seen["clip_norm"].sink_norm < before.sink_norm
    heads = head_table(seen).set_index(["model", "layer", "head"])
    assert heads.loc[("clip_norm", 4, 2), "value_ratio"] == seen["clip_norm"].value_ratio[4, 2]


def test_images_without_the_outliers_of_the_search_are_refused(planted):
    model, _, found = planted
    with pytest.raises(ValueError, match="none of the images has an outlier"):
        diagnose(model, [torch.zeros(2, 3, 64, 64)], found)
