import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regvit.models.hooks import blocks
from regvit.registers import search as module
from regvit.registers.outliers import Detection, detect, patch_norms, settle_detection
from regvit.registers.planting import plant
from regvit.registers.search import SearchOptions, picked, search

IMAGES = 60


@pytest.fixture(scope="module")
def planted(tiny_vit, noise_images):
    """A tiny model with planted register neurons, and images; the outliers' norms differ from image to image."""
    model, images = tiny_vit(1), noise_images(IMAGES)
    plant(model, images, seed_layer=2, amplifier_layer=3, fraction=0.05, edit_keys=True)
    strength = torch.linspace(0.2, 1.4, IMAGES)[torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))]
    return model, images * strength[:, None, None, None]


def two_passes(model, images, detection):
    """Both scores and the share of outliers in float64, from all activations held at once."""
    acts = []
    handles = [
        block.mlp.fc2.register_forward_pre_hook(lambda _, a: acts.append(a[0][:, 1:].double()))
        for block in blocks(model)[: detection.layer + 1]
    ]
    with torch.no_grad():
        x = model.forward_intermediates(
            images, indices=[detection.layer], intermediates_only=True, output_fmt="NLC", stop_early=True
        )[0].double()
    for handle in handles:
        handle.remove()
    outliers = torch.from_numpy(patch_norms(model, [images], [detection.layer])[0] > detection.threshold)
    weight = outliers / outliers.sum(1, keepdim=True).clamp_min(1)
    excess = x[outliers].mean(0) - x[~outliers].mean(0)
    activation, attribution = [], []
    for block, a in zip(blocks(model), acts, strict=False):
        activation.append((a.abs() * weight[..., None]).sum((0, 1)) / outliers.any(1).sum())
        gap = a[outliers].mean(0) - a[~outliers].mean(0)
        attribution.append(gap * (excess @ block.mlp.fc2.weight.double()) / (excess @ excess))
    return torch.stack(activation), torch.stack(attribution), outliers.double().mean(1).numpy()


def assert_as_in_two_passes(model, images, found):
    activation, attribution, fraction = two_passes(model, images, found.detection)
    torch.testing.assert_close(found.scores.activation, activation, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.scores.attribution, attribution, rtol=1e-4, atol=1e-7)
    assert np.array_equal(found.outlier_fraction, fraction)


@pytest.mark.parametrize(("settle_on", "batch"), [(1, 60), (3, 4), (10, 7), (59, 60), (60, 7), (100, 4)])
def test_one_pass_finds_what_two_passes_find_however_many_images_settle_the_layer(
    planted, settle_on, batch, monkeypatch
):
    model, images = planted
    monkeypatch.setattr(module, "SETTLE_ON", settle_on)
    found = search(model, images.split(batch), SearchOptions())
    expected = detect(patch_norms(model, [images]))
    assert found.detection.layer == expected.layer
    assert found.detection.threshold == pytest.approx(expected.threshold, rel=1e-5)
    assert_as_in_two_passes(model, images, found)
    assert settle_on >= IMAGES or min(settle_on, IMAGES) <= found.again


@pytest.mark.parametrize("quantile", [0.95, 0.98, 0.995, 1.0])
def test_images_that_the_first_threshold_took_wrongly_are_gone_through_again(planted, quantile, monkeypatch):
    """The first threshold takes too many patches for outliers, or too few, or none at all."""
    model, images = planted
    norms = patch_norms(model, [images])
    right = detect(norms)
    first = float(np.quantile(norms[right.layer], quantile))
    monkeypatch.setattr(module, "SETTLE_ON", 8)
    monkeypatch.setattr(module, "settle_detection", lambda *_: Detection(right.layer, first, 0.5))
    found = search(model, images.split(7), SearchOptions())
    low, high = sorted([first, right.threshold])
    wrong = ((norms[right.layer] > low) & (norms[right.layer] <= high))[8:].any(1).sum()
    assert wrong > 0, "the case that is tested"
    assert found.again == 8 + wrong
    assert found.detection.threshold == pytest.approx(right.threshold, rel=1e-5)
    assert_as_in_two_passes(model, images, found)


def test_where_all_images_contradict_the_first_they_are_gone_through_again(planted, monkeypatch):
    model, images = planted
    right = detect(patch_norms(model, [images]))
    monkeypatch.setattr(module, "SETTLE_ON", 8)
    monkeypatch.setattr(module, "settle_detection", lambda *_: Detection(right.layer + 1, 1.0, 0.5))
    found = search(model, images.split(7), SearchOptions())
    assert found.detection.layer == right.layer
    assert found.again == IMAGES
    assert [layer.size for layer in found.norms] == [IMAGES * 64] * 6  # nothing stops early then
    assert_as_in_two_passes(model, images, found)


def test_outliers_that_the_first_images_lack_are_found_in_the_end(planted, monkeypatch):
    model, images = planted
    sizes = []

    def none_at_first(norms, *given):
        sizes.append(norms[0].size)
        return None if len(sizes) == 1 else settle_detection(norms, *given)

    monkeypatch.setattr(module, "SETTLE_ON", 8)
    monkeypatch.setattr(module, "settle_detection", none_at_first)
    found = search(model, images.split(7), SearchOptions())
    assert sizes == [8 * 64, IMAGES * 64]
    assert found.detection.layer == detect(patch_norms(model, [images])).layer
    assert found.again == IMAGES
    assert_as_in_two_passes(model, images, found)


def test_a_model_without_outliers_is_gone_through_once(tiny_vit, noise_images, monkeypatch):
    monkeypatch.setattr(module, "SETTLE_ON", 8)
    found = search(tiny_vit(1), noise_images(20).split(7), SearchOptions())
    assert (found.detection, found.scores, found.again) == (None, None, 0)
    assert found.outlier_fraction.tolist() == [0.0] * 20
    assert [cells.size for cells in found.norms] == [20 * 64] * 6


@pytest.mark.parametrize("layer", [4, -2])
def test_with_a_given_layer_and_threshold_no_image_is_gone_through_twice(planted, layer, monkeypatch):
    model, images = planted
    monkeypatch.setattr(module, "SETTLE_ON", 8)
    threshold = float(np.quantile(patch_norms(model, [images], [4]), 0.99))
    found = search(model, images.split(7), SearchOptions(threshold, layer))
    assert (found.detection.layer, found.detection.threshold, found.again) == (4, threshold, 0)
    assert_as_in_two_passes(model, images, found)
    assert search(model, images.split(7), SearchOptions(1e9, layer)).detection is None


def test_with_a_given_layer_the_threshold_is_that_of_all_images(planted, monkeypatch):
    model, images = planted
    monkeypatch.setattr(module, "SETTLE_ON", 8)
    found = search(model, images.split(7), SearchOptions(layer=2))
    expected = settle_detection(patch_norms(model, [images]), None, 2)
    assert found.detection.layer == 2
    assert found.detection.threshold == pytest.approx(expected.threshold, rel=1e-5)
    assert_as_in_two_passes(model, images, found)


def test_the_forward_stops_at_the_detection_layer_once_it_is_settled(planted, monkeypatch):
    model, images = planted
    monkeypatch.setattr(module, "SETTLE_ON", 8)
    seen = dict.fromkeys(range(6), 0)
    handles = [
        block.register_forward_pre_hook(lambda _, a, i=i: seen.__setitem__(i, seen[i] + len(a[0])))
        for i, block in enumerate(blocks(model))
    ]
    found = search(model, images.split(7), SearchOptions())
    for handle in handles:
        handle.remove()
    layer = found.detection.layer
    assert seen == {i: IMAGES + found.again if i <= layer else 8 for i in range(6)}
    assert [cells.size for cells in found.norms] == [64 * (IMAGES if i <= layer else 8) for i in range(6)]


def test_the_size_of_a_batch_changes_nothing_but_the_last_digits(planted, monkeypatch):
    model, images = planted
    monkeypatch.setattr(module, "SETTLE_ON", 10)
    one, other = search(model, images.split(60), SearchOptions()), search(model, images.split(1), SearchOptions())
    assert one.again == other.again
    assert [a.size for a in one.norms] == [b.size for b in other.norms]
    torch.testing.assert_close(one.scores.attribution, other.scores.attribution, rtol=1e-4, atol=1e-8)


def test_large_batches_are_taken_in_parts_whose_activations_fit(planted, monkeypatch):
    model, images = planted
    whole = search(model, [images], SearchOptions())
    kept = []
    monkeypatch.setattr(module, "SETTLE_ON", 8)
    monkeypatch.setattr(module, "KEPT_BYTES", 2**20)
    look = module._Look.__init__

    def counting(self, go, part, depth):
        look(self, go, part, depth)
        kept.append(sum(a.numel() * a.itemsize for a in self.activations))

    monkeypatch.setattr(module._Look, "__init__", counting)
    parted = search(model, [images], SearchOptions())
    assert 0 < max(kept) <= 2**20 < 4 * max(kept)
    assert parted.detection.threshold == pytest.approx(whole.detection.threshold, rel=1e-5)
    torch.testing.assert_close(parted.scores.attribution, whole.scores.attribution, rtol=1e-4, atol=1e-8)


def test_many_norms_in_bins_give_the_same_outliers(planted, monkeypatch):
    model, images = planted
    exact = search(model, images.split(7), SearchOptions())
    monkeypatch.setattr("regvit.registers.norms.ONE_BY_ONE", 500)
    binned = search(model, images.split(7), SearchOptions())
    assert len(binned.norms[0].counts) < binned.norms[0].size
    assert binned.detection.layer == exact.detection.layer
    assert binned.detection.threshold == pytest.approx(exact.detection.threshold, rel=2e-3)
    assert_as_in_two_passes(model, images, binned)


class Operations(TorchDispatchMode):
    """Names of torch's operations, as they run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit", [500, 10**5], ids=["norms in bins", "norms one by one"])
def test_nothing_in_the_loop_would_make_a_gpu_wait(planted, limit, monkeypatch):
    """Operations whose result, or its size, the host must know before it goes on."""
    waiting = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique_dim",
        "_unique2",
        "is_nonzero",
        "equal",
        "item",
    }
    model, images = planted
    monkeypatch.setattr("regvit.registers.norms.ONE_BY_ONE", limit)
    monkeypatch.setattr(module, "SETTLE_ON", 8)
    detection = detect(patch_norms(model, [images]))
    go = module._Pass(model, SearchOptions(), detection)
    with torch.inference_mode():
        go.add(images[:8])  # parts of one image until their size is known
        go.sums._few = False
        with Operations() as seen:
            go.add(images[8:20])
            go.add(images[20:32])
    assert {"amin", "sum", "scatter_add_" if limit == 500 else "copy_"} <= seen.names
    assert not seen.names & waiting
    with torch.inference_mode(), Operations() as seen:
        torch.ones(3).nonzero()
        torch.ones(1).item()
    assert {"nonzero", "item"} <= seen.names  # it would be seen


def test_images_of_several_sizes_are_refused(tiny_vit):
    model = tiny_vit(0, dynamic_img_size=True)
    batches = [torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)]
    with pytest.raises(ValueError, match="an image of 16 patches comes after images of 64; give images of one size"):
        search(model, batches, SearchOptions())


def test_norms_that_are_not_finite_are_named_by_layer_and_image(planted, tiny_vit, noise_images):
    model, images = tiny_vit(1), noise_images(5)
    images[3] = float("nan")
    with pytest.raises(ValueError, match="patch norms are not finite in layer 0 for image 3; check weights and images"):
        search(model, images.split(2), SearchOptions())


class Selecting(list):
    """Batches that know which images they hold; going through all of them again is noted."""

    def __init__(self, images, batch):
        super().__init__(images.split(batch))
        self.images, self.gone_through, self.selected = images, 0, []

    def __iter__(self):
        self.gone_through += 1
        return super().__iter__()

    def select(self, rows):
        self.selected.append(rows)
        return self.images[rows].split(3)


def test_batches_that_can_select_are_gone_through_once(planted, monkeypatch):
    model, images = planted
    monkeypatch.setattr(module, "SETTLE_ON", 8)
    batches = Selecting(images, 7)
    found = search(model, batches, SearchOptions())
    assert batches.gone_through == 1
    assert len(batches.selected) == 1 and len(batches.selected[0]) == found.again
    assert_as_in_two_passes(model, images, found)


def test_picked_images_are_those_of_their_numbers():
    images = torch.arange(20.0).view(20, 1, 1, 1)
    rows = np.array([0, 4, 5, 13, 19])
    for batches in (images.split(6), [images], Selecting(images, 4)):
        got = list(picked(batches, rows))
        assert np.concatenate([numbers for numbers, _ in got]).tolist() == rows.tolist()
        assert torch.cat([batch for _, batch in got]).flatten().tolist() == rows.tolist()
    assert list(picked([images], rows[:0])) == []


def test_fewer_images_than_before_are_an_error():
    images = torch.zeros(20, 1, 1, 1)
    with pytest.raises(ValueError, match="20 images came, but 26 are wanted; give the same images again"):
        list(picked(images.split(6), np.array([3, 25])))
