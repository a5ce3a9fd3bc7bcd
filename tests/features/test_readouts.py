import numpy as np
import pytest
from scipy.stats import kstest

from regvit.features.readouts import InMemory, available, readout


class Store:
    def __init__(self, **values):
        self.values = {name: np.array(value, dtype=np.float32) for name, value in values.items()}
        self.arrays = {name: value.shape[1:] for name, value in self.values.items()}

    def read(self, name):
        return self.values[name]


@pytest.fixture
def store():
    return Store(cls=[[1, 2], [3, 4]], registers=[[[10, 60], [20, 40]], [[0, 0], [-4, 8]]], patch_mean=[[5, 6], [7, 8]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cls", [[1, 2], [3, 4]]),
        ("reg_mean", [[15, 50], [-2, 4]]),
        ("patch_mean", [[5, 6], [7, 8]]),
        ("cls_reg", [[1, 2, 15, 50], [3, 4, -2, 4]]),
        ("cls_patch", [[1, 2, 5, 6], [3, 4, 7, 8]]),
        ("cls_reg_max", [[1, 2, 20, 60], [3, 4, 0, 8]]),
        ("cls_reg_0", [[1, 2, 10, 60], [3, 4, 0, 0]]),
        ("cls_reg_1", [[1, 2, 20, 40], [3, 4, -4, 8]]),
        ("reg_1", [[20, 40], [-4, 8]]),
        ("reg_mean_1", [[10, 60], [0, 0]]),
        ("reg_mean_2", [[15, 50], [-2, 4]]),
        ("cls_reg_mean_1", [[1, 2, 10, 60], [3, 4, 0, 0]]),
        ("patch_reg", [[5, 6, 15, 50], [7, 8, -2, 4]]),
        ("cls_reg_learned", [[1, 2, 10, 60, 20, 40], [3, 4, 0, 0, -4, 8]]),
        ("cls_reg_attn", [[1, 2, 10, 60, 20, 40], [3, 4, 0, 0, -4, 8]]),
    ],
)
def test_each_readout_is_what_its_name_says(store, name, expected):
    features = readout(store, name)
    assert features.tolist() == expected and features.dtype == np.float32


def test_readouts_that_the_run_cannot_give_are_left_out_with_the_reason():
    found = available({"cls": (2,), "patch_mean": (2,)}, ["reg_mean", "cls_patch", "cls_reg_3", "cls"])
    assert found.names == ("cls_patch", "cls")
    assert found.left_out == dict.fromkeys(["reg_mean", "cls_reg_3"], "the run has no registers")


def test_a_backbone_without_cls_and_registers_keeps_its_patch_mean():
    found = available({"patch_mean": (2,)}, ["cls", "patch_mean", "cls_reg"])
    assert found.names == ("patch_mean",)
    assert found.left_out["cls"] == "its backbone has no CLS token"
    assert found.left_out["cls_reg"] == "its backbone has no CLS token and the run has no registers"


def test_a_register_beyond_the_last_is_left_out(store):
    reason = "register 2 is out of range (0 to 1)"
    asked = ["cls_reg_1", "cls_reg_2", "reg_2", "reg_mean_2", "reg_mean_3", "cls_reg_mean_3"]
    assert available(store.arrays, asked).left_out == dict.fromkeys(["cls_reg_2", "reg_2", "reg_mean_3", "cls_reg_mean_3"], reason)  # fmt: skip
    for unknown in ("reg_mean_0", "cls_reg_01", "patch_reg_1"):
        with pytest.raises(ValueError, match=f"readout '{unknown}' is unknown"):
            available(store.arrays, [unknown])


def test_pooling_a_single_register_is_left_out_as_it_would_be_cls_reg():
    found = available({"cls": (2,), "registers": (1, 2)}, ["cls_reg", "cls_reg_learned", "cls_reg_attn"])
    reason = "the run has one register, with which it would be cls_reg"
    assert found.names == ("cls_reg",) and found.left_out == {"cls_reg_learned": reason, "cls_reg_attn": reason}
    assert available({"cls": (2,)}, ["cls_reg_attn"]).left_out == {"cls_reg_attn": "the run has no registers"}


@pytest.fixture(scope="module")
def spread():
    rng = np.random.default_rng(0)
    cls = (rng.normal(size=(6000, 16)) * np.geomspace(0.1, 10, 16) + rng.normal(size=16)).astype(np.float32)
    return InMemory({"cls": cls, "registers": np.zeros((6000, 3, 16), np.float32)})


@pytest.mark.parametrize("name", ["cls_noise", "cls_random"])
def test_width_controls_are_as_wide_as_cls_reg_and_begin_with_cls(spread, name):
    control = readout(spread, name)
    assert control.shape == readout(spread, "cls_reg").shape and control.dtype == np.float32
    assert np.array_equal(control[:, :16], spread.read("cls"))
    assert np.array_equal(control, readout(spread, name))


def test_the_noise_is_normal_with_the_spread_of_each_channel_and_independent_of_cls(spread):
    cls = spread.read("cls")
    noise = (readout(spread, "cls_noise")[:, 16:] - cls) / cls.std(0)
    assert np.abs(noise.mean(0)).max() < 0.06 and np.abs(noise.std(0) - 1).max() < 0.04
    assert all(kstest(noise[:, i], "norm").pvalue > 1e-3 for i in range(16))
    between = np.corrcoef(np.concatenate([noise, cls], 1).T)
    assert np.abs(between[:16] - np.eye(32)[:16]).max() < 0.06


def test_the_noise_of_an_image_does_not_depend_on_its_row(spread):
    cls = spread.read("cls")
    turned = readout(InMemory({"cls": cls[::-1]}), "cls_noise")[::-1]
    np.testing.assert_allclose(turned, readout(spread, "cls_noise"), rtol=1e-4, atol=1e-4)
    near = cls + np.float32(1e-3)
    moved = readout(InMemory({"cls": near}), "cls_noise")[:, 16:] - near
    assert np.abs(np.corrcoef(moved[:, 5], readout(spread, "cls_noise")[:, 21] - cls[:, 5])[0, 1]) < 0.06


def test_the_random_projection_keeps_lengths_and_is_one_matrix(spread):
    cls, control = spread.read("cls"), readout(spread, "cls_random")
    matrix = np.linalg.lstsq(cls.astype(np.float64), control[:, 16:].astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(cls @ matrix, control[:, 16:], atol=1e-3)
    assert 0.7 < (matrix**2).sum(1).mean() < 1.3


def test_asking_for_what_cannot_be_made_is_an_error(store):
    with pytest.raises(ValueError, match=r"readout 'cls_reg_2' cannot be made: register 2 is out of range \(0 to 1\)"):
        readout(store, "cls_reg_2")


@pytest.mark.parametrize("name", ["cls_regs", "cls_reg_-1", "cls_reg_01"])
def test_an_unknown_readout_is_refused_with_the_nearest_name(name):
    with pytest.raises(ValueError, match=f"readout '{name}' is unknown; did you mean 'cls_reg"):
        available({"cls": (2,)}, [name])
