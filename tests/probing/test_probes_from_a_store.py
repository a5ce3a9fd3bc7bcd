"""Probes and neighbours of features that stay in their store, against those of arrays in memory."""

import numpy as np
import pytest
from made_stores import READOUTS, of_two_classes

from regvit.features.readouts import readout
from regvit.features.stored_readouts import stored_readouts
from regvit.probing import training
from regvit.probing.neighbours import Labelled, choose_neighbours
from regvit.probing.probes import save_probes
from regvit.probing.splits import Split
from regvit.probing.training import Settings, train_probes

LABELS, TRAIN = np.repeat([0, 1], 50), np.arange(100) % 4 != 3
SETTINGS = Settings((0.01, 0.1), 30, 16, seeds=(0, 1))


@pytest.fixture
def store(tmp_path):
    return of_two_classes(tmp_path / "x.zarr")


def from_store(store):
    return [
        Split(stored_readouts(store, READOUTS, np.flatnonzero(which)), LABELS[which], 6) for which in (TRAIN, ~TRAIN)
    ]


@pytest.mark.parametrize("available", [0, 2 * 25 * 4 * 200, 1 << 30], ids=["none held", "validation held", "all held"])
def test_probes_have_the_same_bytes_wherever_the_features_are(store, available, tmp_path, monkeypatch):
    arrays = {name: readout(store, name) for name in READOUTS}
    parts = [Split({name: x[which] for name, x in arrays.items()}, LABELS[which], 6) for which in (TRAIN, ~TRAIN)]
    save_probes(tmp_path / "expected", train_probes(*parts, "ab", SETTINGS))
    monkeypatch.setattr(training, "available", lambda device: available)
    save_probes(tmp_path / "found", train_probes(*from_store(store), "ab", SETTINGS))
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


def test_neighbours_of_a_store_are_those_of_its_arrays(store):
    rows = np.arange(0, 100, 2)
    some = stored_readouts(store, ["cls_reg"], rows)["cls_reg"]
    val = stored_readouts(store, ["cls_reg"], rows + 1)["cls_reg"]
    found = choose_neighbours(Labelled(some, LABELS[rows]), Labelled(val, LABELS[rows + 1]), 2, (3, 10))
    held = Labelled(some[:], LABELS[rows]), Labelled(val[:], LABELS[rows + 1])
    assert found == choose_neighbours(*held, 2, (3, 10))
