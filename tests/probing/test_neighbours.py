import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from regvit.probing import neighbours
from regvit.probing.neighbours import Labelled, choose_neighbours, knn_logit_blocks, nearest
from regvit.probing.probes import Neighbours


def clouds(n, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=n)
    return (np.random.default_rng(0).normal(size=(4, 8))[labels] + spread * rng.normal(size=(n, 8))).astype(
        "f4"
    ), labels


def knn_logits(train, labels, test, k=20, temperature=0.07, n_classes=4):
    """Of all images at once."""
    logits = np.full((len(test), n_classes), np.nan, dtype=np.float32)
    for rows, found in knn_logit_blocks(Labelled(train, labels), test, Neighbours(k, temperature), n_classes):
        assert found.dtype == np.float32
        logits[rows] = found
    return logits


def test_the_nearest_are_those_of_sklearn_best_first(monkeypatch):
    monkeypatch.setattr(neighbours, "TEST_ROWS_A_PASS", 50)
    monkeypatch.setattr(neighbours, "TEST_ROWS", 20)
    (x, _), (v, _) = clouds(300, 1), clouds(120, 2)
    found = list(nearest(x, v, 5))
    assert [rows.start for rows, _, _ in found] == [0, 20, 40, 50, 70, 90, 100]
    distances, rows = NearestNeighbors(n_neighbors=5, metric="cosine").fit(x).kneighbors(v)
    np.testing.assert_array_equal(np.concatenate([each.numpy() for _, _, each in found]), rows)
    np.testing.assert_allclose(np.concatenate([each.numpy() for _, each, _ in found]), 1 - distances, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 50])
def test_the_shares_are_those_of_sklearns_neighbours_with_the_same_weights(k):
    (x, y), (v, _) = clouds(300, 1), clouds(120, 2)
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (x, v)]
    # Of unit vectors the squared distance is 2 − 2 · similarity.
    reference = KNeighborsClassifier(
        k, algorithm="brute", weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07)
    )
    expected = reference.fit(unit[0], y).predict_proba(unit[1])
    np.testing.assert_allclose(np.exp(knn_logits(x, y, v, k)), expected, atol=1e-4)


def test_blocks_do_not_change_a_vote(monkeypatch):
    (x, y), (v, _) = clouds(300, 1), clouds(120, 2)
    whole = knn_logits(x, y, v)
    monkeypatch.setattr(neighbours, "TEST_ROWS", 7)
    monkeypatch.setattr(neighbours, "TRAIN_ROWS", 11)  # fewer than k
    np.testing.assert_allclose(knn_logits(x, y, v), whole, atol=1e-4)
    monkeypatch.setattr(neighbours, "VOTES_AT_ONCE", 3 * 20 * 4)  # three images at once
    assert max(len(logits) for _, logits in knn_logit_blocks(Labelled(x, y), v, Neighbours(20, 0.07), 4)) == 3
    np.testing.assert_allclose(knn_logits(x, y, v), whole, atol=1e-4)


def test_k_is_chosen_on_validation_among_those_that_the_training_images_allow():
    (x, y), (v, w) = clouds(150, 1, 2.0), clouds(400, 2, 2.0)
    chosen = choose_neighbours(Labelled(x, y), Labelled(v, w), 4, ks=(200, 1, 10, 100))
    right = {k: int((knn_logits(x, y, v, k).argmax(1) == w).sum()) for k in (1, 10, 100)}
    assert chosen == Neighbours(max(right, key=lambda k: (right[k], -k)), 0.07, max(right.values()))
    assert right[1] < max(right.values())  # else there was nothing to choose


def test_of_equally_good_numbers_the_smallest_is_chosen_and_few_images_all_vote():
    x, y = np.repeat(np.eye(2, dtype=np.float32), 15, axis=0), np.repeat([0, 1], 15)
    whole = Labelled(x, y)
    assert choose_neighbours(whole, whole, 2) == Neighbours(10, 0.07, 30)
    assert choose_neighbours(Labelled(x[12:18], y[12:18]), whole, 2) == Neighbours(6, 0.07, 30)


def test_no_images_give_no_logits_and_none_to_choose_on_is_refused():
    x, y = np.eye(2), np.array([0, 1])
    assert knn_logits(x, y, x[:0], 1, 0.07, 3).shape == (0, 3)
    with pytest.raises(ValueError, match="there are no validation images to choose k on"):
        choose_neighbours(Labelled(x, y), Labelled(x[:0], y[:0]), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 3}, "k is 3; expected 1 to 2, the number of training images"),
        ({"labels": np.array([0, 3])}, "labels span 0 to 3; expected class indices 0 to 2"),
        ({"labels": np.array([0])}, r"train has 2 rows and labels of shape \(1,\)"),
        ({"test": np.zeros((4, 3))}, r"train features \(2, 2\) and test features \(4, 3\) do not fit"),
        ({"test": np.full((4, 2), np.nan)}, "4 of 4 test rows are not finite"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"train": np.eye(2), "labels": np.array([0, 1]), "test": np.ones((4, 2)), "k": 1, "temperature": 0.07}
    with pytest.raises(ValueError, match=message):
        knn_logits(**given | change, n_classes=3)
