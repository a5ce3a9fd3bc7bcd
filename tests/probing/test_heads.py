import math

import numpy as np
import pytest
import torch

from regvit.features.stored_readouts import blocks
from regvit.probing.heads import RowOrder, moments
from regvit.probing.probes import train_probes


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (10, 10), (3, 50), (7, 1)])
def test_every_image_is_seen_once_before_any_is_seen_again(n, batch_size):
    order = RowOrder(n, batch_size, seed=0)
    drawn = [order.next() for _ in range(3 * n)]
    assert {len(rows) for rows in drawn} == {min(n, batch_size)}
    seen = torch.cat(drawn).tolist()
    rounds = [seen[i : i + n] for i in range(0, 3 * n, n)]
    assert all(sorted(part) == list(range(n)) for part in rounds)
    assert n == 3 or rounds[0] != rounds[1]


def test_an_order_goes_on_from_its_state():
    order, other = RowOrder(10, 4, seed=0), RowOrder(10, 4, seed=5)
    order.next()
    other.restore(order.state())
    assert [order.next().tolist() for _ in range(9)] == [other.next().tolist() for _ in range(9)]


def test_one_scale_stands_for_all_channels():
    values = {"cls": np.array([[0, 10], [2, 16]], np.float32), "patch_mean": np.full((2, 2), 7, np.float32)}
    found = moments(values)
    assert found["cls"].mean.tolist() == [1, 13] and found["cls"].scale == pytest.approx(math.sqrt((1 + 9) / 2))
    assert found["patch_mean"].scale == 1


@pytest.mark.parametrize("rows", [1, 7, 64, 4096])
def test_moments_have_numpys_bits_however_the_rows_are_cut(rows, monkeypatch):
    values = np.random.default_rng(0).normal(3, 2, size=(101, 5)).astype(np.float32)
    monkeypatch.setattr("regvit.probing.heads.blocks", lambda n: blocks(n, rows))
    found = moments({"cls": values})["cls"]
    assert found.mean.tolist() == values.mean(0, dtype=np.float64).tolist()
    assert found.scale == math.sqrt(values.var(0, dtype=np.float64).mean())


def test_pooled_registers_are_standardised_by_cls_and_their_mean():
    values = np.array([[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8]], np.float32)  # CLS and two registers of 2 channels
    found = moments({"cls_reg_learned": values}, channels=2)["cls_reg_learned"]
    assert found.mean.tolist() == [2, 3, 5, 6] and found.scale == 1


def tokens(n, r, d, seed):
    """CLS and registers of different means; the class shows in register 0 alone."""
    rng = np.random.default_rng(seed)
    labels, values = rng.integers(3, size=n), rng.normal(size=(n, 1 + r, d))
    values[:, 1] += 1.5 * np.eye(3, d)[labels]
    values[:, 2:] *= 4  # drowns register 0 in the mean
    return values.astype(np.float32), labels


def reference(x, labels, attention, steps, rate, decay):
    """The pooled probe by autograd, float64, on batches of all the rows. x: (b, 1 + r, d)."""
    x, d = torch.from_numpy(x).double(), x.shape[2]
    pooled = torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)
    mean, scale = pooled.mean(0), pooled.var(0, correction=0).mean().sqrt()
    cls, registers = (x[:, 0] - mean[:d]) / scale, (x[:, 1:] - mean[d:]) / scale
    weight, bias = torch.zeros(2 * d, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    pool = torch.zeros(d if attention else x.shape[1] - 1, dtype=torch.float64)
    values = [value.requires_grad_() for value in (weight, bias, pool)]
    groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias, pool], "weight_decay": 0}]
    sgd = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)

    def logits():
        scores = registers @ values[2] / math.sqrt(d) if attention else values[2][None]
        mixed = (scores.softmax(1)[..., None] * registers).sum(1)
        return torch.cat([cls, mixed], 1) @ weight + bias

    for _ in range(steps):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(logits(), torch.from_numpy(labels)).backward()
        sgd.step()
        schedule.step()
    return logits().detach().numpy()


@pytest.mark.parametrize("name", ["cls_reg_learned", "cls_reg_attn"])
def test_pooling_is_trained_as_autograd_and_torchs_sgd_would(name):
    x, y = tokens(80, 3, 6, 0)
    x += np.random.default_rng(1).normal(size=(1, 4, 6)).astype(np.float32) * 3
    expected = reference(x, y, name == "cls_reg_attn", 60, 0.1, 0.01)
    flat = {name: x.reshape(80, -1)}
    probe = train_probes(flat, y, flat, y, "abc", [0.1], 60, 80, 0.01, channels=6).probes.probes[name][0]
    assert np.abs(probe.pool).max() > 0.05  # it did move
    np.testing.assert_allclose(probe.logits(flat[name]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["cls_reg_learned", "cls_reg_attn"])
def test_pooling_heads_trained_together_are_those_trained_one_by_one(name):
    x, y = tokens(60, 2, 5, 0)
    flat = {name: x.reshape(60, -1)}
    rates = (0.01, 0.1)
    together = train_probes(flat, y, flat, y, "abc", rates, 40, 16, seeds=(0, 1), channels=5)
    for seed, probe in zip((0, 1), together.probes.probes[name], strict=True):
        alone = [train_probes(flat, y, flat, y, "abc", [rate], 40, 16, seeds=(seed,), channels=5) for rate in rates]
        own = next(t.probes.probes[name][0] for t in alone if t.probes.learning_rates == (probe.learning_rate,))
        np.testing.assert_allclose(probe.weight, own.weight, atol=1e-4)
        np.testing.assert_allclose(probe.pool, own.pool, atol=1e-4)


def test_learned_pooling_finds_the_register_that_knows_which_the_mean_cannot():
    (x, y), (v, w) = tokens(1500, 4, 8, 0), tokens(1000, 4, 8, 1)

    def features(values):
        flat = values.reshape(len(values), -1)
        mean = np.concatenate([values[:, 0], values[:, 1:].mean(1)], 1)
        return {"cls_reg": mean, "cls_reg_learned": flat}

    probes = train_probes(features(x), y, features(v), w, "abc", (0.03, 0.1, 0.3), 600, channels=8).probes.probes
    top1 = {name: probe.val_correct / 1000 for name, (probe,) in probes.items()}
    bound = (v[:, 1, :3].argmax(1) == w).mean()  # the best there is: nearest of three equal clouds
    assert top1["cls_reg"] < bound - 0.15
    assert top1["cls_reg_learned"] > bound - 0.05
    shares = np.exp(probes["cls_reg_learned"][0].pool)
    assert shares[0] / shares.sum() > 0.8


def test_attention_pooling_finds_the_register_that_knows_wherever_it_stands():
    def marked(n, seed):
        rng = np.random.default_rng(seed)
        labels, where = rng.integers(3, size=n), rng.integers(4, size=n)
        values = rng.normal(size=(n, 5, 8))
        values[:, 1:] *= 3
        values[np.arange(n), 1 + where] = rng.normal(size=(n, 8)) + 2 * np.eye(3, 8)[labels] + 8 * np.eye(8)[7]
        return values.reshape(n, -1).astype(np.float32), labels

    (x, y), (v, w) = marked(1500, 0), marked(1000, 1)
    names = ("cls_reg_learned", "cls_reg_attn")
    probes = train_probes(
        dict.fromkeys(names, x), y, dict.fromkeys(names, v), w, "abc", (0.03, 0.1, 0.3), 600, channels=8
    ).probes.probes
    assert probes["cls_reg_attn"][0].val_correct > probes["cls_reg_learned"][0].val_correct + 100
