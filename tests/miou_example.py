"""Counts of pixels of random but consistent predictions."""

import numpy as np

from regvit.stats.miou import Counts


def random_counts(rng, images=12, classes=4, patches=5, extra=0):
    """Random but consistent counts: every image has confusions between all classes."""
    confusion = rng.integers(0, 30, (images, classes, classes)) + extra * np.eye(classes, dtype=int) * 20
    counted = np.full((images, patches), 100)
    return Counts(
        np.einsum("bcc->bc", confusion),
        confusion.sum(1),
        confusion.sum(2),
        rng.integers(0, 101, counted.shape),
        counted,
    )
