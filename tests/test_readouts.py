import numpy as np
import pytest

from regvit.readouts import READOUTS, available, read_all, readout


class Store:
    def __init__(self, **values):
        self.values = {name: np.array(value, dtype=np.float32) for name, value in values.items()}
        self.arrays = {name: value.shape[1:] for name, value in self.values.items()}
        self.read_names = []

    def read(self, name):
        self.read_names.append(name)
        return self.values[name]


@pytest.fixture
def store():
    return Store(
        cls=[[1, 2], [3, 4]],
        registers=[[[10, 60], [20, 40]], [[0, 0], [-4, 8]]],
        patch_mean=[[5, 6], [7, 8]],
    )


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
    ],
)
def test_each_readout_is_what_its_name_says(store, name, expected):
    features = readout(store, name)
    assert features.tolist() == expected and features.dtype == np.float32


def test_reading_all_reads_each_array_once(store):
    features = read_all(store, READOUTS)
    assert list(features) == list(READOUTS)
    assert sorted(store.read_names) == ["cls", "patch_mean", "registers"]
    assert all(np.array_equal(features[name], readout(store, name)) for name in READOUTS)


def test_reading_one_leaves_the_other_arrays_alone(store):
    read_all(store, ["cls"])
    assert store.read_names == ["cls"]


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
    assert available(store.arrays, ["cls_reg_1", "cls_reg_2"]).left_out == {
        "cls_reg_2": "register 2 is out of range (0 to 1)"
    }


def test_asking_for_what_cannot_be_made_is_an_error(store):
    with pytest.raises(ValueError, match=r"readout 'cls_reg_2' cannot be made: register 2 is out of range \(0 to 1\)"):
        readout(store, "cls_reg_2")
    with pytest.raises(ValueError, match="readout 'reg_mean' cannot be made: the run has no registers; leave it out"):
        readout(Store(cls=[[1, 2]]), "reg_mean")


@pytest.mark.parametrize("name", ["cls_regs", "cls_reg_", "cls_reg_-1", "cls_reg_01", "cls_reg_learned"])
def test_an_unknown_readout_is_refused_with_the_nearest_name(name):
    with pytest.raises(ValueError, match=f"readout '{name}' is unknown; did you mean 'cls_reg"):
        available({"cls": (2,)}, [name])


def test_a_readout_asked_for_twice_is_refused():
    with pytest.raises(ValueError, match="readout 'cls' is asked for twice"):
        available({"cls": (2,)}, ["cls", "cls"])
