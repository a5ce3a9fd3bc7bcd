"""Readouts read when they are asked for, against readouts of whole arrays."""

import os

import numpy as np
import pytest

from regvit.features import stored
from regvit.features.readouts import InMemory, readout
from regvit.features.store import FeatureStore, InvalidStore
from regvit.features.store_writer import StoreWriter
from regvit.features.stored import StoredReadout, blocks, stored_readouts
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
    shapes = {name: values.shape[1:] for name, values in arrays.items()}
    with StoreWriter(tmp_path / "x.zarr", tmp_path / "x.partial", 100, shapes, {"run": "r"}, 16) as writer:
        for unit in writer.missing_units():
            start, stop = writer.unit_rows(unit)
            writer.write(unit, {name: values[start:stop] for name, values in arrays.items()})
        writer.finish()
    return FeatureStore.open(tmp_path / "x.zarr")


@pytest.mark.parametrize("name", NAMES)
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


def test_arrays_in_memory_stay_arrays(store):
    held = InMemory({"cls": store.read("cls")})
    assert isinstance(stored_readouts(held, ["cls"], np.arange(3))["cls"], np.ndarray)


def test_a_pass_reads_each_unit_once_for_all_readouts(store, monkeypatch):
    read, plain = [], FeatureStore.read_rows
    monkeypatch.setattr(FeatureStore, "read_rows", lambda *a: read.append(a[1:]) or plain(*a))
    values = stored_readouts(store, ["cls", "cls_patch"], np.arange(100))
    for part in blocks(100, 10):
        for each in values.values():
            each[part]
    assert sorted(read) == sorted((array, u, min(u + 16, 100)) for array in ("cls", "patch_mean")
                                  for u in range(0, 100, 16))  # fmt: skip


def test_a_pass_goes_in_blocks_of_the_size_that_the_module_says_now(monkeypatch):
    monkeypatch.setattr(stored, "ROWS_AT_ONCE", 3)
    assert list(blocks(7)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(blocks(7, 5)) == [slice(0, 5), slice(5, 7)]


def test_few_files_are_open_at_once(store, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (0, 0))  # the least: 16
    some = stored_readouts(store, ["cls_reg", "patch_mean"], np.arange(100))
    before = len(os.listdir("/proc/self/fd"))
    for each in some.values():
        each[np.arange(0, 100, 5)]
    assert 0 < len(os.listdir("/proc/self/fd")) - before <= 16
    del some, each
    assert len(os.listdir("/proc/self/fd")) == before


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


# --- training from a store


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


def test_no_more_than_two_units_of_an_array_are_held_in_a_pass(store):
    some = stored_readouts(store, ["cls"], np.arange(100))["cls"]
    for part in blocks(100, 8):
        some[part]
    held = some._reader._last["cls"][1].nbytes + some._reader._unit["cls"][1].nbytes
    assert held <= 2 * 16 * 6 * 2
    assert stored.ROWS_AT_ONCE == 4096
