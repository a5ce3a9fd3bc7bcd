"""Numbers that are none, and settings that make no sense, stop with what is wrong named, and before long work."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from regvit.data.manifest import InvalidManifest, Row, read_dataset, write_dataset
from regvit.data.transform import Transform
from regvit.features.extraction import Options, fill_store
from regvit.features.forward import Forward, Readouts
from regvit.models.backbones import Backbone, load_backbone, save_backbone
from regvit.models.checkpoints import WeightsError
from regvit.models.nan_check import BadFeatures
from regvit.models.sources import build
from regvit.probing.probes import save_probes
from regvit.probing.splits import Split
from regvit.probing.training import Settings, train_probes
from regvit.registers.neurons import find_register_neurons
from regvit.registers.neurons_file import NeuronsFile
from regvit.registers.outliers import patch_norms, settle_detection
from regvit.registers.run_files import Variant, describe_run
from regvit.registers.test_time import add_test_time_registers
from regvit.stats.accuracy import accuracy

HALF = (0.5, 0.5, 0.5)
ARGS = {"num_classes": 0, "img_size": 32, "dynamic_img_size": True}


def model_of(seed=0, size=32):
    torch.manual_seed(seed)
    return timm.create_model("test_vit", pretrained=False, **ARGS | {"img_size": size}).eval().requires_grad_(False)


def backbone_of(model, size=32):
    return Backbone("tiny", model, Transform(size, HALF, HALF), "w" * 64, None, {"architecture": "test_vit"})


def dataset_of(folder, count=5):
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"images/{i}.png")
    write_dataset(folder, "noise", [Row(f"n{i}", f"images/{i}.png", "x", "train") for i in range(count)], ["x"], {})
    return read_dataset(folder)


def run(folder, backbone, dataset, precision="float32", **options):
    forward = Forward(backbone, Readouts(), precision)
    return fill_store(folder / "x.zarr", dataset, forward, {}, Options(**options), rows_per_unit=2)


# Weights.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["blocks.2.mlp.fc1.weight", "pos_embed", "norm.bias"])
def test_weights_with_one_bad_number_are_refused_naming_the_tensor_wherever_they_come_in(tmp_path, name, value):
    model = model_of()
    model.state_dict()[name].view(-1)[3] = value
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    said = rf"{name} has 1 of {model.state_dict()[name].numel()} values NaN or infinite; get the weights again"
    with pytest.raises(WeightsError, match=said):
        build(f"file:{tmp_path / 'weights.pt'}", "test_vit", 32)
    with pytest.raises(WeightsError, match=said):
        save_backbone(tmp_path / "b", model, name="b", architecture="test_vit", model_args=ARGS,
                      transform=Transform(32, HALF, HALF), source="s", licence="l")  # fmt: skip
    assert not (tmp_path / "b/weights.safetensors").exists()


def test_a_model_that_overflows_names_the_layer_and_the_image():
    model = model_of()
    model.blocks[3].mlp.fc2.weight.fill_(3e38)
    with pytest.raises(ValueError, match="patch norms are not finite in layer 3 for image 0; check weights and images"):
        patch_norms(model, [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))])


# Features.


def loud(model, factor):
    """The model with its last norm's scale raised."""
    model.norm.weight.mul_(factor)
    return model


def test_features_beyond_float16_stop_with_image_array_and_value(tmp_path):
    dataset = dataset_of(tmp_path / "set")
    with pytest.raises(BadFeatures, match=r"image 'n0' \(images/0\.png\): array 'cls', row 0: .* is beyond float16"):
        run(tmp_path, backbone_of(loud(model_of(), 1e6)), dataset)
    assert not (tmp_path / "x.zarr").exists()


def test_arithmetic_in_float16_that_overflows_inside_of_the_model_is_caught(tmp_path):
    """Activations overflow to infinity in a block and come out as NaN, which no later step turns into a number."""
    dataset, model = dataset_of(tmp_path / "set"), model_of()
    model.blocks[2].mlp.fc1.weight.mul_(1e5)
    model.blocks[2].mlp.fc2.weight.mul_(1e3)
    with pytest.raises(
        BadFeatures,
        match=r"image 'n0' .*nan is not a finite number; it begins in layer 2; .* set extract.precision to float32",
    ):
        run(tmp_path, backbone_of(model), dataset, "float16")
    run(tmp_path / "again", backbone_of(model), dataset)  # float32 holds it


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("split", ["train", "val"])
def test_probes_refuse_features_that_are_not_numbers_naming_readout_and_split(value, split):
    rng = np.random.default_rng(0)
    data = {
        name: Split({"cls": rng.normal(size=(8, 4)).astype(np.float32)}, np.arange(8) % 2) for name in ("train", "val")
    }
    data[split].features["cls"][5, 2] = value
    with pytest.raises(ValueError, match=f"readout 'cls': 1 of 8 {split} rows are not finite; extract them again"):
        train_probes(data["train"], data["val"], ("a", "b"), Settings((0.1,), 5))


# Sets and classes that are nearly nothing.


def test_a_set_of_one_image_goes_through_extraction(tmp_path):
    dataset = dataset_of(tmp_path / "set", 1)
    store = run(tmp_path, backbone_of(model_of()), dataset)
    assert len(store) == 1 and store.read("cls").shape == (1, 64)


def test_a_class_without_an_image_in_training_is_never_an_error_and_a_set_of_one_class_is():
    rng = np.random.default_rng(0)
    features, labels = {"cls": rng.normal(size=(12, 4)).astype(np.float32)}, np.array([0, 2] * 6)
    part, classes = Split(features, labels), ("a", "none of these", "b")
    (probe,) = train_probes(part, part, classes, Settings((0.1,), 20)).probes["cls"]
    assert probe.logits(features["cls"]).shape == (12, 3)
    with pytest.raises(ValueError, match="all 12 training images are of class 0; a probe needs images of at least 2"):
        train_probes(Split(features, labels * 0), part, classes, Settings((0.1,), 20))


@pytest.mark.parametrize("empty", ["train", "val"])
def test_a_split_without_an_image_is_named(empty):
    whole = Split({"cls": np.ones((4, 2), np.float32)}, np.array([0, 1, 0, 1]))
    none = Split({"cls": np.ones((0, 2), np.float32)}, np.array([], dtype=int))
    data = (none, whole) if empty == "train" else (whole, none)
    with pytest.raises(ValueError, match=f"the {empty} split is empty; give some images"):
        train_probes(*data, ("a", "b"), Settings((0.1,), 5))


def test_a_class_that_is_listed_twice_or_has_no_name_is_refused(tmp_path):
    for classes in (("a", "a"), ("a", "")):
        with pytest.raises(InvalidManifest, match=r"twice|empty name"):
            write_dataset(tmp_path / "x", "x", [Row("1", "1.png", "a", "test")], classes, {})
    assert not (tmp_path / "x").exists()


def test_a_search_in_one_image_works_and_one_in_none_is_refused():
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert find_register_neurons(model_of(), images, layer=3).outlier_fraction.shape == (1,)
    with pytest.raises(ValueError, match="no images to measure patch norms on"):
        find_register_neurons(model_of(), [])


def test_a_threshold_under_which_no_patch_lies_is_refused_and_one_that_none_reaches_selects_nothing():
    model, images = model_of(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="all of the 16 patches are outliers, so nothing is left to compare them with"):
        find_register_neurons(model, images, threshold=1e-6, layer=3)
    assert find_register_neurons(model, images, threshold=1e9, layer=3).selected == {}


# Registers and layers.


@pytest.mark.parametrize("count", [4, 5, 64])
def test_more_registers_than_patches_are_odd_and_work(tmp_path, count):
    """Each further register is a copy of the first; nothing in the arithmetic needs fewer of them than patches (4)."""
    backbone = backbone_of(model_of())
    add_test_time_registers(backbone.model, {1: [0, 5]}, count)
    store = run(tmp_path, backbone, dataset_of(tmp_path / "set"))
    registers = store.read("registers")
    assert registers.shape == (5, count, 64)
    np.testing.assert_allclose(registers, registers[:, :1].repeat(count, 1), atol=2e-3)


@pytest.mark.parametrize(
    ("neurons", "count", "said"),
    [
        ({12: [0]}, 1, r"layer 12 is out of range: the model has 6 blocks \(0 to 5\)"),
        ({-1: [0]}, 1, "layer -1 is out of range"),
        ({1: [9999]}, 1, "neuron 9999 of layer 1 is out of range"),
        ({1: [0]}, -1, "num_registers is -1; expected 0 to 64"),
        ({1: [0]}, 65, "num_registers is 65; expected 0 to 64: one holds what all outliers carry"),
        ({1: [0]}, 1_000_000_000, "num_registers is 1000000000; expected 0 to 64"),
    ],
)
def test_neurons_out_of_range_leave_the_model_as_it_was(neurons, count, said):
    model, images = model_of(), torch.ones(1, 3, 32, 32)
    before = model.forward_features(images)
    with pytest.raises(ValueError, match=said):
        add_test_time_registers(model, neurons, count)
    assert torch.equal(model.forward_features(images), before)


@pytest.mark.parametrize("layer", [6, 99, -7])
def test_a_layer_out_of_range_is_refused(layer):
    norms = np.random.default_rng(0).random((6, 3, 4)).astype(np.float32) + 1
    with pytest.raises(
        ValueError, match=rf"layer {layer} is out of range: the model has 6 blocks \(0 to 5, or -6 to -1"
    ):
        settle_detection(norms, 1.5, layer)


def test_a_layer_out_of_range_is_refused_before_the_images_are_gone_through():
    seen = []

    class Counting(list):
        def __iter__(self):
            seen.append(1)
            return super().__iter__()

    batches = Counting([torch.ones(1, 3, 32, 32)] * 3)
    for options in ({"layer": 6, "threshold": 1.0}, {"layer": -7}, {"max_layer": 6}, {"threshold": 3.0}):
        with pytest.raises(ValueError, match=r"out of range|needs its layer"):
            find_register_neurons(model_of(), batches, **options)
    assert len(seen) <= 4  # `iter` is called once by the check that they can be gone through twice


def test_a_run_with_a_number_of_registers_that_makes_no_sense_is_refused():
    info = {"name": "tiny", "trained_registers": 0, "weights_sha256": "0" * 64, "transform": {}, "mlp_widths": [4, 4]}
    for registers, count in (("test_time", 0), ("test_time", -2), ("none", 1), ("trained", 4), ("some", 1)):
        with pytest.raises(ValueError, match="run r: "):
            describe_run("r", info, Variant(registers, count), NeuronsFile({1: (0,)}))


# The same again.


def test_the_same_inputs_give_the_same_bytes_twice(tmp_path):
    rng = np.random.default_rng(0)
    features = {"cls": rng.normal(size=(40, 8)).astype(np.float32)}
    labels = np.arange(40) % 2
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        part = Split(features, labels)
        probes = train_probes(part, part, ("a", "b"), Settings((0.01, 0.1), 50, seeds=(0, 1)))
        save_probes(tmp_path / name / "probes.safetensors", probes)
        found = find_register_neurons(
            model_of(), torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)), layer=3
        )
        (tmp_path / name / "neurons.json").write_text(found.to_json())
        estimate = accuracy(probes.probes["cls"][0].logits(features["cls"]).argmax(1) == labels)
        (tmp_path / name / "metrics.json").write_text(json.dumps(vars(estimate)))
        save_backbone(tmp_path / name / "b", model_of(), name="b", architecture="test_vit", model_args=ARGS,
                      transform=Transform(32, HALF, HALF), source="s", licence="l")  # fmt: skip
        assert load_backbone(tmp_path / name / "b").name == "b"
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
