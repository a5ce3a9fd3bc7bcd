import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_example import patch_store
from miou_example import random_counts
from PIL import Image
from sklearn.metrics import jaccard_score

from regvit.data.decoding import UnreadableImage
from regvit.measures.dense import segmentation
from regvit.measures.dense.dense_heads import Batch, DenseHeads, DenseTraining, LinearLayer, PatchTokens, Statistics
from regvit.measures.dense.segmentation import (
    Segmenter,
    class_table,
    count,
    figures,
    image_columns,
    pixel_table,
    read_classes,
    train,
)
from regvit.stats.miou import accuracy, class_ious, miou

SIDE, CLASSES = 4, 3


def world(images, seed=0, noise=0.3):
    """Patches that say their class linearly, and masks of 32 px whose squares are of that class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, (images, SIDE**2))
    directions = np.random.default_rng(99).normal(size=(CLASSES, 6))
    patches = directions[labels] + rng.normal(0, noise, (images, SIDE**2, 6))
    masks = labels.reshape(-1, SIDE, SIDE).repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)
    return patches, masks


def learned(folder, masks, patches, seed=0, steps=60):
    store = patch_store(folder, patches)
    tokens = PatchTokens(store, range(16)), PatchTokens(store, range(16, 24)), PatchTokens(store, range(24, 32))
    training = DenseTraining([0.001, 0.05], [0.0], steps, 4, seed)
    return train(*tokens[:2], masks.__getitem__, CLASSES, training), tokens[2]


# Learning


def test_classes_that_patches_tell_are_learned_and_the_better_rate_is_chosen(tmp_path):
    patches, masks = world(32)
    segmenter, test = learned(tmp_path, masks, patches)
    counts = count(segmenter.layer, test, masks.__getitem__, CLASSES)
    # Bilinear upsampling blurs the borders between squares of 8 px; inside of them nothing is wrong.
    assert accuracy(counts).value > 0.75
    assert segmenter.layer.learning_rate == 0.05
    assert segmenter.val_miou[(0.05, 0.0)] > segmenter.val_miou[(0.001, 0.0)] + 0.05
    shuffled = count(segmenter.layer, test, masks[::-1].__getitem__, CLASSES)
    assert accuracy(shuffled).value < 0.5


def test_ignored_pixels_neither_teach_nor_count(tmp_path):
    patches, masks = world(32)
    masks = masks.copy()
    masks[:, :, 16:] = 255
    wrong = masks.copy()
    wrong[:, :, 16:] = (masks[:, :, :16] + 1) % CLASSES  # what ignored pixels hide must not matter
    segmenter, test = learned(tmp_path, masks, patches, steps=5)
    counts = count(segmenter.layer, test, masks.__getitem__, CLASSES)
    assert counts.actual.sum(1).tolist() == [32 * 16] * 8
    assert counts.counted.reshape(8, 4, 4)[:, :, 2:].sum() == 0
    (tmp_path / "again").mkdir()
    assert not torch.equal(learned(tmp_path / "again", wrong, patches, steps=5)[0].layer.weight, segmenter.layer.weight)


def test_the_loss_is_the_cross_entropy_of_upsampled_logits_over_the_pixels_drawn(monkeypatch):
    monkeypatch.setattr(segmentation, "PIXELS", 20_000)  # of 24 x 40: the mean over all pixels but for chance
    rng = np.random.default_rng(0)
    patches = torch.from_numpy(rng.normal(size=(2, 16, 6)).astype(np.float32))
    masks = [rng.integers(0, 3, (24, 40)).astype(np.uint8), rng.integers(0, 3, (24, 40)).astype(np.uint8)]
    masks[0][:5] = 255
    heads = DenseHeads(Statistics(torch.zeros(6), torch.ones(6)), 3, DenseTraining([0.1, 0.2], [0.0], 5, 1))
    heads.weights[1].data *= 50
    found = segmentation._losses(heads, Batch(patches, masks), rng)
    logits = heads(patches).unflatten(1, (2, 3))
    whole = torch.from_numpy(np.stack(masks)).long()
    for head in range(2):
        upsampled = F.interpolate(logits[:, head], (24, 40), mode="bilinear")
        expected = F.cross_entropy(upsampled, whole, ignore_index=255)
        assert found[head].item() == pytest.approx(expected.item(), rel=0.02)


# Counting


def test_counts_are_those_of_the_upsampled_argmax_at_the_masks_own_size(tmp_path):
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(3, 16, 6)).astype(np.float16).astype(np.float32)
    masks = [rng.integers(0, 3, size).astype(np.uint8) for size in ((20, 31), (7, 9), (16, 16))]
    layer = LinearLayer(torch.from_numpy(rng.normal(size=(3, 6)).astype(np.float32)), torch.zeros(3), 0.1, 0.0)
    counts = count(layer, PatchTokens(patch_store(tmp_path, patches), range(3)), masks.__getitem__, 3)
    for image, mask in enumerate(masks):
        logits = (torch.from_numpy(patches[image]) @ layer.weight.T).T.reshape(1, 3, 4, 4)
        guess = F.interpolate(logits, mask.shape, mode="bilinear")[0].argmax(0).numpy()
        ious = jaccard_score(mask.ravel(), guess.ravel(), labels=range(3), average=None)
        np.testing.assert_allclose(class_ious(dataclasses.replace(counts, **{
            name: getattr(counts, name)[[image]] for name in ("intersection", "predicted", "actual")})), ious)  # fmt: skip
        assert counts.right[image].sum() == (guess == mask).sum()
        rows, columns = np.indices(mask.shape)
        height, width = mask.shape
        first = (rows * 4 // height == 1) & (columns * 4 // width == 2)
        assert counts.right[image, 6] == (guess == mask)[first].sum()
        assert counts.counted[image, 6] == first.sum()


def test_there_is_no_figure_at_outliers_where_there_are_none():
    counts = random_counts(np.random.default_rng(0))
    segmenter = Segmenter(LinearLayer(torch.zeros(4, 2), torch.zeros(4), 0.1, 0.0), {(0.1, 0.0): 0.25})
    without = {one.metric: one.value for one in figures(segmenter, counts, np.zeros((12, 5), bool))}
    assert without["pixel_accuracy_at_outliers"] is None and without["pixel_accuracy_elsewhere"] is None
    assert without["val_miou"] == 0.25 and without["miou"] == pytest.approx(miou(counts))
    outliers = np.zeros((12, 5), bool)
    outliers[:4, 0] = True
    found = {one.metric: one for one in figures(segmenter, counts, outliers)}
    at, elsewhere = found["pixel_accuracy_at_outliers"], found["pixel_accuracy_elsewhere"]
    assert at.value == pytest.approx(counts.right[:4, 0].sum() / 400) and at.n == 4
    assert elsewhere.value == pytest.approx(counts.right[:4, 1:].sum() / 1600)  # of the same images


def test_columns_of_images_weighed_by_their_pixels_give_the_figures_again():
    counts = random_counts(np.random.default_rng(0))
    outliers = np.zeros((12, 5), bool)
    outliers[:4, 0] = outliers[1, 2] = True
    columns = image_columns(counts, outliers)
    for name, where in (("pixel_accuracy", None), ("pixel_accuracy_at_outliers", outliers)):
        has = ~np.isnan(columns[name])
        mean = np.average(columns[name][has], weights=columns[f"{name}_weight"][has])
        assert mean == pytest.approx(accuracy(counts, where).value)
    assert np.isnan(columns["pixel_accuracy_at_outliers"]).sum() == 8


def test_the_pixels_of_each_class_give_the_miou_again():
    counts = random_counts(np.random.default_rng(0), images=3)
    table = pixel_table(counts, ["background", "a", "b", "c"], ["x", "y", "z"])
    sums = table.groupby("mask_value")[["right", "predicted", "actual"]].sum()
    ious = sums["right"] / (sums["predicted"] + sums["actual"] - sums["right"])
    assert ious.mean() == pytest.approx(miou(counts))
    assert list(table.columns) == ["image_id", "class", "mask_value", "right", "predicted", "actual"]
    assert class_table(counts, ["background", "a", "b", "c"])["iou"].tolist() == pytest.approx(ious.tolist())


# Masks


def test_masks_keep_their_indices_and_strange_values_are_refused(tmp_path):
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    Image.fromarray(mask).save(tmp_path / "a.png")
    assert read_classes(tmp_path / "a.png", 3).tolist() == mask.tolist()
    assert read_classes(tmp_path / "a.png", 3, zero_is_ignored=True).tolist() == [[255, 1], [2, 255]]
    with pytest.raises(ValueError, match=r"a\.png holds 2, expected 0 to 1"):
        read_classes(tmp_path / "a.png", 2)
    with pytest.raises(UnreadableImage, match=r"b\.png"):
        read_classes(tmp_path / "b.png", 2)
