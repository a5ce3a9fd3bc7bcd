import dataclasses
import json

import pytest
import timm
import torch

from regvit import TokenLayout
from regvit.data.decoding import Transform
from regvit.models.backbones import load_backbone, save_backbone
from regvit.models.hooks import output_projection, watch_inputs
from regvit.registers.controls import silence
from regvit.registers.neurons import Neuron
from regvit.registers.runs import describe_run, open_run, read_run

TRANSFORM = Transform(160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SELECTED = {1: (3, 5)}


@pytest.fixture
def folder(tmp_path):
    """data/backbones with one small backbone, `tiny`."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    save_backbone(
        tmp_path / "tiny", model, name="tiny", architecture="test_vit", model_args={"num_classes": 0},
        transform=TRANSFORM, source="random weights", licence="MIT",
    )  # fmt: skip
    return tmp_path


def write(folder, run: dict):
    path = folder / "run.json"
    path.write_text(json.dumps(run))
    return path


def test_a_test_time_run_opens_with_its_registers(folder):
    run = describe_run("cured", load_backbone(folder / "tiny"), "test_time", 2, SELECTED)
    opened = open_run(write(folder, run), folder)
    assert TokenLayout.of(opened.model) == TokenLayout(1, 0, 2)
    assert opened.model.blocks[1].mlp.fc2.register_neurons.tolist() == [3, 5]


def test_a_run_without_registers_is_the_plain_backbone_and_knows_no_neurons(folder):
    backbone = load_backbone(folder / "tiny")
    run = describe_run("original", backbone, "none", 0, SELECTED)
    assert run["neurons"] is None
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(open_run(write(folder, run), folder).model(x), backbone.model(x))


def test_the_description_does_not_change_with_what_the_run_does_not_use(folder):
    backbone = load_backbone(folder / "tiny")
    plain = describe_run("original", backbone, "none", 0, SELECTED, scale=2.0)
    assert plain == describe_run("original", backbone, "none", 0, {}, statistic="reference")


def test_a_backbone_that_changed_is_refused(folder):
    run = describe_run("original", load_backbone(folder / "tiny"), "none", 0, {})
    with pytest.raises(ValueError, match="was composed of 000000000000…; run the compose stage again"):
        open_run(write(folder, run | {"weights_sha256": "0" * 64}), folder)


def test_an_incomplete_description_is_refused(folder):
    with pytest.raises(ValueError, match=r"lacks backbone, neurons"):
        open_run(write(folder, {"run": "x", "weights_sha256": "", "registers": "none", "num_registers": 0}), folder)


@pytest.mark.parametrize(
    ("registers", "count", "message"),
    [
        ("trained", 4, "num_registers is 4, but backbone tiny was trained with 0"),
        ("test_time", 0, "need num_registers of 1 or more, got 0"),
        ("none", 2, "num_registers must be 0, got 2"),
        ("some", 0, "registers is 'some'; expected one of none, trained, test_time"),
    ],
)
def test_a_variant_that_does_not_fit_is_refused(folder, registers, count, message):
    with pytest.raises(ValueError, match=message):
        describe_run("r", load_backbone(folder / "tiny"), registers, count, SELECTED)


def test_trained_registers_are_counted(folder):
    backbone = load_backbone(folder / "tiny")
    model = timm.create_model("test_vit2", pretrained=False).eval()
    run = describe_run("trained_reg", dataclasses.replace(backbone, model=model), "trained", 1, {})
    assert run["neurons"] is None


def test_another_transform_is_another_run(folder):
    backbone = load_backbone(folder / "tiny")
    other = dataclasses.replace(backbone, transform=dataclasses.replace(TRANSFORM, crop_pct=0.9))
    assert describe_run("r", backbone, "none", 0, {}) != describe_run("r", other, "none", 0, {})


def test_a_run_that_is_no_control_keeps_the_keys_that_it_always_had(folder):
    run = describe_run("cured", load_backbone(folder / "tiny"), "test_time", 1, SELECTED, neurons="selected")
    assert list(run) == [
        "run", "backbone", "weights_sha256", "transform", "registers", "num_registers", "statistic", "patches",
        "scale", "neurons",
    ]  # fmt: skip


def test_a_random_control_moves_as_many_other_neurons_and_says_so(folder):
    backbone = load_backbone(folder / "tiny")
    run = describe_run("control", backbone, "test_time", 1, SELECTED, neurons="random", neurons_seed=4)
    assert (run["control"], run["neurons_seed"], run["registers"]) == ("random", 4, "test_time")
    units = run["neurons"]["1"]
    assert len(units) == 2
    assert not set(units) & {3, 5}
    opened = open_run(write(folder, run), folder)
    assert opened.model.blocks[1].mlp.fc2.register_neurons.tolist() == units
    assert run != describe_run("control", backbone, "test_time", 1, SELECTED, neurons="random", neurons_seed=5)


def test_a_control_of_equal_activation_takes_its_neurons_from_the_candidates(folder):
    candidates = [Neuron(1, 3, 2.0, 0.5), Neuron(1, 5, 3.0, 0.4), Neuron(1, 8, 3.5, 0.0), Neuron(1, 9, 1.5, 0.0)]
    run = describe_run(
        "control", load_backbone(folder / "tiny"), "test_time", 1, SELECTED,
        neurons="same_activation", candidates=candidates,
    )  # fmt: skip
    assert run["neurons"] == {"1": [8, 9]}
    assert run["control"] == "same_activation"
    assert "neurons_seed" not in run


@torch.no_grad()
def test_an_ablated_run_has_no_register_and_its_neurons_are_zero_at_the_patches(folder):
    backbone = load_backbone(folder / "tiny")
    run = describe_run("control", backbone, "none", 0, SELECTED, neurons="ablated")
    assert (run["control"], run["neurons"], run["statistic"]) == ("ablated", {"1": [3, 5]}, None)
    opened = open_run(write(folder, run), folder).model
    assert TokenLayout.of(opened) == TokenLayout(1, 0, 0)
    seen = {}
    for name, model in (("ablated", opened), ("plain", backbone.model)):
        x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
        with watch_inputs({1: output_projection(model.blocks[1])}, lambda _, a, name=name: seen.update({name: a})):
            model.forward_features(x)
    assert torch.equal(seen["ablated"], silence(seen["plain"], torch.tensor([3, 5]), TokenLayout(1, 0, 0)))
    assert seen["plain"][:, 1:, [3, 5]].abs().max() > 0


@torch.no_grad()
def test_an_empty_control_has_its_registers_and_moves_nothing(folder):
    backbone = load_backbone(folder / "tiny")
    run = describe_run("control", backbone, "test_time", 2, SELECTED, neurons="empty")
    assert (run["control"], run["neurons"], run["num_registers"]) == ("empty", {}, 2)
    opened = open_run(write(folder, run), folder).model
    assert TokenLayout.of(opened) == TokenLayout(1, 0, 2)
    assert not any("register_neurons" in name for name, _ in opened.named_buffers())


def test_a_control_of_a_backbone_without_outliers_has_nothing_to_move(folder):
    run = describe_run("control", load_backbone(folder / "tiny"), "test_time", 1, {}, neurons="random")
    assert run["neurons"] == {}
    assert TokenLayout.of(open_run(write(folder, run), folder).model).test_time == 1


@pytest.mark.parametrize(
    ("registers", "count", "neurons", "message"),
    [
        ("none", 0, "random", "neurons is 'random', which needs registers: test_time, but registers is 'none'"),
        ("test_time", 1, "ablated", "neurons is 'ablated', which needs registers: none, but registers is 'test_time'"),
        (
            "test_time",
            1,
            "other",
            "neurons is 'other'; expected one of selected, empty, random, same_activation, ablated",
        ),
    ],
)
def test_a_control_that_does_not_fit_the_variant_is_refused(folder, registers, count, neurons, message):
    with pytest.raises(ValueError, match=message):
        describe_run("r", load_backbone(folder / "tiny"), registers, count, SELECTED, neurons=neurons)


@pytest.mark.parametrize(
    ("content", "said"), [(b"[1]", "holds a list"), (b"{", "is no run.json: "), (b"\xff\xfe\x00", "is no run.json: ")]
)
def test_a_file_that_is_no_run_is_refused_by_name(tmp_path, content, said):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_run(tmp_path / "run.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_run(tmp_path / "none.json")
