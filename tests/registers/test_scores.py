import pytest
import torch

from regvit.models.hooks import blocks
from regvit.registers.scores import NoOutliers, Sums

DEPTH, WIDTH, CHANNELS, PATCHES = 2, 256, 64, 9


@pytest.fixture
def model(tiny_vit):
    return tiny_vit(0, layer_scale=0.7)


def made(images: int = 12, seed: int = 0):
    """Activations of two blocks, residual stream and a mask with outliers in some images."""
    rng = torch.Generator().manual_seed(seed)
    activations = torch.randn(DEPTH, images, PATCHES, WIDTH, generator=rng)
    residual = torch.randn(images, PATCHES, CHANNELS, generator=rng)
    outliers = torch.rand(images, PATCHES, generator=rng) < 0.15
    outliers[0] = False
    outliers[1, :3] = True
    return activations, residual, outliers


def by_definition(model, activations, residual, outliers):
    """Both scores in float64 from all values at once, neuron by neuron as the formulas stand."""
    a, x = activations.double(), residual.double()
    seen = [image for image in range(len(outliers)) if outliers[image].any()]
    activation = torch.stack([a[:, i, outliers[i]].abs().mean(1) for i in seen]).mean(0)
    excess = x[outliers].mean(0) - x[~outliers].mean(0)
    attribution = torch.zeros(DEPTH, WIDTH, dtype=torch.float64)
    for layer in range(DEPTH):
        scale, weight = model.blocks[layer].ls2.gamma.double(), model.blocks[layer].mlp.fc2.weight.double()
        for unit in range(WIDTH):
            gap = a[layer, ..., unit][outliers].mean() - a[layer, ..., unit][~outliers].mean()
            attribution[layer, unit] = gap * (scale * weight[:, unit]) @ excess / (excess @ excess)
    return activation, attribution


def scored(model, parts, few=True):
    sums = Sums(DEPTH, WIDTH, torch.device("cpu"))
    sums._few = few
    for activations, *rest in parts:
        sums.add(list(activations), *rest)
    return sums.scores(blocks(model)[:DEPTH])


def assert_equal(scores, expected, rtol=1e-6):
    torch.testing.assert_close(scores.activation, expected[0], rtol=rtol, atol=1e-7)
    torch.testing.assert_close(scores.attribution, expected[1], rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("few", [True, False], ids=["picked rows", "all rows, as on a GPU"])
def test_scores_are_those_of_the_definition_whatever_the_batches(model, few):
    a, x, outliers = made()
    parts = [(a[:, i : i + 5], x[i : i + 5], outliers[i : i + 5]) for i in range(0, 12, 5)]
    assert_equal(scored(model, parts, few), by_definition(model, a, x, outliers))


def test_half_precision_activations_are_summed_in_full(model):
    a, x, outliers = made(images=64)
    expected = by_definition(model, a.bfloat16(), x, outliers)
    for few in (True, False):
        assert_equal(scored(model, [(a.bfloat16(), x, outliers)], few), expected, rtol=1e-5)


def test_scoring_needs_outliers(model):
    a, x, outliers = made()
    with pytest.raises(NoOutliers, match="none of the 108 patches is an outlier"):
        scored(model, [(a, x, torch.zeros_like(outliers))])
