import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from regvit.probing import training as module
from regvit.probing.checkpoints import CHECKPOINT, Checkpoint
from regvit.probing.heads import INITIAL, standards_of
from regvit.probing.probes import save_probes
from regvit.probing.splits import Split
from regvit.probing.training import DINOV2_RATES, Settings, batch_rows, train_probes

CLASSES = tuple("abcdefg")
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


def clouds(n, d, seed, spread=1.0):
    """Seven overlapping classes in d correlated, shifted channels of very different variance."""
    rng = np.random.default_rng(0)
    centres, mixing = rng.normal(size=(7, 12)), rng.normal(size=(12, d)) * np.geomspace(3, 0.1, 12)[:, None]
    shift = rng.normal(size=d) * 5
    rng = np.random.default_rng(seed)
    labels = rng.integers(7, size=n)
    latent = centres[labels] + spread * rng.normal(size=(n, 12))
    return (latent @ mixing + 0.3 * rng.normal(size=(n, d)) + shift).astype(np.float32), labels


@pytest.fixture(scope="module")
def splits():
    def made(n, seed):
        x, y = clouds(n, 24, seed)
        features = {"cls": x, "patch_mean": x[:, ::-1] * 2, "cls_patch": np.concatenate([x, x**2], 1)}
        features |= dict.fromkeys(("cls_reg_learned", "cls_reg_attn"), x)  # CLS and two registers of 8 channels
        return Split(features, y, channels=8)

    return made(300, 1), made(150, 2)


def only(splits, *names):
    return [Split({name: part.features[name] for name in names}, part.labels, part.channels) for part in splits]


def first_weights(d, n_classes, seed=0):
    return INITIAL * torch.randn(d, n_classes, generator=torch.Generator().manual_seed(seed)).double()


# --- the arithmetic


def test_accuracy_is_within_a_point_of_logistic_regression():
    (x, y), (v, w), (t, u) = (clouds(n, 192, seed) for n, seed in ((700, 1), (1000, 2), (4000, 3)))
    mean, scale = x.mean(0), np.sqrt(x.var(0).mean())
    models = [LogisticRegression(C=c, tol=1e-6, max_iter=2000).fit((x - mean) / scale, y) for c in (1e-3, 1e-2, 1e-1)]
    best = max(models, key=lambda model: model.score((v - mean) / scale, w))
    settings = Settings((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), steps=400)
    (probe,) = train_probes(Split({"cls": x}, y), Split({"cls": v}, w), CLASSES, settings).probes["cls"]
    reference = best.score((t - mean) / scale, u)
    assert 0.5 < reference < 0.95  # hard enough to tell
    assert (probe.logits(t).argmax(1) == u).mean() >= reference - 0.01


@pytest.mark.parametrize("published", [False, True], ids=["ours", "DINOv2's: raw features, plain SGD"])
def test_a_head_is_trained_as_torchs_own_sgd_and_schedule_would(splits, published):
    train, val = only(splits, "cls")
    steps, decay, momentum, schedule = (30, 0, 0.0, "constant") if published else (40, 0.01, 0.9, "cosine")
    train = Split({"cls": train.features["cls"] / 10}, train.labels)
    x = train.features["cls"].astype(np.float64)
    mean, scale = (0, 1) if published else (x.mean(0), np.sqrt(x.var(0).mean()))
    z, labels = torch.from_numpy((x - mean) / scale), torch.from_numpy(train.labels)
    weight, bias = first_weights(24, 7).requires_grad_(), torch.zeros(7, dtype=torch.float64, requires_grad=True)
    groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias], "weight_decay": 0}]
    sgd = torch.optim.SGD(groups, lr=0.01, momentum=momentum)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    for _ in range(steps):  # a batch of all the rows: their order plays no part
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(z @ weight + bias, labels).backward()
        sgd.step()
        if schedule == "cosine":
            rates.step()
    unseen = val.features["cls"].astype(np.float64) / 10
    expected = (torch.from_numpy((unseen - mean) / scale) @ weight + bias).detach().numpy()
    settings = Settings((0.01,), steps, 300, decay, momentum=momentum, schedule=schedule, standardise=not published)
    (probe,) = train_probes(train, val, CLASSES, settings).probes["cls"]
    expected -= expected.mean(1, keepdims=True)  # what all classes share is left out
    np.testing.assert_allclose(probe.logits(unseen.astype(np.float32)), expected, rtol=1e-3, atol=1e-4)


def test_dinov2s_thirteen_rates_are_those_it_publishes():
    assert list(DINOV2_RATES) == [float(f"{digit}e{power}") for power in (-5, -4, -3, -2) for digit in (1, 2, 5)] + [
        0.1
    ]


def test_heads_trained_together_are_those_trained_one_by_one(splits):
    settings = Settings((0.003, 0.03), 30, 32, 1e-3, seeds=(3, 8))
    together = train_probes(*splits, CLASSES, settings)
    for name, probes in together.probes.items():
        for probe in probes:
            alone = Settings((probe.learning_rate,), 30, 32, 1e-3, seeds=(probe.seed,))
            (own,) = train_probes(*only(splits, name), CLASSES, alone).probes[name]
            np.testing.assert_allclose(probe.weight, own.weight, rtol=1e-3, atol=1e-5)
            assert probe.val_correct == own.val_correct
            if probe.pool is not None:
                np.testing.assert_allclose(probe.pool, own.pool, rtol=1e-3, atol=1e-5)


def test_seeds_are_seeds_also_after_many_epochs(splits):
    train, val = only(splits, "cls")
    probes = train_probes(train, val, CLASSES, Settings((0.03,), 400, 300, seeds=(0, 1, 2))).probes["cls"]  # no order
    weights = [probe.weight for probe in probes]
    assert min(np.abs(weights[0] - other).max() for other in weights[1:]) > 1e-3
    assert probes[0].logits(val.features["cls"]).sum(1) == pytest.approx(np.zeros(150), abs=1e-3)


def test_exported_weights_take_raw_features_also_where_the_mean_dwarfs_the_deviation(splits):
    train, val = [Split({"cls": part.features["cls"] + 1000}, part.labels) for part in splits]
    (probe,) = train_probes(train, val, CLASSES, Settings(RATES, 100)).probes["cls"]
    assert (probe.logits(val.features["cls"]).argmax(1) == val.labels).sum() == pytest.approx(probe.val_correct, abs=1)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (3, 50), (7, 1)])
def test_no_image_is_seen_again_before_the_order_is_through(n, batch_size):
    size = min(n, batch_size)
    steps = n // size
    for epoch in range(3):
        rows = np.concatenate([batch_rows(n, batch_size, 0, epoch * steps + step) for step in range(steps)])
        assert len(set(rows.tolist())) == len(rows) == steps * size and rows.max() < n
    assert (
        n == 3 or batch_rows(n, n, 0, 0).tolist() != batch_rows(n, n, 0, 1).tolist() != batch_rows(n, n, 1, 1).tolist()
    )


# --- pooling


def test_learned_pooling_finds_the_register_that_knows_which_the_mean_cannot():
    def tokens(n, seed):
        """CLS and four registers; the class shows in register 0 alone, and the others drown it in the mean."""
        rng = np.random.default_rng(seed)
        labels, values = rng.integers(3, size=n), rng.normal(size=(n, 5, 8)).astype(np.float32)
        values[:, 1] += 1.5 * np.eye(3, 8)[labels]
        values[:, 2:] *= 4
        mean = np.concatenate([values[:, 0], values[:, 1:].mean(1)], 1)
        return Split({"cls_reg": mean, "cls_reg_learned": values.reshape(n, -1)}, labels, 8), values

    (train, _), (val, v) = tokens(1500, 0), tokens(1000, 1)
    probes = train_probes(train, val, "abc", Settings((0.03, 0.1, 0.3), 400)).probes
    top1 = {name: probe.val_correct / 1000 for name, (probe,) in probes.items()}
    bound = (v[:, 1, :3].argmax(1) == val.labels).mean()  # the best there is: nearest of three equal clouds
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
        return Split(dict.fromkeys(("cls_reg_learned", "cls_reg_attn"), values.reshape(n, -1).astype("f4")), labels, 8)

    probes = train_probes(marked(1500, 0), marked(1000, 1), "abc", Settings((0.03, 0.1, 0.3), 400)).probes
    assert probes["cls_reg_attn"][0].val_correct > probes["cls_reg_learned"][0].val_correct + 100


# --- choosing, curves


def test_the_head_is_chosen_on_validation_not_on_training():
    x, y = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0), np.repeat([0, 1], 10)
    wrong = 1 - y  # on validation whoever learned what training teaches is always wrong
    never_learns = 1e-50  # 0 in float32: such a head stays at its first weights
    settings = Settings((never_learns, 0.1), 50, seeds=(2,))
    (probe,) = train_probes(Split({"cls": x}, y), Split({"cls": x}, wrong), "ab", settings).probes["cls"]
    assert probe.learning_rate == never_learns and probe.val_correct > 0


def test_of_equally_good_rates_the_smallest_wins_whatever_the_order():
    x, y = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0), np.repeat([0, 1], 10)
    part = Split({"cls": x}, y)
    (probe,) = train_probes(part, part, "ab", Settings((0.3, 0.05, 0.1), 100)).probes["cls"]
    assert (probe.learning_rate, probe.val_correct) == (0.05, 20)


def test_a_diverged_head_is_never_chosen_and_only_diverged_heads_are_an_error(splits):
    for name in ("cls", "cls_reg_attn"):
        part = only(splits, name)
        assert train_probes(*part, CLASSES, Settings((1e-2, 1e38), 50)).probes[name][0].learning_rate == 1e-2
    with pytest.raises(
        ValueError, match=r"all 1 heads of readout 'cls' diverged; the smallest learning rate was 1e\+38"
    ):
        train_probes(*only(splits, "cls"), CLASSES, Settings((1e38,), 50))


@pytest.mark.parametrize("steps", [7, 50])
def test_the_curves_have_some_twenty_points_and_end_with_the_best_rate_at_the_last_step(splits, steps):
    points = []
    probes = train_probes(
        *only(splits, "cls"), CLASSES, Settings(RATES, steps), on_point=lambda *each: points.append(each)
    )
    seen = [step for step, _ in points]
    assert seen[-1] == steps and len(seen) == min(steps, 20) and seen == sorted(set(seen))
    assert points[-1][1] == {"cls": pytest.approx(probes.probes["cls"][0].val_correct / 150)}


# --- checkpoints


class Interrupted:
    """Ctrl-C at a step."""

    def __init__(self, step):
        self.step, self.points = step, []

    def __call__(self, step, accuracies):
        self.points.append((step, accuracies))
        if step >= self.step:
            raise KeyboardInterrupt


SETTINGS = Settings(RATES, 40, 32, seeds=(0, 1))


def trained(splits, file, checkpoint=None):
    """The bytes of the probes, saved in a file, and the points of their curves."""
    points = []
    save_probes(file, train_probes(*splits, CLASSES, SETTINGS, "cpu", checkpoint, lambda *each: points.append(each)))
    return file.read_bytes(), points


@pytest.fixture(scope="module")
def undisturbed(splits, tmp_path_factory):
    """What training leaves that is not interrupted, with all features held in memory."""
    return trained(splits, tmp_path_factory.mktemp("undisturbed") / "probes")


@pytest.mark.parametrize(("step", "held"), [(2, True), (22, False), (40, True)])
def test_training_resumed_after_an_interrupt_gives_the_same_bytes_and_curves(
    splits, undisturbed, tmp_path, monkeypatch, step, held
):
    monkeypatch.setattr(module, "MEMORY_SHARE", 0.5 if held else 0)
    told = []
    checkpoint = Checkpoint(tmp_path / "work", 0, told.append)
    with pytest.raises(KeyboardInterrupt):
        train_probes(*splits, CLASSES, SETTINGS, "cpu", checkpoint, Interrupted(step))
    assert trained(splits, tmp_path / "resumed", checkpoint) == undisturbed
    saved = step - 2  # 20 points in 40 steps, and the last was interrupted before it was saved
    safe = f"interrupted: {saved} of 40 steps are safe in {tmp_path / 'work'}; run the same again to go on from there"
    assert told == [safe, *[f"resumed: {saved} of 40 steps were done"] * (saved > 0)]


def test_a_checkpoint_of_other_settings_or_data_or_a_damaged_one_is_not_gone_on_from(splits, tmp_path):
    (train, val), told = only(splits, "cls", "patch_mean"), []
    checkpoint, settings = Checkpoint(tmp_path, 0, told.append), Settings(RATES, 20, 32)
    train_probes(train, val, CLASSES, settings, "cpu", checkpoint)
    moved = Split(train.features | {"cls": train.features["cls"] + 1}, train.labels)
    for part, other in (
        (train, replace(settings, momentum=0.5)),
        (train, replace(settings, seeds=(7,))),
        (moved, settings),
    ):
        told.clear()
        found = train_probes(part, val, CLASSES, other, "cpu", checkpoint)
        assert told == [f"started anew: the checkpoint in {tmp_path} is of other data, settings or code"]
        again = train_probes(part, val, CLASSES, other)
        assert np.array_equal(found.probes["cls"][0].weight, again.probes["cls"][0].weight)
    (tmp_path / CHECKPOINT).write_bytes(b"torn")
    told.clear()
    train_probes(train, val, CLASSES, settings, "cpu", checkpoint)
    assert told[0].startswith("started anew: the checkpoint") and "is damaged" in told[0]


# --- refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.r_[-1, np.ones(19, int)]}, "the train split has 1 images without a label"),
        ({"w": np.full(5, 7)}, "the val split has label 7; a probe needs class indices 0 to 6"),
        ({"x": np.zeros((19, 4))}, r"train features of shape \(19, 4\); expected \(20, channels\)"),
        ({"v": np.zeros((5, 3))}, r"channels \{'cls': 4\} and val \{'cls': 3\}; expected the same"),
        ({"name": "cls_reg_attn", "channels": 3}, "has 4 channels and those of one token are 3; expected CLS and at"),
    ],
)
def test_splits_that_do_not_fit_are_refused(change, message):
    given = {"x": np.ones((20, 4)), "y": np.arange(20) % 7, "v": np.ones((5, 4)), "w": np.zeros(5, int), "name": "cls"}
    given |= {"channels": None, **change}
    train, val = (Split({given["name"]: given[x]}, given[y], given["channels"]) for x, y in (("x", "y"), ("v", "w")))
    with pytest.raises(ValueError, match=message):
        train_probes(train, val, CLASSES, Settings((0.1,)))


def test_constant_features_give_the_prior_and_no_nan():
    x, y = np.full((40, 3), 2.0, np.float32), np.array([0] * 30 + [1] * 10)
    settings = Settings((0.1,), 300)
    (probe,) = train_probes(Split({"cls": x}, y), Split({"cls": x[:4]}, np.zeros(4, int)), "ab", settings).probes["cls"]
    logits = probe.logits(x[:1])[0]
    assert logits[0] - logits[1] == pytest.approx(np.log(3), abs=1e-2)


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_one_scale_stands_for_all_channels_however_the_rows_are_cut(rows, monkeypatch):
    monkeypatch.setattr("regvit.features.stored_readouts.ROWS_AT_ONCE", rows)
    values = {"cls": np.array([[0, 10], [2, 16]], np.float32), "patch_mean": np.full((2, 2), 7, np.float32)}
    found = standards_of(values, None, True)
    assert found["cls"].mean.tolist() == [1, 13] and found["cls"].scale == pytest.approx(math.sqrt((1 + 9) / 2))
    assert found["patch_mean"].scale == 1
    pooled = np.array([[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8]], np.float32)  # CLS and two registers of 2 channels
    found = standards_of({"cls_reg_learned": pooled}, 2, True)["cls_reg_learned"]
    assert found.mean.tolist() == [2, 3, 5, 6] and found.scale == 1
