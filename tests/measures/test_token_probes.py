import json

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from regvit.measures import token_probes
from regvit.measures.anatomy import Look
from regvit.measures.token_probes import (
    PatchErrors,
    class_from_token,
    class_summary,
    fit_classes,
    fit_patch_probes,
    logistic_regression,
    patch_pixels,
    patch_summary,
    read_patches,
)
from regvit.models.tokens import TokenLayout

SIDE, SIZE = 3, 2  # patches a side, pixels a side of a patch
LAYOUT = TokenLayout(1, 0, 1)


def look(tokens: torch.Tensor, images: torch.Tensor, outliers: torch.Tensor | None = None) -> Look:
    patches = tokens.shape[1] - LAYOUT.prefix
    if outliers is None:
        outliers = torch.zeros(len(tokens), patches, dtype=torch.bool)
    return Look(images, tokens, torch.zeros(1, len(tokens), patches), outliers)


def random_look(count: int, seed: int = 0, d: int = 20) -> Look:
    """Patch tokens that mix position and pixels linearly, and noise."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDE * SIZE, SIDE * SIZE, generator=g)
    mix = torch.Generator().manual_seed(99)
    places, of_pixels = torch.randn(SIDE**2, d, generator=mix), torch.randn(3 * SIZE**2, d, generator=mix)
    patches = places + 0.3 * patch_pixels(images, SIDE**2) @ of_pixels
    patches = patches + 0.3 * torch.randn(patches.shape, generator=g)
    return look(torch.cat([torch.randn(count, 2, d, generator=g), patches], dim=1), images)


def test_pixels_of_a_patch_stand_channel_by_channel_in_the_order_of_the_tokens():
    image = torch.arange(3 * 36, dtype=torch.float32).reshape(1, 3, 6, 6)
    found = patch_pixels(image, 9)
    assert found.shape == (1, 9, 12)
    assert found[0, 5].tolist() == image[0, :, 2:4, 4:6].flatten().tolist()
    with pytest.raises(ValueError, match="images of 6 x 6 px do not divide into 4 x 4 patches"):
        patch_pixels(image, 16)


def test_pixels_are_read_by_ridge_regression_without_a_penalty_on_the_bias():
    seen = random_look(40)
    probes = fit_patch_probes(LAYOUT, [seen])
    x = LAYOUT.patches(seen.tokens).flatten(0, 1).double().numpy()
    y = patch_pixels(seen.images, 9).flatten(0, 1).double().numpy()
    penalty = token_probes.RIDGE * ((x - x.mean(0)) ** 2).sum(0).mean()
    reference = Ridge(alpha=penalty).fit(x, y)
    assert np.allclose(probes.pixels.weight, reference.coef_, atol=1e-8)
    assert np.allclose(probes.pixels.bias, reference.intercept_, atol=1e-8)
    assert np.allclose(probes.mean_pixels, y.mean(0))


def test_position_is_read_by_a_linear_discriminant(monkeypatch):
    monkeypatch.setattr(token_probes, "RIDGE", 0.0)
    seen, test = random_look(60), random_look(20, seed=1)
    x = LAYOUT.patches(seen.tokens).flatten(0, 1).double().numpy()
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(x, np.tile(np.arange(9), 60))
    probes = fit_patch_probes(LAYOUT, [seen])
    tested = LAYOUT.patches(test.tokens).double()
    expected = reference.decision_function(tested.flatten(0, 1).numpy()).reshape(20, 9, 9)
    found = probes.position(tested).numpy()
    # scikit-learn divides the covariance by the number of tokens, here it is that less the number of places
    scale = (60 * 9 - 9) / (60 * 9)
    centred = found - found.mean(-1, keepdims=True)
    assert np.allclose(centred, scale * (expected - expected.mean(-1, keepdims=True)), atol=1e-5)
    assert read_patches(probes, LAYOUT, test).correct.mean() > 0.9


def test_batches_may_be_cut_anywhere():
    whole = random_look(12)
    parts = [look(whole.tokens[:5], whole.images[:5]), look(whole.tokens[5:], whole.images[5:])]
    a, b = fit_patch_probes(LAYOUT, [whole]), fit_patch_probes(LAYOUT, iter(parts))
    assert torch.allclose(a.position.weight, b.position.weight) and torch.allclose(a.pixels.bias, b.pixels.bias)


def test_one_image_cannot_teach_where_a_patch_lies():
    with pytest.raises(ValueError, match=r"1 training image\(s\) cannot teach"):
        fit_patch_probes(LAYOUT, [random_look(1)])
    with pytest.raises(ValueError, match=r"0 training image\(s\) cannot teach"):
        fit_patch_probes(LAYOUT, [])


def test_errors_are_distances_on_the_grid_and_norms_over_pixels():
    test = random_look(1)
    probes = token_probes.PatchProbes(
        position=token_probes.Linear(torch.zeros(9, 20).double(), torch.eye(9)[8].double()),  # always the last place
        pixels=token_probes.Linear(torch.zeros(12, 20).double(), torch.ones(12).double()),
        mean_pixels=torch.zeros(12).double(),
    )
    found = read_patches(probes, LAYOUT, test)
    assert found.correct[0].tolist() == [0] * 8 + [1]
    assert found.distance[0, 0] == pytest.approx(np.hypot(2, 2)) and found.distance[0, 7] == 1
    y = patch_pixels(test.images, 9)[0].double()
    assert np.allclose(found.pixel_error[0], (y - 1).norm(dim=1))
    assert np.allclose(found.mean_patch_error[0], y.norm(dim=1))


def test_outliers_are_compared_with_normal_patches_and_within_their_own_images():
    outliers = np.zeros((3, 9), dtype=bool)
    outliers[0, :2] = outliers[1, 0] = True
    correct = np.ones((3, 9))
    correct[0, 0], correct[1, 0], correct[1, 1:5] = 0, 0, 0
    errors = PatchErrors(correct, correct, correct, correct, outliers)
    found = patch_summary([errors])
    assert found["position"]["outlier"]["top1"] == pytest.approx(0.25) and found["position"]["outlier"]["n"] == 2
    assert found["position"]["normal"]["top1"] == pytest.approx((1 + 0.5 + 1) / 3, abs=1e-6)
    assert found["position"]["difference"]["top1"] == pytest.approx((0.5 - 1 + 0 - 0.5) / 2)
    assert found["position"]["chance"]["top1"] == pytest.approx(1 / 9, abs=1e-6)
    halves = [PatchErrors(*(column[part] for column in vars(errors).values())) for part in (slice(2), slice(2, 3))]
    assert patch_summary(halves) == found


def test_chance_is_the_mean_distance_of_two_places_drawn_at_random():
    errors = PatchErrors(*(np.ones((1, 4)) for _ in range(4)), np.zeros((1, 4), dtype=bool))
    found = patch_summary([errors])
    assert found["position"]["chance"]["distance"] == pytest.approx((2 + 2**0.5) / 4, abs=1e-6)  # 0, 1, 1, sqrt 2
    assert found["pixels"]["outlier"] == {
        **dict.fromkeys(("l2", "l2_lo", "l2_hi", "guess_l2", "guess_l2_lo", "guess_l2_hi")),
        "n": 0,
    }
    json.dumps(found, allow_nan=False)


def test_logistic_regression_is_at_the_minimum_of_its_objective_on_tokens_as_they_are():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    x = 5 + 3 * (rng.normal(size=(90, 6)) + np.eye(3, 6)[labels])
    found = logistic_regression(x, labels, 0.05)
    sd = np.sqrt(np.square(x - x.mean(0)).mean())
    weight = (found.weight * sd).requires_grad_()
    bias = (found.bias + found.weight @ torch.from_numpy(x.mean(0))).requires_grad_()
    z = torch.from_numpy((x - x.mean(0)) / sd)
    loss = torch.nn.functional.cross_entropy(z @ weight.T + bias, torch.from_numpy(labels))
    (loss + 0.05 / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3
    assert found(torch.from_numpy(x)).argmax(1).eq(torch.from_numpy(labels)).double().mean() > 0.6


def test_classes_that_do_not_occur_are_never_predicted_and_two_classes_are_enough():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 3], 20)
    x = rng.normal(size=(40, 4)) + 4 * (labels == 3)[:, None]
    found = fit_classes(x, labels)
    assert found.weight.shape == (4, 4)
    assert found(torch.from_numpy(x)).argmax(1).tolist() == labels.tolist()


def labelled_looks(count: int, seed: int) -> tuple[list[Look], np.ndarray]:
    """CLS, register and outliers carry the class; normal patches are noise. Every second image has two outliers."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    tokens = 0.1 * torch.randn(count, 11, 8, generator=g)
    outliers = torch.zeros(count, 9, dtype=torch.bool)
    outliers[::2, 3] = outliers[::2, 7] = True
    signal = torch.eye(3, 8)[labels]
    tokens[:, :2] += signal[:, None]
    tokens[:, 2:] += outliers[..., None] * signal[:, None]
    images = torch.zeros(count, 3, 6, 6)
    order = torch.randperm(count, generator=g)
    looked = [look(tokens[part], images[part], outliers[part]) for part in order.split(7)]
    return looked, labels[order].numpy()


def test_a_class_is_read_from_the_tokens_that_carry_it_and_not_from_the_others():
    (train, train_labels), (test, test_labels) = labelled_looks(60, 0), labelled_looks(40, 1)
    found = class_from_token(LAYOUT, train, train_labels, test, test_labels)
    assert found.keys() == {"cls", "register", "normal", "normal_beside", "outlier"}
    assert found["cls"].mean() == found["register"].mean() == 1
    assert np.nanmean(found["outlier"]) == 1 and np.isnan(found["outlier"]).sum() == 20
    assert abs(found["normal"].mean() - 1 / 3) < 0.15
    assert np.array_equal(np.isnan(found["normal_beside"]), np.isnan(found["outlier"]))
    metrics = class_summary(found)
    assert metrics["outlier"]["n"] == metrics["difference"]["n"] == 20 and metrics["difference"]["top1"] > 0.5


def test_a_kind_of_token_that_is_nowhere_is_null():
    (train, train_labels), (test, test_labels) = labelled_looks(30, 0), labelled_looks(12, 1)
    train, test = ([look(seen.tokens, seen.images) for seen in looked] for looked in (train, test))
    metrics = class_summary(class_from_token(LAYOUT, train, train_labels, test, test_labels))
    assert metrics["outlier"] == {"top1": None, "top1_lo": None, "top1_hi": None, "n": 0}
    assert metrics["normal"]["n"] == 12


def test_images_without_a_label_are_refused():
    (train, train_labels), (test, test_labels) = labelled_looks(30, 0), labelled_looks(12, 1)
    test_labels[3] = -1
    with pytest.raises(ValueError, match="1 test images have no label; leave them out"):
        class_from_token(LAYOUT, train, train_labels, test, test_labels)
