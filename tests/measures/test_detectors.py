"""Every detector against an independent float64 reference (scikit-learn, or the formula written out another way)."""

from dataclasses import dataclass
from fractions import Fraction
from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.covariance import LedoitWolf, empirical_covariance, ledoit_wolf
from sklearn.neighbors import NearestNeighbors

from regvit.measures import detectors
from regvit.measures.detectors import (
    DETECTORS,
    FEATURES_ONLY,
    Detectors,
    Scatter,
    energy,
    fit,
    max_logit,
    msp,
    principal_channels,
    vim_origin,
)

logits = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=5).map(np.array)


@dataclass
class Classifier:
    weight: np.ndarray
    bias: np.ndarray


PLAIN = Classifier(np.eye(2), np.zeros(2))
CORNERS = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])  # covariance 1, mean 0


def made(n=200, d=24, c=4, rank=None, offset=1.0, seed=0):
    """Training features of c clusters, labels, a probe, and test features; float32 as from a store.

    With a rank, features are products of whole numbers, so that rounding does not hide it.
    """
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(rank or d, d)) / np.sqrt(rank or d) * np.linspace(1, 3, d)
    centres = rng.normal(size=(c, rank or d))
    labels = np.arange(n) % c
    latent = centres[labels] + rng.normal(size=(n, rank or d))
    train = ((latent * 4).round() @ (mix * 4).round() if rank else latent @ mix + offset).astype(np.float32)
    test = (rng.normal(size=(50, d)) * 2 + offset).astype(np.float32)
    probe = Classifier(rng.normal(size=(c, d)).astype(np.float32), rng.normal(size=c).astype(np.float32))
    return train, labels, probe, test


def scores_of(name, train, labels, probe, test):
    return fit(name, train, labels, probe)(test, test @ probe.weight.T + probe.bias)


# The references work on whole float64 arrays, one image after another where that is plainer.


def reference(name, train, labels, probe, test):
    train, test, w, b = (x.astype(np.float64) for x in (train, test, probe.weight, probe.bias))
    z = test.astype(np.float32) @ probe.weight.T + probe.bias  # as given to the scorer
    if name == "msp":
        return [1 - exp(max(row) - logsumexp(row)) for row in z.astype(np.float64)]
    if name == "energy":
        return -logsumexp(z.astype(np.float64), axis=1)
    if name == "max_logit":
        return -z.max(1).astype(np.float64)
    if name == "knn":
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
        k = min(len(train), max(10, round(len(train) / 1000)))
        return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(unit[0]).kneighbors(unit[1])[0][:, -1]
    if name == "react":
        return -logsumexp(np.minimum(test, np.percentile(train, 90)) @ w.T + b, axis=1)
    if name == "vim":
        origin = -(w.T @ np.linalg.solve(w @ w.T, b))  # right inverse: the rows of w are independent
        rank = np.linalg.matrix_rank(train - origin)
        _, _, basis = np.linalg.svd(train - origin)
        rest = basis[principal_channels(train.shape[1], rank) :]

        def length(x):
            return np.sqrt((((x - origin) @ rest.T) ** 2).sum(1))

        scale = (train @ w.T + b).max(1).mean() / length(train).mean()
        return scale * length(test) - logsumexp(z.astype(np.float64), axis=1)
    classes = np.stack([train[labels == label].mean(0) for label in np.unique(labels)])
    inner = LedoitWolf(assume_centered=True).fit(train - classes[np.searchsorted(np.unique(labels), labels)])
    precision = np.linalg.inv(inner.covariance_)
    near = [min((x - mean) @ precision @ (x - mean) for mean in classes) for x in test]
    if name == "mahalanobis":
        return near
    each = classes[np.searchsorted(np.unique(labels), labels)]  # the mean of its class, for every image
    outer = np.linalg.inv(inner.covariance_ + np.cov(each.T, bias=True))
    mean = train.mean(0)
    return [a - (x - mean) @ outer @ (x - mean) for a, x in zip(near, test, strict=True)]


SHAPES = {
    "many images": {"n": 400, "d": 24},
    "more channels than images": {"n": 60, "d": 90},
    "features of a low rank": {"n": 200, "d": 40, "rank": 12},
    "two classes and an odd width": {"n": 101, "d": 7, "c": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_equals_its_reference(name, shape):
    case = made(**SHAPES[shape])
    assert scores_of(name, *case) == pytest.approx(np.array(reference(name, *case)), rel=1e-6)


@pytest.mark.parametrize("name", DETECTORS)
def test_scores_do_not_depend_on_the_size_of_the_blocks(name, monkeypatch):
    case = made()
    whole = scores_of(name, *case)
    monkeypatch.setattr(detectors, "CELLS_AT_ONCE", 24 * 7)
    assert scores_of(name, *case) == pytest.approx(whole, rel=1e-9)


def test_the_relative_distance_counts_only_what_the_classes_do_not_share():
    own, between, aside = np.array([[5.0, 0.0], [0.0, 0.0], [5.0, 8.0]])
    train = np.concatenate([CORNERS + own, CORNERS - own])

    def score(name):
        found = fit(name, train, np.arange(8) // 4, PLAIN, Detectors((name,), shrinkage=0))
        return found(np.array([own, between, aside]), np.zeros((3, 2)))

    assert score("mahalanobis") == pytest.approx([0, 25, 64])
    assert score("relative_mahalanobis") == pytest.approx([-25 / 26, 25, -25 / 26])


@pytest.mark.parametrize("name", DETECTORS)
def test_scores_are_one_finite_float64_an_image(name):
    train, labels, probe, test = made()
    for features in (test, test[:0], np.float32(1e15) * test, np.zeros_like(test)):
        scores = scores_of(name, train, labels, probe, features)
        assert scores.shape == (len(features),) and scores.dtype == np.float64 and np.isfinite(scores).all()


@pytest.mark.parametrize("name", FEATURES_ONLY)
def test_what_looks_at_features_only_is_the_same_for_every_probe(name):
    train, labels, probe, test = made()
    other = Classifier(-2 * probe.weight, probe.bias + 1)
    assert np.array_equal(scores_of(name, train, labels, probe, test), scores_of(name, train, labels, other, test))


# --- on logits


@given(logits)
def test_scores_of_logits_equal_the_formulas_in_float64(z):
    exponentials = [[exp(value) for value in row] for row in z]
    assert msp(z) == pytest.approx([1 - max(row) / sum(row) for row in exponentials], abs=1e-14)
    assert energy(z) == pytest.approx([-log(sum(row)) for row in exponentials], abs=1e-12)
    assert max_logit(z).tolist() == [-max(row) for row in z]


def test_confident_images_stay_apart_where_one_minus_p_would_round_to_zero():
    z = np.array([[50.0, 0.0], [60.0, 0.0]])
    assert 1 - 1 / (1 + np.exp(-50.0)) == 0  # the plain formula
    expected = [float(Fraction(exp(-margin)) / (1 + Fraction(exp(-margin)))) for margin in (50, 60)]
    assert msp(z) == pytest.approx(expected, rel=1e-12)


def test_logits_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="msp needs at least 2 classes"):
        msp(np.ones((4, 1)))
    assert energy(np.ones((4, 1))).tolist() == max_logit(np.ones((4, 1))).tolist() == [-1] * 4
    with pytest.raises(ValueError, match="1 of 2 images have infinite or NaN logits"):
        energy(np.array([[0.0, np.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"logits have shape \(3,\); expected \(images, classes\)"):
        energy(np.zeros(3))


# --- on features


def test_the_neighbour_counted_is_one_in_a_thousand_but_at_least_the_tenth():
    line = np.column_stack([np.ones(12_000), np.linspace(0, 1000, 12_000)])
    unit = line / np.linalg.norm(line, axis=1, keepdims=True)
    for n, k in ((3, 3), (200, 10), (10_600, 11), (12_000, 12)):
        found = fit("knn", line[:n], np.zeros(n, int), PLAIN)(line[:1], np.zeros((1, 2)))
        assert found == pytest.approx([np.linalg.norm(unit[:n] - unit[0], axis=1)[k - 1]], abs=1e-7)


@pytest.mark.parametrize("shape", ["many images", "more channels than images"])
def test_shrinkage_is_scikit_learns_or_the_one_that_is_asked_for(shape):
    train, labels, probe, test = made(**SHAPES[shape])
    means = np.stack([train[labels == label].astype(np.float64).mean(0) for label in range(4)])
    covariance, shrinkage = ledoit_wolf(train - means[labels], assume_centered=True)
    found = Scatter.fit(train, labels)
    assert found.shrinkage == pytest.approx(shrinkage) and found.covariance == pytest.approx(covariance)
    plain = Scatter.fit(train, labels, 0)
    assert plain.covariance == pytest.approx(empirical_covariance(train - means[labels], assume_centered=True))
    score = fit("mahalanobis", train, labels, probe, Detectors(("mahalanobis",), shrinkage=0))
    assert score(test, np.zeros((50, 4))) == pytest.approx(plain.within().distances(test))


def test_directions_without_variance_are_left_out_where_nothing_is_shrunk():
    scatter = Scatter.fit(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([0, 0]))
    assert scatter.shrinkage == 0 and scatter.within().whitening.shape == (2, 1)
    assert scatter.within().distances(np.array([[2.0, 5.0]])) == pytest.approx([4.0])


def test_classes_without_training_images_have_no_mean():
    train, labels, probe, test = made(c=4)
    gaps = Classifier(np.repeat(probe.weight, 3, axis=0), np.repeat(probe.bias, 3))
    assert scores_of("mahalanobis", train, 3 * labels, gaps, test) == pytest.approx(
        scores_of("mahalanobis", train, labels, probe, test)
    )


@pytest.mark.parametrize(
    ("d", "rank", "expected"),
    [
        (2048, 2048, 1000),
        (1500, 1500, 512),
        (768, 768, 512),
        (384, 384, 192),
        (768, 622, 415),
        (384, 30, 15),
        (3, 2, 1),
    ],
)
def test_the_principal_space_has_the_papers_dimension_and_its_share_of_a_lower_rank(d, rank, expected):
    assert principal_channels(d, rank) == expected


def test_the_origin_of_vim_does_not_invert_rounding_noise():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(5, 12)), rng.normal(size=5)
    weight, bias = weight - weight.mean(0), bias - bias.mean()  # as a trained probe: the rows sum to nothing
    clean = vim_origin(weight, bias)
    assert np.linalg.norm(weight @ clean + bias) < 1e-9
    noisy = (weight + 1e-7 * rng.normal(size=(5, 12))).astype(np.float32)
    assert vim_origin(noisy.astype(np.float64), bias + 1e-6) == pytest.approx(clean, abs=1e-4)
    assert np.abs(np.linalg.pinv(noisy.astype(np.float64)) @ (bias + 1e-6)).max() > 1  # what it was


def test_reacts_percentile_of_very_many_activations_is_that_of_some_of_the_images(monkeypatch):
    train, labels, probe, _ = made(n=4000, d=8)
    exact = scores_of("react", train, labels, probe, train)
    monkeypatch.setattr(detectors, "CLIP_VALUES", 8 * 1000)
    some = scores_of("react", train, labels, probe, train)
    assert not np.array_equal(some, exact) and np.abs(some - exact).max() < 1.5
    assert np.array_equal(scores_of("react", train, labels, probe, train), some)


# --- refused


def test_one_class_is_refused_where_it_would_give_every_image_zero():
    train, _, probe, test = made()
    one = np.zeros(len(train), dtype=int)
    with pytest.raises(ValueError, match="all 200 training images are of class 0, so relative_mahalanobis would give"):
        fit("relative_mahalanobis", train, one, probe)
    for name in ("mahalanobis", "knn", "vim", "react"):
        assert np.isfinite(scores_of(name, train, one, probe, test)).all()


@pytest.mark.parametrize("name", ["mahalanobis", "relative_mahalanobis"])
def test_features_that_do_not_vary_have_no_covariance(name):
    with pytest.raises(ValueError, match="the features of all 4 training images equal the mean of their class"):
        fit(name, np.array([[1.0, 2.0], [3.0, 0.0]] * 2), np.array([0, 1] * 2), PLAIN)


def test_vim_refuses_features_of_rank_one_and_a_probe_whose_logits_are_below_zero():
    train = np.linspace(1, 2, 20)[:, None] * [[1.0, 2.0]]
    with pytest.raises(ValueError, match="the features of the 20 training images have rank 1 about the probe's origin"):
        fit("vim", train, np.arange(20) % 2, PLAIN)
    negative = Classifier(np.eye(2), np.full(2, -9.0))
    with pytest.raises(ValueError, match=r"the largest logits of the training images are -[\d.]+ in the mean; vim"):
        fit("vim", np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 2, negative)


def test_features_labels_and_probe_must_fit():
    name, (train, labels, probe, test) = "vim", made()
    broken = train.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 200 images have infinite or NaN features; extract them again"):
        fit(name, broken, labels, probe)
    with pytest.raises(ValueError, match=rf"{name} was given no training images"):
        fit(name, train[:0], labels[:0], probe)
    with pytest.raises(ValueError, match=r"labels are int64 of shape \(199,\); expected one class index for each of"):
        fit(name, train, labels[1:], probe)
    with pytest.raises(ValueError, match=r"labels go from -1 to 3; expected class indices 0 to 3"):
        fit(name, train, np.where(labels == 0, -1, labels), probe)
    with pytest.raises(ValueError, match=r"labels go from 1 to 4; expected class indices 0 to 3"):
        fit(name, train, labels + 1, probe)
    with pytest.raises(ValueError, match="the features have 23 channels and the probe takes 24"):
        fit(name, train[:, 1:], labels, probe)
    score = fit(name, train, labels, probe)
    with pytest.raises(ValueError, match=r"features have shape \(50, 23\); expected .* the 24 channels that it was"):
        score(test[:, 1:], np.zeros((50, 4)))
    with pytest.raises(ValueError, match="1 of 200 images have infinite or NaN features"):
        score(broken, np.zeros((200, 4)))


def test_an_unknown_detector_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"detector 'enrgy' is unknown; did you mean 'energy'\? Known are msp, energy"):
        Detectors(("msp", "enrgy"))
