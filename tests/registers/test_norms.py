import numpy as np
import pytest
import torch

from regvit.registers import norms
from regvit.registers.norms import LayerNorms, NormCounter

CPU = torch.device("cpu")


def two_modes(layers: int = 2, images: int = 40, patches: int = 50) -> torch.Tensor:
    """Log-normal norms, of which one in a hundred is thirty times as large."""
    rng = np.random.default_rng(0)
    values = rng.lognormal(0.5, 0.2, size=(layers, images, patches))
    values[:, :, 0] *= np.where(rng.random((layers, images)) < 0.5, 30, 1)
    return torch.from_numpy(values.astype(np.float32))


def counted(values: torch.Tensor, batch: int) -> tuple[LayerNorms, ...]:
    counter = NormCounter(len(values), CPU)
    for part in values.split(batch, dim=1):
        counter.add(part)
    return counter.result()


def test_few_norms_are_kept_as_they_are():
    values = two_modes()
    for layer, found in enumerate(counted(values, 7)):
        expected = values[layer].numpy().ravel()
        assert found.size == 2000
        assert np.array_equal(found.lows, np.sort(expected)) and np.array_equal(found.highs, found.lows)
        assert found.max() == expected.max()
        assert found.median() == pytest.approx(np.median(expected), rel=1e-6)
        assert found.mean() == pytest.approx(expected.mean(), rel=1e-6)
        assert found.quantile(0.99) == pytest.approx(np.quantile(expected, 0.99), rel=1e-6)


def test_many_norms_are_counted_in_bins_that_are_finer_than_a_fifth_of_a_percent(monkeypatch):
    monkeypatch.setattr(norms, "ONE_BY_ONE", 300)
    values = two_modes()
    for layer, found in enumerate(counted(values, 7)):
        expected = values[layer].numpy().ravel()
        assert len(found.counts) < found.size == 2000
        assert (found.highs[:-1] < found.lows[1:]).all()
        assert (found.highs <= 1.002 * found.lows).all()
        assert (found.max(), found.lows[0]) == (expected.max(), expected.min())
        assert found.mean() == pytest.approx(expected.mean(), rel=1e-3)
        for q in (0, 0.01, 0.5, 0.99, 1):
            assert found.quantile(q) == pytest.approx(np.quantile(expected, q), rel=2e-3)
        for low, high, count in zip(found.lows, found.highs, found.counts, strict=True):
            assert ((expected >= low) & (expected <= high)).sum() == count


@pytest.mark.parametrize("limit", [300, 10**5])
def test_neither_batches_nor_the_order_of_images_change_anything(limit, monkeypatch):
    monkeypatch.setattr(norms, "ONE_BY_ONE", limit)
    values = two_modes()
    first = counted(values, 40)
    for other in (counted(values, 1), counted(values.flip(1), 6)):
        for one, two in zip(first, other, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))


@pytest.mark.parametrize("limit", [300, 10**5])
def test_later_images_may_show_fewer_layers_and_never_more(limit, monkeypatch):
    monkeypatch.setattr(norms, "ONE_BY_ONE", limit)
    values = two_modes(layers=3)
    counter = NormCounter(3, CPU)
    counter.add(values[:, :4])
    for part in values[:2, 4:].split(9, dim=1):
        counter.add(part)
    found = counter.result()
    assert [layer.size for layer in found] == [2000, 2000, 200]
    assert found[1].max() == values[1].max() and found[2].max() == values[2, :4].max()
    with pytest.raises(ValueError, match="norms of 3 layers come after norms of fewer"):
        counter.add(values[:, :1])


def test_norms_beyond_the_bins_are_counted_in_the_outermost_ones(monkeypatch):
    monkeypatch.setattr(norms, "ONE_BY_ONE", 1)
    values = torch.tensor([0.0, 1e-30, 1.0, 1e30, 3e30]).view(1, 1, 5)
    (found,) = counted(values, 1)
    assert found.counts.tolist() == [2, 1, 2]
    assert found.lows.tolist() == [0.0, 1.0, values[0, 0, 3].item()] and found.max() == values.max()


def test_the_counter_takes_no_more_memory_for_more_images(monkeypatch):
    monkeypatch.setattr(norms, "ONE_BY_ONE", 300)
    counter = NormCounter(2, CPU)

    def held() -> int:
        return sum(v.numel() * v.itemsize for v in vars(counter).values() if isinstance(v, torch.Tensor))

    counter.add(two_modes())
    before = held()
    for _ in range(5):
        counter.add(two_modes())
    assert held() == before


def test_no_norms_are_an_error():
    with pytest.raises(ValueError, match="no images to measure patch norms on; give at least one batch"):
        NormCounter(2, CPU).result()
