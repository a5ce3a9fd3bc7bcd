"""Logistic regression solved to its end: what the SGD probes are held against, and a probe without a learning rate.

Minimises ½ ‖W‖² + C Σ cross-entropy(z W + b) over the training images, z = (x − μ) / σ standardised as in `heads` (one σ
for all channels), with scikit-learn's L-BFGS to a gradient of 1e-6: its default of 1e-4 stops up to 2.3 points early
(measured on 100,000 × 768, 100 classes). C is chosen on the validation split, and the weights are folded back to raw
features.

Readouts whose registers an SGD probe pools are taken as they stand in the store, all registers side by side.

Shape letters: b image, v validation image, d channel, c class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression

from regvit.probing.probes import Probe
from regvit.probing.splits import Split, check_splits

CS = (1e-3, 1e-2, 1e-1)
TOLERANCE = 1e-6
MAX_ITERATIONS = 5000
ABSENT = -1e4  # logit of a class that no training image has: a probability of 0, and still finite


def fit_logistic(readout: str, train: Split, val: Split, classes: Sequence[str], cs: Sequence[float] = CS) -> Probe:
    """The fit of one readout with the best validation accuracy over a grid of C; of equals the one of the smallest C.

    Args:
        classes: class names, in the order of the indices.
        cs: inverse regularisations; each fit starts where the one before ended.
    Raises:
        ValueError: features, labels or the grid do not fit together; the message gives value and cure.
    """
    grid = sorted(float(c) for c in cs)
    if not grid or len(set(grid)) < len(grid) or not all(math.isfinite(c) and c > 0 for c in grid):
        raise ValueError(f"cs are {list(cs)}; expected at least one finite number above 0, each once")
    train, val = (replace(part, features={readout: part.features[readout][:]}) for part in (train, val))  # all of it:
    check_splits(train, val, classes)  # this solver knows no blocks
    values = train.features[readout].astype(np.float64)  # float32 stops early, by 1e-3 of the weights
    mean = values.mean(0)
    scale = math.sqrt(values.var(0).mean()) or 1.0
    z, v = ((part.features[readout] - mean) / scale for part in (train, val))
    model = LogisticRegression(tol=TOLERANCE, max_iter=MAX_ITERATIONS, warm_start=True)
    best, best_correct, best_c = None, -1, grid[0]
    for c in grid:
        model.set_params(C=c).fit(z, train.labels)
        weight, bias = _all_classes(model, len(classes))
        correct = int(((v @ weight.T + bias).argmax(1) == val.labels).sum())
        if correct > best_correct:
            best, best_correct, best_c = (weight, bias), correct, c
    weight, bias = best[0] / scale, best[1]
    bias = (bias - weight @ mean).astype(np.float32)
    return Probe(readout, weight.astype(np.float32), bias, best_correct, C=best_c)


def _all_classes(model: LogisticRegression, n_classes: int) -> tuple[Float[np.ndarray, "c d"], Float[np.ndarray, " c"]]:
    """Weights with a row for every class; scikit-learn has rows for those it saw, and a single one for two."""
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # softmax([−z/2, z/2]) = [1 − sigmoid(z), sigmoid(z)]
        coefficients, intercepts = (np.stack([-values[0], values[0]]) / 2 for values in (coefficients, intercepts))
    weight, bias = np.zeros((n_classes, coefficients.shape[1])), np.full(n_classes, ABSENT)
    weight[model.classes_], bias[model.classes_] = coefficients, intercepts
    return weight, bias
