"""Readouts read when they are asked for, against readouts of whole arrays."""

import numpy as np
import pytest
from made_stores import READOUTS, of_two_classes

from regvit.features.readouts import readout
from regvit.features.store import FeatureStore, InvalidStore
from regvit.features.stored_readouts import StoredReadout, blocks, stored_readouts


@pytest.fixture
def store(tmp_path):
    return of_two_classes(tmp_path / "x.zarr")


@pytest.mark.parametrize("name", READOUTS)
def test_slices_and_rows_are_those_of_the_whole_readout_bit_for_bit(store, name):
    rows = np.flatnonzero(np.arange(100) % 3 != 1)
    whole, some = readout(store, name)[rows], stored_readouts(store, [name], rows)[name]
    assert isinstance(some, StoredReadout) and some.shape == whole.shape and len(some) == len(whole)
    mixed = np.random.default_rng(0).permutation(len(rows))[:40]
    assert some[mixed].tobytes() == whole[mixed].tobytes()
    assert some[5:37].tobytes() == whole[5:37].tobytes()
    assert np.asarray(some).tobytes() == whole.tobytes() and some[:].dtype == np.float32
    assert np.concatenate([some[part] for part in blocks(len(some), 7)]).tobytes() == whole.tobytes()


def test_a_projected_control_differs_by_rounding_only(store):
    some = stored_readouts(store, ["cls_random"], np.arange(100))["cls_random"]
    np.testing.assert_allclose(some[np.array([70, 3])], readout(store, "cls_random")[[70, 3]], rtol=1e-6, atol=1e-7)


def test_a_pass_reads_each_unit_once_for_all_readouts(store, monkeypatch):
    read, plain = [], FeatureStore.read_rows
    monkeypatch.setattr(FeatureStore, "read_rows", lambda *a: read.append(a[1:]) or plain(*a))
    values = stored_readouts(store, ["cls", "cls_patch"], np.arange(100))
    for part in blocks(100, 10):
        for each in values.values():
            each[part]
    assert sorted(read) == sorted((array, u, min(u + 16, 100)) for array in ("cls", "patch_mean")
                                  for u in range(0, 100, 16))  # fmt: skip


def test_rows_out_of_order_are_refused(store):
    with pytest.raises(ValueError, match="rows are not in ascending order, each once; sort them"):
        stored_readouts(store, ["cls"], np.array([3, 2]))


def test_a_chunk_cut_short_is_named(store):
    some = stored_readouts(store, ["cls"], np.arange(100))["cls"]
    chunk = store.path / "cls" / "c.1.0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(InvalidStore, match=r"c\.1\.0 ends before row 15; `dvc pull` it"):
        some[np.array([31])]


def test_the_identity_changes_with_rows_name_and_content(store):
    def identity(name, rows):
        return stored_readouts(store, [name], rows)[name].identity()

    own = identity("cls", np.arange(9))
    assert own == identity("cls", np.arange(9))
    assert len({own, identity("cls_reg", np.arange(9)), identity("cls", np.arange(8))}) == 3
    chunk = store.path / "cls" / "c.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-4] + b"else")
    assert identity("cls", np.arange(9)) != own


def test_no_more_than_two_units_of_an_array_are_held_in_a_pass(store):
    some = stored_readouts(store, ["cls"], np.arange(100))["cls"]
    for part in blocks(100, 8):
        some[part]
    held = some._reader._last["cls"][1].nbytes + some._reader._unit["cls"][1].nbytes
    assert held <= 2 * 16 * 6 * 2
