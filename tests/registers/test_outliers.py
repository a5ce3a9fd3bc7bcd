import numpy as np
import pytest
import timm
import torch

from regvit.registers.norms import LayerNorms
from regvit.registers.outliers import detect, otsu, patch_norms, settle_detection


def test_otsu_splits_two_clusters_at_the_middle_of_the_gap():
    split = otsu(np.array([1.0, 1.0, 1.0, 5.0, 5.0]))
    assert split.threshold == 3.0
    assert split.fraction == pytest.approx(0.4)
    assert split.separation == pytest.approx(1.0)


def test_otsu_agrees_with_a_search_over_all_thresholds():
    values = np.random.default_rng(0).normal(size=50)
    s = np.sort(values)
    best = min(range(1, 50), key=lambda i: s[:i].var() * i + s[i:].var() * (50 - i))  # smallest within-class variance
    assert otsu(values).threshold == pytest.approx((s[best - 1] + s[best]) / 2)


def _norms(outlier: float = 30.0, share: float = 0.01) -> np.ndarray:
    norms = np.random.default_rng(0).lognormal(0.0, 0.1, size=(4, 20, 100))
    count = int(share * 100)
    norms[2, :, :count] = outlier
    return norms


def test_detection_finds_the_layer_and_a_threshold_between_the_modes():
    found = detect(_norms())
    assert found.layer == 2
    assert 1.5 < found.threshold < 30
    assert detect(_norms()[:3]) is None  # the last layer does not count


@pytest.mark.parametrize("norms", [_norms(outlier=1.0), _norms(share=0.2)])
def test_a_model_without_a_small_second_mode_has_no_outliers(norms):
    assert detect(norms) is None


@pytest.mark.parametrize("flat", [0.1, 0.125, 0.3, 0.5, 0.7, 0.85])
@pytest.mark.parametrize("below", [0.25, 0.5])
def test_flat_areas_do_not_hide_outliers(flat, below):
    """One patch in 200 has 42 median norms; the flat ones make the second mode that Otsu's split finds."""
    norms = np.random.default_rng(0).lognormal(0.0, 0.15, size=(4, 20, 200))
    norms[:, :, : int(200 * flat)] *= below
    assert detect(norms) is None
    norms[2, :, -1] = 42.0
    for found in (detect(norms), settle_detection(norms, layer=2), detect([LayerNorms.of(layer) for layer in norms])):
        assert found.layer == 2
        assert ((norms[2] > found.threshold).sum(1) == 1).all()


def test_the_tail_of_one_population_beside_another_is_no_outlier():
    norms = np.random.default_rng(0).lognormal(0.0, 0.5, size=(4, 20, 200))  # the largest has 5 median norms
    norms[:, :, :100] *= 0.05
    assert detect(norms) is None


def test_given_threshold_and_layer_are_used_as_they_are():
    found = settle_detection(_norms(), threshold=10.0, layer=-2)
    assert (found.layer, found.threshold) == (2, 10.0)
    assert settle_detection(_norms(), threshold=100.0, layer=-2) is None


def test_norms_are_those_of_timms_own_intermediates():
    torch.manual_seed(0)
    model = timm.create_model("test_vit2", pretrained=False).eval()
    x = torch.randn(3, 3, 160, 160)
    with torch.no_grad():
        outs = model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
    expected = torch.stack([out.norm(dim=-1) for out in outs])
    assert np.allclose(patch_norms(model, x.split(2)), expected, rtol=1e-5)
    assert np.allclose(patch_norms(model, x.split(2), [1, 3]), expected[[1, 3]], rtol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
