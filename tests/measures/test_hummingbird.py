"""Segmentation in context against a float64 reference that looks at every patch of the memory."""

import numpy as np
import pytest
import torch
from dense_example import patch_store

from regvit.measures.dense.dense_heads import PatchTokens
from regvit.measures.dense.segmentation import count
from regvit.measures.training_free.hummingbird import InContext, Memory, patch_pixels, rarest, remember
from regvit.stats.miou import accuracy

SIDE, CLASSES = 4, 3


def world(images, seed=0, noise=0.3):
    """Patches of which each class has a direction, and masks of 32 px whose squares are of that class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, (images, SIDE**2))
    patches = np.random.default_rng(99).normal(size=(CLASSES, 12))[labels] + rng.normal(0, noise, (images, SIDE**2, 12))
    masks = labels.reshape(-1, SIDE, SIDE).repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)
    return patches.astype(np.float16), masks


def looked_up(memory, labels, queries, k, temperature):
    """Shares of classes by the formula, one query at a time, float64."""
    unit = memory / np.linalg.norm(memory, axis=1, keepdims=True)
    found = []
    for query in queries:
        cosines = unit @ (query / np.linalg.norm(query))
        nearest = np.argsort(-cosines)[:k]
        weights = np.exp((cosines[nearest] - cosines.max()) / temperature)
        found.append(weights @ labels[nearest] / weights.sum())
    return np.array(found)


@pytest.mark.parametrize("k", [1, 5, 30])
def test_a_patch_gets_the_labels_of_its_nearest_neighbours_weighted_as_published(k):
    rng = np.random.default_rng(0)
    memory, labels = rng.normal(size=(300, 24)), rng.dirichlet(np.ones(5), 300)
    queries = rng.normal(size=(2, 16, 24))
    how = InContext(None, k, 0.02)
    found = Memory(memory.astype(np.float32), labels.astype(np.float32), how)(torch.from_numpy(queries).float())
    expected = looked_up(memory, labels, queries.reshape(-1, 24), k, 0.02).reshape(2, 4, 4, 5)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected, atol=1e-5)


def test_what_the_memory_shows_is_found_in_other_images_and_nothing_is_trained(tmp_path):
    patches, masks = world(24)
    store = patch_store(tmp_path, patches)
    memory = remember(PatchTokens(store, range(16)), masks.__getitem__, CLASSES, InContext(neighbours=5))
    counts = count(memory, PatchTokens(store, range(16, 24)), masks.__getitem__, CLASSES)
    shuffled = count(memory, PatchTokens(store, range(16, 24)), masks[::-1].__getitem__, CLASSES)
    assert accuracy(counts).value > 0.75 > 0.5 > accuracy(shuffled).value  # borders of squares of 8 px are blurred
    np.testing.assert_array_equal(memory.features, patches[:16].reshape(-1, 12))


def test_a_label_is_the_share_of_each_class_among_the_known_pixels_of_the_patch(tmp_path):
    mask = np.zeros((32, 48), np.uint8)
    mask[:8, :12], mask[:4, :3] = 1, 2  # 12 of 96 pixels of the first patch
    mask[8:16, :12] = 255  # of the patch below nothing is known
    mask[16:24, :6] = 255  # and of the one below that half
    pixels = patch_pixels(mask, 4, 3)
    assert pixels[0].tolist() == [0, 84, 12] and pixels[4].sum() == 0 and pixels[8].tolist() == [48, 0, 0]
    memory = remember(PatchTokens(patch_store(tmp_path, world(1)[0]), [0]), lambda row: mask, 3, InContext())
    assert len(memory.labels) == 15
    np.testing.assert_allclose(memory.labels[0], [0, 0.875, 0.125])
    np.testing.assert_allclose(memory.labels.sum(1), 1)


def test_a_small_memory_holds_as_many_patches_of_each_image_and_rare_classes_first(tmp_path):
    patches, masks = world(20)
    masks[:] = 0
    masks[:, :8, :8] = 1  # one patch of sixteen
    memory = remember(PatchTokens(patch_store(tmp_path, patches), range(20)), masks.__getitem__, 2, InContext(80))
    assert len(memory.labels) == 80
    # score 15 u of the fifteen and 1 u of the one: it is among the four smallest in nearly all images
    assert memory.labels[:, 1].sum() >= 18


def test_patches_are_chosen_by_the_published_scores():
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 3, (16, 4)) * (rng.random((16, 4)) < 0.5)
    pixels[5] = 0
    present = pixels > 0
    frequency = [sum(bool(patch[c]) for patch in pixels) for c in range(4)]
    uniform, scores = np.random.default_rng(7), {}
    known = [i for i in range(16) if present[i].any()]
    for i, u in zip(known, uniform.random(len(known)), strict=True):
        scores[i] = u * sum(frequency[c] for c in range(4) if present[i, c])
    expected = sorted(sorted(scores, key=scores.get)[:6])
    assert rarest(pixels.astype(float), 6, np.random.default_rng(7)).tolist() == expected


def test_masks_that_know_nothing_and_settings_that_cannot_be_are_refused(tmp_path):
    tokens = PatchTokens(patch_store(tmp_path, world(1)[0]), [0])
    with pytest.raises(ValueError, match="know no pixel"):
        remember(tokens, lambda row: np.full((8, 8), 255, np.uint8), 3, InContext())
    with pytest.raises(ValueError, match="temperature above 0"):
        InContext(temperature=0.0)
