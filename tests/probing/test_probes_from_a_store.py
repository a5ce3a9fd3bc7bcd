"""Probes and neighbours of features that stay in their store, against those of arrays in memory."""

import numpy as np
import pytest

from regvit.features.readouts import readout
from regvit.features.store import FeatureStore
from regvit.features.store_writer import write_store
from regvit.features.stored_readouts import stored_readouts
from regvit.probing.heads import RowOrder
from regvit.probing.neighbours import choose_neighbours
from regvit.probing.probes import save_probes, train_probes

NAMES = ("cls", "reg_mean", "patch_mean", "cls_reg", "cls_patch", "cls_reg_max", "cls_reg_1", "cls_reg_learned",
         "cls_reg_attn", "cls_noise")  # fmt: skip


@pytest.fixture
def store(tmp_path):
    """100 rows in units of 16, the class in every array."""
    rng = np.random.default_rng(0)
    centre = np.repeat(np.eye(2, 6), 50, axis=0)  # sorted by class, as folders are
    arrays = {"cls": centre + 0.8 * rng.normal(size=(100, 6)), "patch_mean": rng.normal(size=(100, 6)),
              "registers": centre[:, None] + rng.normal(size=(100, 3, 6))}  # fmt: skip
    write_store(tmp_path / "x.zarr", arrays, {"run": "r"}, 16)
    return FeatureStore.open(tmp_path / "x.zarr")


def train(store, memory, names=NAMES, **more):
    labels, rows = np.repeat([0, 1], 50), np.arange(100) % 4 != 3
    parts = [stored_readouts(store, names, np.flatnonzero(which)) for which in (rows, ~rows)]
    return train_probes(parts[0], labels[rows], parts[1], labels[~rows], "ab", [0.01, 0.1], 30, 16, seeds=(0, 1),
                        channels=6, memory=memory, **more)  # fmt: skip


@pytest.mark.parametrize("memory", [0, 25 * 4 * 200, None], ids=["none held", "validation held", "all held"])
def test_probes_have_the_same_bytes_wherever_the_features_are(store, memory, tmp_path):
    labels, rows = np.repeat([0, 1], 50), np.arange(100) % 4 != 3
    arrays = {name: readout(store, name) for name in NAMES}
    parts = [{name: values[which] for name, values in arrays.items()} for which in (rows, ~rows)]
    expected = train_probes(parts[0], labels[rows], parts[1], labels[~rows], "ab", [0.01, 0.1], 30, 16, seeds=(0, 1),
                            channels=6)  # fmt: skip
    found = train(store, memory)
    assert found.curves == expected.curves
    for name, each in (("found", found), ("expected", expected)):
        save_probes(tmp_path / name, each.probes)
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


def test_an_interrupted_training_from_a_store_goes_on_to_the_same_probes(store, tmp_path):
    class Stop:
        def __init__(self, at):
            self.at, self.said = at, []

        def advance(self, n=1):
            self.at -= n
            if not self.at:
                raise KeyboardInterrupt

        def line(self, text):
            self.said.append(text)

        def skip(self, n):
            self.skipped = n

    with pytest.raises(KeyboardInterrupt):
        train(store, 0, ("cls_reg",), work=tmp_path / "w", save_every=0, progress=Stop(21))
    bar = Stop(-1)
    found = train(store, 0, ("cls_reg",), work=tmp_path / "w", save_every=0, progress=bar)
    assert 15 < bar.skipped <= 21 and any("resumed" in text for text in bar.said)
    expected = train(store, None, ("cls_reg",))
    assert found.curves == expected.curves
    pairs = zip(found.probes.probes["cls_reg"], expected.probes.probes["cls_reg"], strict=True)
    assert all(a.weight.tobytes() == b.weight.tobytes() for a, b in pairs)


def test_nothing_is_read_ahead_across_a_point_where_the_order_is_saved(store, monkeypatch):
    drawn, plain = [], RowOrder.next
    monkeypatch.setattr(RowOrder, "next", lambda self: drawn.append(self) or plain(self))
    saved = []
    monkeypatch.setattr(RowOrder, "state", lambda self: saved.append(len(drawn)) or {})
    monkeypatch.setattr("regvit.probing.checkpoints.Checkpoint.save_if_due", lambda self, state: state.tensors())
    train(store, 0, ("cls",))
    assert [count / 2 for count in saved[::2]] == sorted({-(-30 * (i + 1) // 20) for i in range(20)})


def test_neighbours_of_a_store_are_those_of_its_arrays(store):
    rows, labels = np.arange(0, 100, 2), np.repeat([0, 1], 50)
    some = stored_readouts(store, ["cls_reg"], rows)["cls_reg"]
    val = stored_readouts(store, ["cls_reg"], rows + 1)["cls_reg"]
    found = choose_neighbours(some, labels[rows], val, labels[rows + 1], 2, (3, 10))
    assert found == choose_neighbours(some[:], labels[rows], val[:], labels[rows + 1], 2, (3, 10))
