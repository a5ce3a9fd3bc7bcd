import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_example import patch_store
from hypothesis import given, settings
from hypothesis import strategies as st

from regvit.features.store import FeatureStore
from regvit.features.store_writer import write_store
from regvit.measures.dense import dense_heads
from regvit.measures.dense.dense_heads import (
    DenseHeads,
    DenseTraining,
    PatchTokens,
    Statistics,
    at_pixels,
    batches,
    best_head,
    pixels_of_patches,
    schedule,
    statistics,
)


def numbered(images, side=2, channels=3):
    """Tokens whose first channel is the row."""
    patches = np.random.default_rng(0).normal(2.0, 3.0, (images, side**2, channels)).astype(np.float32)
    patches[..., 0] = np.arange(images)[:, None]
    return patches


# Reading


def test_rows_of_a_split_come_in_order_whatever_units_they_lie_in(tmp_path):
    tokens = PatchTokens(patch_store(tmp_path, numbered(11)), [9, 0, 3, 5])
    parts = list(tokens.in_order())
    assert [row for rows, _ in parts for row in rows] == tokens.rows == [0, 3, 5, 9]
    assert torch.cat([patches[:, 0, 0] for _, patches in parts]).tolist() == [0, 3, 5, 9]
    assert len(tokens) == 4 and tokens.side == 2


def test_what_gives_no_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has 6 patches an image, expected a square"):
        PatchTokens(patch_store(tmp_path / "six", np.zeros((4, 6, 2))), [0])
    with pytest.raises(ValueError, match="no rows of"):
        PatchTokens(patch_store(tmp_path / "whole", numbered(4)), [])
    write_store(tmp_path / "made.zarr", {"cls": np.zeros((2, 3))}, {})
    with pytest.raises(KeyError, match="holds cls and no patches"):
        PatchTokens(FeatureStore.open(tmp_path / "made.zarr"), [0])


def test_statistics_are_those_of_all_patches_of_the_rows(tmp_path):
    patches = numbered(9)
    patches[..., 2] = 1000.0  # constant, and far from 0
    found = statistics(PatchTokens(patch_store(tmp_path, patches), [0, 2, 5, 6, 8]))
    expected = patches[[0, 2, 5, 6, 8]].astype(np.float16).astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std[:2], expected.std(0)[:2], rtol=1e-6)
    assert found.std[2] == 1.0


# Drawing batches


def take(tokens, count, size, seed=0):
    drawn = batches(tokens, lambda row: row, size, np.random.default_rng(seed))
    return list(itertools.islice(drawn, count))


def test_every_target_stands_beside_its_own_tokens(tmp_path):
    for batch in take(PatchTokens(patch_store(tmp_path, numbered(11)), range(1, 10)), 12, 4):
        assert batch.patches[:, 0, 0].tolist() == batch.targets
        assert len(batch.targets) == 4


def test_a_set_that_fits_is_read_once_and_every_image_is_drawn(tmp_path, monkeypatch):
    tokens = PatchTokens(patch_store(tmp_path, numbered(11)), range(11))
    read = []
    monkeypatch.setattr(tokens, "read", lambda unit, rows: read.append(unit) or PatchTokens.read(tokens, unit, rows))
    drawn = [row for batch in take(tokens, 10, 5) for row in batch.targets]
    assert set(drawn) == set(range(11))
    assert sorted(read) == [0, 1, 2]


def test_a_larger_set_is_gone_through_in_groups_of_units_and_every_image_comes_once_a_round(tmp_path, monkeypatch):
    monkeypatch.setattr(dense_heads, "HELD", 8)
    tokens = PatchTokens(patch_store(tmp_path, numbered(16)), range(16))
    drawn = [batch.targets for batch in take(tokens, 4, 4)]
    assert sorted(itertools.chain(*drawn)) == list(range(16))
    assert len({row // 4 for row in drawn[0] + drawn[1]}) == 2  # two units are held
    assert drawn != [batch.targets for batch in take(tokens, 4, 4, seed=1)]
    assert drawn == [batch.targets for batch in take(tokens, 4, 4)]


# Layers


def test_a_layer_takes_raw_tokens_and_says_what_its_head_said_of_them():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 5) * 3 + 7
    heads = DenseHeads(
        Statistics(x.mean((0, 1)), x.std((0, 1))), 4, DenseTraining([0.1, 0.2], [0.0, 0.5], 10, 1, seed=3)
    )
    for weight, bias in zip(heads.weights, heads.biases, strict=True):
        weight.data, bias.data = torch.randn(5, 4), torch.randn(4)
    together = heads(x).unflatten(1, (4, 4))
    for head in range(4):
        torch.testing.assert_close(heads.layer(head)(x), together[:, head], atol=1e-5, rtol=1e-5)
    assert heads.settings == [(0.1, 0.0), (0.1, 0.5), (0.2, 0.0), (0.2, 0.5)]


def test_heads_trained_side_by_side_are_those_trained_alone():
    torch.manual_seed(1)
    x, target = torch.randn(6, 4, 5), torch.randn(6, 3, 2, 2)
    plain = Statistics(torch.zeros(5), torch.ones(5))

    def trained(rates, decays):
        heads = DenseHeads(plain, 3, DenseTraining(rates, decays, 7, 1))
        for _ in range(7):
            out = heads(x).unflatten(1, (len(heads), 3))
            heads.step((out - target[:, None]).square().mean((0, 2, 3, 4)))
        return heads

    together = trained([0.01, 0.1], [0.0, 0.3])
    for head, (rate, decay) in enumerate(together.settings):
        torch.testing.assert_close(together.weights[head], trained([rate], [decay]).weights[0])
    assert not torch.allclose(together.weights[2], together.weights[3])


def test_a_step_is_adamw_with_the_scheduled_rate():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    plain = Statistics(torch.zeros(5), torch.ones(5))
    heads = DenseHeads(plain, 2, DenseTraining([0.1], [0.2], 4, 1))
    reference = torch.nn.Linear(5, 2)
    reference.weight.data, reference.bias.data = heads.weights[0].data.T.clone(), heads.biases[0].data.clone()
    groups = [{"params": [reference.weight], "weight_decay": 0.2}, {"params": [reference.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for factor in (1.0, 0.75, 0.5, 0.25):
        heads.step(heads(x).square().mean()[None])
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * factor
        optimizer.zero_grad()
        reference(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(heads.weights[0].T, reference.weight)
    torch.testing.assert_close(heads.biases[0], reference.bias)


def test_the_rate_warms_up_and_falls_to_nothing():
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)  # a fifth of the five steps of warm-up
    assert max(factors) == factors[4] == pytest.approx(0.96)
    assert factors[-1] == pytest.approx(0.01)


def test_a_head_that_diverged_is_not_chosen():
    heads = DenseHeads(Statistics(torch.zeros(2), torch.ones(2)), 2, DenseTraining([0.1, 0.2, 0.3], [0.0], 1, 1))
    heads.weights[1].data[0, 0] = math.inf
    assert best_head(heads, [0.5, 0.1, 0.4], "depth") == 2
    assert best_head(heads, [0.5, 0.1, math.nan], "depth") == 0
    with pytest.raises(ValueError, match=r"all 3 heads for depth diverged; the smallest learning rate was 0\.1"):
        best_head(heads, [math.nan] * 3, "depth")


# The grid and the pixels


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), side=st.integers(1, 6), seed=st.integers(0, 2**16)
)  # fmt: skip
def test_single_pixels_are_those_of_torchs_bilinear_upsampling(height, width, side, seed):
    torch.manual_seed(seed)
    maps = torch.randn(2, 3, side, side)
    whole = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
    rows, columns = torch.randint(height, (2, 5)), torch.randint(width, (2, 5))
    found = at_pixels(maps, rows, columns, torch.tensor([[height, width]] * 2))
    for image in range(2):
        torch.testing.assert_close(found[image], whole[image][:, rows[image], columns[image]], atol=1e-5, rtol=1e-5)


def test_each_pixel_has_the_value_of_the_patch_that_it_lies_in():
    squares = pixels_of_patches(np.arange(4), 4, 6)
    assert squares.tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
