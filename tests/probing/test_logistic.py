import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from regvit.probing.logistic import fit_logistic
from regvit.probing.splits import Split

CLASSES = ("a", "b", "c")


def split(x, y):
    return Split({"cls": x}, y)


def clouds(n, seed, classes=3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    centres = np.random.default_rng(0).normal(size=(classes, 6))
    return (centres[labels] + 1.5 * rng.normal(size=(n, 6)) + 20).astype(np.float32), labels


def test_the_weights_minimise_the_penalised_loss_of_the_raw_features():
    (x, y), c = clouds(120, 1), 0.1
    probe = fit_logistic("cls", split(x, y), split(x, y), CLASSES, [c])
    z = (x.astype(np.float64) - x.mean(0, dtype=np.float64)) / np.sqrt(x.var(0, dtype=np.float64).mean())

    def objective(values):
        weight, bias = values[:18].reshape(6, 3), values[18:]
        return (weight**2).sum() / 2 - c * log_softmax(z @ weight + bias, axis=1)[np.arange(120), y].sum()

    best = minimize(objective, np.zeros(21), options={"gtol": 1e-8}).x
    expected = z @ best[:18].reshape(6, 3) + best[18:]
    found = probe.logits(x)
    centred = [values - values.mean(1, keepdims=True) for values in (found, expected)]  # a softmax sees no more
    np.testing.assert_allclose(*centred, atol=2e-3)


def test_c_is_chosen_on_validation_and_of_equals_the_smallest():
    (x, y), (v, w) = clouds(60, 1), clouds(500, 2)
    grid = (10.0, 1e-3, 1e-1)
    mean, scale = x.mean(0), np.sqrt(x.var(0).mean())
    standardise = FunctionTransformer(lambda values: (values - mean) / scale)
    right = {}
    for c in grid:
        model = make_pipeline(standardise, LogisticRegression(C=c, tol=1e-8, max_iter=5000)).fit(x, y)
        right[c] = int((model.predict(v) == w).sum())
    probe = fit_logistic("cls", split(x, y), split(v, w), CLASSES, grid)
    assert max(sorted(right), key=right.get) == probe.C and abs(probe.val_correct - right[probe.C]) <= 1
    assert (probe.logits(v).argmax(1) == w).sum() == pytest.approx(probe.val_correct, abs=1)
    assert (probe.readout, probe.learning_rate, probe.seed, probe.pool) == ("cls", None, None, None)
    easy, labels = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0), np.repeat([0, 1, 2], 20)
    assert fit_logistic("cls", split(easy, labels), split(easy, labels), CLASSES, (0.1, 0.01)).C == 0.01


def test_two_classes_get_a_row_each():
    x, y = clouds(100, 1, classes=2)
    probe = fit_logistic("cls", split(x, y), split(x, y), "ab", [0.1])
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000)
    z = (x - x.mean(0)) / np.sqrt(x.var(0).mean())
    logits = probe.logits(x)
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], model.fit(z, y).decision_function(z), atol=1e-3)


def test_a_class_without_training_images_is_never_predicted_and_stays_finite():
    x, y = clouds(100, 1)
    probe = fit_logistic("cls", split(x, y * 2), split(x, y * 2), "abcdef", [0.1])
    logits = probe.logits(x)
    assert np.isfinite(logits).all() and set(logits.argmax(1).tolist()) == {0, 2, 4}
    assert logits[:, 1].max() < -1000


def test_unusable_images_are_refused():
    x, y = clouds(20, 1)
    with pytest.raises(ValueError, match="all 20 training images are of class 0"):
        fit_logistic("cls", split(x, y * 0), split(x, y), CLASSES)
    with pytest.raises(ValueError, match="the val split has label 3; a probe needs class indices 0 to 2"):
        fit_logistic("cls", split(x, y), split(x[:1], np.array([3])), CLASSES)
