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


@pytest.mark.parametrize("few", [True, False], ids=["picked rows", "all rows, as on a GPU"])
def test_outliers_that_are_corrected_afterwards_score_as_if_they_had_been_known(model, few):
    a, x, outliers = made()
    first = outliers.clone()
    first[1, 2], first[2], first[0, 4] = False, ~first[2], True  # one lost, many changed, an image without any
    corrected = [0, 1, 2]
    parts = [
        (a, x, first),
        (a[:, corrected], x[corrected], outliers[corrected], first[corrected], torch.zeros(3, dtype=torch.bool)),
    ]
    assert_equal(scored(model, parts, few), by_definition(model, a, x, outliers))


def test_an_image_that_comes_late_counts_as_if_it_had_been_there(model):
    a, x, outliers = made()
    late = [3, 7, 11]
    others = [i for i in range(12) if i not in late]
    none, fresh = torch.zeros(3, PATCHES, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    parts = [(a[:, others], x[others], outliers[others]), (a[:, late], x[late], outliers[late], none, fresh)]
    assert_equal(scored(model, parts), by_definition(model, a, x, outliers))


def test_half_precision_activations_are_summed_in_full(model):
    a, x, outliers = made(images=64)
    expected = by_definition(model, a.bfloat16(), x, outliers)
    for few in (True, False):
        assert_equal(scored(model, [(a.bfloat16(), x, outliers)], few), expected, rtol=1e-5)


def test_without_attribution_only_the_published_score_is_given(model):
    a, x, outliers = made()
    sums = Sums(DEPTH, WIDTH, torch.device("cpu"))
    sums.add(list(a), x, outliers)
    scores = sums.scores(blocks(model)[:DEPTH], attribution=False)
    assert scores.attribution is None
    torch.testing.assert_close(scores.activation, by_definition(model, a, x, outliers)[0])


def test_scoring_needs_outliers_and_others(model):
    a, x, outliers = made()
    with pytest.raises(NoOutliers, match="none of the 108 patches is an outlier"):
        scored(model, [(a, x, torch.zeros_like(outliers))])
    with pytest.raises(ValueError, match="all of the 108 patches are outliers, so nothing is left to compare"):
        scored(model, [(a, x, torch.ones_like(outliers))])


def test_sums_take_no_more_memory_for_more_images(model):
    a, x, outliers = made()
    sums = Sums(DEPTH, WIDTH, torch.device("cpu"))

    def held() -> int:
        return sum(v.numel() * v.itemsize for v in vars(sums).values() if isinstance(v, torch.Tensor))

    sums.add(list(a), x, outliers)
    before = held()
    for _ in range(4):
        sums.add(list(a), x, outliers)
    assert held() == before
