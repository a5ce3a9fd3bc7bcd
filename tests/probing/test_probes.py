import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression

from regvit.data.progress import progress
from regvit.probing.checkpoints import CHECKPOINT
from regvit.probing.neighbours import Neighbours
from regvit.probing.probes import DINOV2_RATES, InvalidProbes, Probe, load_probes, save_probes, train_probes

CLASSES = tuple("abcdefg")
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SETTINGS = ("steps", "weight_decay", "momentum", "schedule", "seeds")


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
def split():
    (x, y), (v, w) = clouds(300, 24, 1), clouds(150, 24, 2)
    train = {"cls": x, "patch_mean": x[:, ::-1] * 2, "cls_patch": np.concatenate([x, x**2], 1)}
    val = {"cls": v, "patch_mean": v[:, ::-1] * 2, "cls_patch": np.concatenate([v, v**2], 1)}
    return train, y, val, w


def test_accuracy_is_within_a_point_of_logistic_regression():
    (x, y), (v, w), (t, u) = (clouds(n, 384, seed) for n, seed in ((700, 1), (1000, 2), (4000, 3)))
    mean, scale = x.mean(0), np.sqrt(x.var(0).mean())
    models = [LogisticRegression(C=c, tol=1e-6, max_iter=2000).fit((x - mean) / scale, y) for c in (1e-3, 1e-2, 1e-1)]
    best = max(models, key=lambda model: model.score((v - mean) / scale, w))
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    probe = train_probes({"cls": x}, y, {"cls": v}, w, CLASSES, rates, steps=600).probes.probes["cls"][0]
    reference = best.score((t - mean) / scale, u)
    assert 0.5 < reference < 0.95  # hard enough to tell
    assert (probe.logits(t).argmax(1) == u).mean() >= reference - 0.01


def test_heads_trained_together_are_those_trained_one_by_one(split):
    train, y, val, w = split
    together = train_probes(train, y, val, w, CLASSES, RATES, steps=60, batch_size=32, weight_decay=1e-3)
    assert len({(p.readout, p.learning_rate) for p in together.curves}) == 15
    for name in train:
        for rate in RATES:
            alone = train_probes({name: train[name]}, y, {name: val[name]}, w, CLASSES, [rate], 60, 32, 1e-3)
            own = [p.train_loss for p in together.curves if (p.readout, p.learning_rate) == (name, rate)]
            assert own == pytest.approx([p.train_loss for p in alone.curves], rel=1e-4)


def test_a_head_is_trained_as_torchs_own_sgd_and_schedule_would(split):
    train, y, val, w = split
    x, steps, n = train["cls"].astype(np.float64), 40, len(y)
    mean, scale = x.mean(0), np.sqrt(x.var(0).mean())
    z, labels = torch.from_numpy((x - mean) / scale), torch.from_numpy(y)
    layer = torch.nn.Linear(24, 7).double()
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": 0.01}, {"params": [layer.bias], "weight_decay": 0}]
    sgd = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    for _ in range(steps):  # a batch of all the rows: their order plays no part
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(layer(z), labels).backward()
        sgd.step()
        schedule.step()
    expected = layer(torch.from_numpy((val["cls"] - mean) / scale)).detach().numpy()
    probe = train_probes({"cls": train["cls"]}, y, {"cls": val["cls"]}, w, CLASSES, [0.05], steps, n, 0.01)
    np.testing.assert_allclose(probe.probes.probes["cls"][0].logits(val["cls"]), expected, rtol=1e-3, atol=1e-4)


def test_the_published_protocol_on_raw_features_is_torchs_plain_sgd(split):
    train, y, val, w = split
    x, rows = torch.from_numpy(train["cls"]).double() / 10, torch.from_numpy(y)
    layer = torch.nn.Linear(24, 7).double()
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(30):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(layer(x), rows).backward()
        sgd.step()
    found = train_probes(
        {"cls": x.float().numpy()}, y, {"cls": val["cls"]}, w, CLASSES, [0.01], 30, len(y),
        momentum=0.0, schedule="constant", standardise=False,
    ).probes.probes["cls"][0]  # fmt: skip
    np.testing.assert_allclose(found.weight, layer.weight.detach().numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.bias, layer.bias.detach().numpy(), rtol=1e-3, atol=1e-5)


def test_dinov2s_thirteen_rates_are_those_it_publishes():
    assert len(DINOV2_RATES) == 13 and min(DINOV2_RATES) == 1e-5 and max(DINOV2_RATES) == 0.1
    assert [round(rate / 10 ** np.floor(np.log10(rate) + 1e-9)) for rate in DINOV2_RATES] == [1, 2, 5] * 4 + [1]


def test_the_same_seeds_give_the_same_bytes_and_another_seed_does_not(split, tmp_path):
    train, y, val, w = split
    for name, seeds in (("one", (4, 9)), ("two", (4, 9)), ("three", (4, 5))):
        save_probes(tmp_path / name, train_probes(train, y, val, w, CLASSES, RATES, 30, 32, seeds=seeds).probes)
    one, two, three = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_each_seed_is_trained_as_it_would_be_alone(split):
    train, y, val, w = split
    together = train_probes(train, y, val, w, CLASSES, [0.01], 40, 32, seeds=(3, 8, 5)).probes
    assert together.seeds == (3, 8, 5)
    for i, seed in enumerate(together.seeds):
        alone = train_probes(train, y, val, w, CLASSES, [0.01], 40, 32, seeds=(seed,)).probes
        for name in train:
            assert together.probes[name][i].seed == alone.probes[name][0].seed == seed
            np.testing.assert_allclose(together.probes[name][i].weight, alone.probes[name][0].weight, atol=1e-5)
    first, second, _ = together.probes["cls"]
    assert np.abs(first.weight - second.weight).max() > 1e-4


def test_curves_are_means_over_the_seeds(split):
    train, y, val, w = split
    both = train_probes(train, y, val, w, CLASSES, [0.01], 40, 32, seeds=(3, 8)).curves
    alone = [train_probes(train, y, val, w, CLASSES, [0.01], 40, 32, seeds=(seed,)).curves for seed in (3, 8)]
    for p, one, other in zip(both, *alone, strict=True):
        assert (p.readout, p.step) == (one.readout, one.step)
        assert p.train_loss == pytest.approx((one.train_loss + other.train_loss) / 2, rel=1e-4)
        assert p.val_top1 == pytest.approx((one.val_top1 + other.val_top1) / 2, abs=1 / len(w))


class StopsAt(progress):
    """Ctrl-C after a number of steps."""

    def __init__(self, step, stream):
        super().__init__(60, "probe", "steps", stream=stream)
        self.last = step

    def advance(self, n=1):
        super().advance(n)
        if self.done == self.last:
            raise KeyboardInterrupt


def pooled(split):
    train, y, val, w = split
    tokens = [
        {"cls_reg_learned": part["cls"], "cls_reg_attn": part["cls"], "cls": part["cls"]} for part in (train, val)
    ]
    return tokens[0], y, tokens[1], w


@pytest.mark.parametrize("step", [1, 31, 59])
def test_training_resumed_after_an_interrupt_gives_the_same_bytes(split, tmp_path, step):
    told, data = io.StringIO(), pooled(split)

    def train(name, **how):
        training = train_probes(*data, CLASSES, RATES, 60, 32, seeds=(0, 1), channels=8, **how)
        save_probes(tmp_path / name, training.probes)
        return training

    undisturbed = train("undisturbed")
    with pytest.raises(KeyboardInterrupt):
        train("never", work=tmp_path / "work", save_every=0, progress=StopsAt(step, told))
    saved = 3 * (step // 3)  # 20 points in 60 steps
    assert f"interrupted: {saved} of 60 steps are safe in {tmp_path / 'work'}" in told.getvalue()
    resumed = train("resumed", work=tmp_path / "work", progress=StopsAt(99, told))
    assert (f"resumed: {saved} of 60 steps were done" in told.getvalue()) == (saved > 0)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "undisturbed").read_bytes()
    assert resumed.curves == undisturbed.curves


def test_a_checkpoint_of_other_settings_or_data_or_a_damaged_one_is_not_gone_on_from(split, tmp_path):
    train, y, val, w = split
    train_probes(train, y, val, w, CLASSES, RATES, 60, 32, work=tmp_path, save_every=0)
    for change in ({"momentum": 0.5}, {"seeds": (7,)}, {"train": {**train, "cls": train["cls"] + 1}}):
        told, given = io.StringIO(), {"train": train, "momentum": 0.9, "seeds": (0,), **change}
        again = given.pop("train"), y, val, w, CLASSES, RATES, 60, 32
        found = train_probes(*again, **given, work=tmp_path, progress=StopsAt(99, told))
        assert f"started anew: the checkpoint in {tmp_path} is of other data, settings or code" in told.getvalue()
        assert np.array_equal(found.probes.probes["cls"][0].weight,
                              train_probes(*again, **given).probes.probes["cls"][0].weight)  # fmt: skip
    (tmp_path / CHECKPOINT).write_bytes(b"torn")
    told = io.StringIO()
    train_probes(train, y, val, w, CLASSES, RATES, 60, 32, work=tmp_path, progress=StopsAt(99, told))
    assert "started anew: the checkpoint" in told.getvalue() and "is damaged" in told.getvalue()


def test_training_that_is_short_writes_no_checkpoint(split, tmp_path):
    train, y, val, w = split
    train_probes(train, y, val, w, CLASSES, RATES, 20, 32, work=tmp_path / "work")
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["lock"]


def test_saved_probes_come_back_as_they_were(split, tmp_path):
    train, y, val, w = pooled(split)
    probes = train_probes(train, y, val, w, CLASSES, RATES, 30, 32, seeds=(1, 2), channels=8).probes
    logistic = Probe("cls", np.ones((7, 24), np.float32), np.zeros(7, np.float32), None, 3, seed=None, C=0.1)
    probes = replace(
        probes, logistic={"cls": logistic}, knn={"cls": Neighbours(20, 0.07, 9)}, origin={"run": "original", "n": [1]}
    )
    save_probes(tmp_path / "probes.safetensors", probes)
    loaded = load_probes(tmp_path / "probes.safetensors")
    assert list(loaded.probes) == list(probes.probes) == list(train)
    assert (loaded.classes, loaded.learning_rates, loaded.steps, loaded.seeds) == (CLASSES, RATES, 30, (1, 2))
    assert loaded.knn == probes.knn and loaded.origin == probes.origin and loaded.schedule == "cosine"
    for name, of_seeds in probes.probes.items():
        for one, other in zip(loaded.probes[name], of_seeds, strict=True):
            assert (one.learning_rate, one.seed, one.val_correct) == (
                other.learning_rate,
                other.seed,
                other.val_correct,
            )
            assert np.array_equal(one.logits(val[name]), other.logits(val[name]))
    assert loaded.logistic["cls"].C == 0.1 and loaded.logistic["cls"].learning_rate is None
    assert np.array_equal(loaded.logistic["cls"].logits(val["cls"]), logistic.logits(val["cls"]))


@pytest.mark.parametrize("name", ["cls_reg_learned", "cls_reg_attn"])
def test_a_probe_that_pools_embeds_by_its_formula(name):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(5, 4, 3)).astype(np.float32)  # CLS and three registers of three channels
    pool = rng.normal(size=3).astype(np.float32)
    probe = Probe(name, rng.normal(size=(2, 6)).astype(np.float32), np.zeros(2, np.float32), 0.1, 1, 0, None, pool, 3)
    for image, found in zip(tokens, probe.embed(tokens.reshape(5, 12)), strict=True):
        scores = pool if name == "cls_reg_learned" else [register @ pool / 3**0.5 for register in image[1:]]
        shares = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(found, np.r_[image[0], shares @ image[1:]], rtol=1e-5)
    with pytest.raises(ValueError, match=rf"features of shape \(5, 9\) do not fit .*'{name}', which takes \(b, 12\)"):
        probe.logits(tokens[:, 1:].reshape(5, 9))


def test_exported_weights_take_raw_features_also_where_the_mean_dwarfs_the_deviation(split):
    train, y, val, w = split
    x, v = train["cls"] + 1000, val["cls"] + 1000
    training = train_probes({"cls": x}, y, {"cls": v}, w, CLASSES, RATES, 100)
    probe = training.probes.probes["cls"][0]
    last = {p.learning_rate: p.val_top1 for p in training.curves if p.step == 100}
    assert (probe.logits(v).argmax(1) == w).sum() == pytest.approx(probe.val_correct, abs=1)
    assert last[probe.learning_rate] == pytest.approx(probe.val_correct / len(w))


def test_the_head_is_chosen_on_validation_not_on_training():
    x, y = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0), np.repeat([0, 1], 10)
    wrong = 1 - y  # on validation whoever learned what training teaches is always wrong
    never_learns = 1e-50  # 0 in float32: such a head says class 0 to everything, right for half of them
    training = train_probes({"cls": x}, y, {"cls": x}, wrong, "ab", (never_learns, 0.1), 50)
    end = {p.learning_rate: p for p in training.curves if p.step == 50}
    assert end[0.1].train_loss < end[never_learns].train_loss and end[0.1].val_top1 == 0
    assert training.probes.probes["cls"][0].learning_rate == never_learns
    assert training.probes.probes["cls"][0].val_correct == 10


def test_the_winner_has_the_best_validation_accuracy_and_the_smallest_rate_of_equals(split):
    train, y, val, w = split
    training = train_probes(train, y, val, w, CLASSES, RATES[::-1], 60)  # order given must not decide
    for name, (probe,) in training.probes.probes.items():
        end = {p.learning_rate: p.val_top1 for p in training.curves if p.readout == name and p.step == 60}
        assert probe.learning_rate == min(rate for rate, top1 in end.items() if top1 == max(end.values()))
        assert probe.val_correct / len(w) == pytest.approx(max(end.values()))


def test_a_diverged_head_is_never_chosen_and_only_diverged_heads_are_an_error(split):
    train, y, val, w = ({"cls": part["cls"]} if isinstance(part, dict) else part for part in split)
    training = train_probes(train, y, val, w, CLASSES, (1e-2, 1e38), 50)
    assert training.probes.probes["cls"][0].learning_rate == 1e-2
    assert max(p.train_loss for p in training.curves if p.learning_rate == 1e38) == np.inf
    with pytest.raises(
        ValueError, match=r"all 1 heads of readout 'cls' diverged; the smallest learning rate was 1e\+38"
    ):
        train_probes(train, y, val, w, CLASSES, [1e38], 50)


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_curves_end_at_the_last_step_and_start_at_the_loss_of_chance(split, steps):
    train, y, val, w = split
    training = train_probes({"cls": train["cls"]}, y, {"cls": val["cls"]}, w, CLASSES, [1e-4], steps)
    seen = [p.step for p in training.curves]
    assert seen[-1] == steps and len(seen) == min(steps, 20) and seen == sorted(set(seen))
    assert training.curves[0].train_loss == pytest.approx(np.log(7), abs=0.01)


def test_constant_features_give_the_prior_and_no_nan():
    x, y = np.full((40, 3), 2.0, np.float32), np.array([0] * 30 + [1] * 10)
    probe = train_probes({"cls": x}, y, {"cls": x[:4]}, np.zeros(4, int), "ab", [0.1], 300).probes.probes["cls"][0]
    logits = probe.logits(x[:1])[0]
    assert logits[0] - logits[1] == pytest.approx(np.log(3), abs=1e-2)


def test_each_step_is_reported(split):
    train, y, val, w = split
    with progress(9, None) as bar:
        train_probes(train, y, val, w, CLASSES, RATES, 9, progress=bar)
    assert bar.done == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros(20, int)}, "all 20 training images are of class 0; a probe needs images of at least 2 classes"),
        ({"y": np.r_[-1, np.ones(19, int)]}, "the train split has 1 images without a label"),
        ({"w": np.full(5, 7)}, "the val split has label 7; a probe needs class indices 0 to 6"),
        ({"w": np.zeros(0, int), "v": np.zeros((0, 4))}, "the val split is empty"),
        ({"x": np.zeros((19, 4))}, r"train features of shape \(19, 4\); expected \(20, channels\)"),
        ({"x": np.full((20, 4), np.nan)}, "20 of 20 train rows are not finite"),
        ({"v": np.zeros((5, 3))}, "readout 'cls' has 4 channels in train, 3 in val"),
        ({"rates": []}, r"learning_rates are \[\]; expected at least one"),
        ({"rates": [0.1, 0.1]}, r"learning_rates are \[0.1, 0.1\]; expected at least one, each once"),
        ({"rates": [0.0]}, r"learning_rates are \[0.0\]; expected finite numbers above 0"),
        ({"steps": 0}, "steps is 0 and batch_size 256; expected at least 1 of each"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; expected a finite number"),
        ({"momentum": 1.0}, "momentum is 1.0; expected a number of 0 or above, below 1"),
        ({"schedule": "linear"}, "schedule is 'linear'; expected one of cosine, constant"),
        ({"seeds": ()}, r"seeds are \[\]; expected at least one, each once"),
        ({"seeds": (1, 1)}, r"seeds are \[1, 1\]; expected at least one, each once"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "x": np.ones((20, 4)),
        "y": np.arange(20) % 7,
        "v": np.ones((5, 4)),
        "w": np.zeros(5, int),
        "rates": [0.1],
        **change,
    }
    settings = {key: given[key] for key in SETTINGS if key in given}
    with pytest.raises(ValueError, match=message):
        train_probes(
            {"cls": given["x"]}, given["y"], {"cls": given["v"]}, given["w"], CLASSES, given["rates"], **settings
        )


def test_readouts_of_train_and_val_must_be_the_same(split):
    train, y, val, w = split
    with pytest.raises(ValueError, match=r"train has the readouts \['cls'\] and val \['patch_mean'\]"):
        train_probes({"cls": train["cls"]}, y, {"patch_mean": val["patch_mean"]}, w, CLASSES, RATES)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (None, "readout 'cls_reg_attn' holds several tokens; give channels, the width of one"),
        (7, "readout 'cls_reg_attn' has 24 channels and channels is 7; expected CLS and at least one register"),
        (24, "readout 'cls_reg_attn' has 24 channels and channels is 24; expected CLS and at least one register"),
    ],
)
def test_pooling_needs_to_know_the_width_of_a_token(split, channels, message):
    train, y, val, w = split
    with pytest.raises(ValueError, match=message):
        train_probes(
            {"cls_reg_attn": train["cls"]}, y, {"cls_reg_attn": val["cls"]}, w, CLASSES, RATES, channels=channels
        )


def test_features_of_another_width_are_refused(split):
    train, y, val, w = split
    probe = train_probes({"cls": train["cls"]}, y, {"cls": val["cls"]}, w, CLASSES, RATES, 5).probes.probes["cls"][0]
    with pytest.raises(ValueError, match=r"features of shape \(150, 48\) do not fit the probe of readout 'cls', .*24"):
        probe.logits(val["cls_patch"])


def test_files_that_hold_no_probes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the probe stage"):
        load_probes(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InvalidProbes, match="is no safetensors file"):
        load_probes(tmp_path / "text")
    save_file({"w": np.zeros(2)}, tmp_path / "other")
    with pytest.raises(InvalidProbes, match="has no 'regvit_probes' in its metadata"):
        load_probes(tmp_path / "other")
    save_file({"w": np.zeros(2)}, tmp_path / "later", metadata={"regvit_probes": json.dumps({"format_version": 9})})
    with pytest.raises(InvalidProbes, match="has probes format 9, this version reads 2; run the probe stage again"):
        load_probes(tmp_path / "later")
    save_file({"w": np.zeros(2)}, tmp_path / "earlier", metadata={"regvit_probes": json.dumps({"format_version": 1})})
    with pytest.raises(InvalidProbes, match="has probes format 1, this version reads 2; run the probe stage again"):
        load_probes(tmp_path / "earlier")
