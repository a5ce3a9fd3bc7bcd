import json

import pytest
import timm
import torch

from regvit import TokenLayout
from regvit.data.transform import Transform
from regvit.models.backbones import load_backbone, save_backbone
from regvit.registers.controls import ablated
from regvit.registers.cures.cure import add_cure
from regvit.registers.neurons import RegisterNeurons
from regvit.registers.neurons_file import Neuron, NeuronsFile
from regvit.registers.outliers import Detection
from regvit.registers.run_files import Variant, changes_backbone, describe_run, measures_images, read_run
from regvit.registers.runs import measured_for, open_run, open_uncured
from regvit.registers.search import SearchOptions
from regvit.registers.test_time import add_test_time_registers

TRANSFORM = Transform(160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SELECTED = {1: (3, 5)}
FOUND = NeuronsFile(SELECTED)


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


def described(folder, registers: str, num_registers: int, searched=FOUND, name="r", **more) -> dict:
    info = json.loads((folder / "tiny/backbone.json").read_text())
    return describe_run(name, info, Variant(registers, num_registers, **more), searched)


def test_a_test_time_run_opens_with_its_registers(folder):
    opened = open_run(write(folder, described(folder, "test_time", 2)), folder)
    assert TokenLayout.of(opened.model) == TokenLayout(1, 0, 2)
    assert opened.model.blocks[1].mlp.fc2.register_neurons.tolist() == [3, 5]


def test_a_run_without_registers_is_the_plain_backbone_and_knows_no_neurons(folder):
    run = described(folder, "none", 0)
    assert run["neurons"] is None
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        plain = load_backbone(folder / "tiny").model(x)
        assert torch.equal(open_run(write(folder, run), folder).model(x), plain)


def test_the_description_does_not_change_with_what_the_run_does_not_use(folder):
    unused = described(folder, "none", 0, NeuronsFile({}), statistic="reference")
    assert described(folder, "none", 0, scale=2.0) == unused


def test_a_backbone_that_changed_and_an_incomplete_description_are_refused(folder):
    run = described(folder, "none", 0)
    with pytest.raises(ValueError, match="was composed of 000000000000…; run the compose stage again"):
        open_run(write(folder, run | {"weights_sha256": "0" * 64}), folder)
    with pytest.raises(ValueError, match=r"lacks backbone, detection, neurons"):
        open_run(
            write(folder, {key: run[key] for key in ("run", "weights_sha256", "registers", "num_registers")}), folder
        )


def test_trained_registers_are_counted_and_cannot_be_left_out(folder):
    info = json.loads((folder / "tiny/backbone.json").read_text()) | {"trained_registers": 1}
    assert describe_run("r", info, Variant("trained", 1), NeuronsFile({}))["neurons"] is None
    with pytest.raises(ValueError, match="cannot be left out; set registers: trained, num_registers: 1"):
        describe_run("r", info, Variant("none", 0), NeuronsFile({}))


def test_a_random_control_moves_as_many_other_neurons_and_says_so(folder):
    run = described(folder, "test_time", 1, neurons="random", neurons_seed=4)
    assert (run["control"], run["neurons_seed"], run["registers"]) == ("random", 4, "test_time")
    units = run["neurons"]["1"]
    assert len(units) == 2
    assert not set(units) & {3, 5}
    opened = open_run(write(folder, run), folder)
    assert opened.model.blocks[1].mlp.fc2.register_neurons.tolist() == units
    assert run != described(folder, "test_time", 1, neurons="random", neurons_seed=5)


def test_a_run_may_take_its_neurons_from_a_file(folder, tmp_path):
    (tmp_path / "table.json").write_text("[[1, 7, 0.9], [0, 2, 0.8], [1, 4, 0.7]]")
    run = described(folder, "test_time", 1, neurons=f"file:{tmp_path}/table.json?top_k=2")
    assert run["neurons"] == {"0": [2], "1": [7]} and "control" not in run
    assert run["table"]["name"] == "table.json" and len(run["table"]["sha256"]) == 64
    opened = open_run(write(folder, run), folder)
    assert opened.model.blocks[0].mlp.fc2.register_neurons.tolist() == [2]
    (tmp_path / "table.json").write_text("[[1, 700, 0.9]]")
    with pytest.raises(
        ValueError, match="neuron 700 of layer 1, but backbone tiny has 192 in that layer: it is a table of an"
    ):
        described(folder, "test_time", 1, neurons=f"file:{tmp_path}/table.json")
    with pytest.raises(ValueError, match="'file:x', which needs registers: test_time, but registers is 'none'"):
        described(folder, "none", 0, neurons="file:x")


def test_a_control_of_equal_activation_takes_its_neurons_from_the_candidates(folder):
    candidates = (Neuron(1, 3, 2.0, 0.5), Neuron(1, 5, 3.0, 0.4), Neuron(1, 8, 3.5, 0.0), Neuron(1, 9, 1.5, 0.0))
    searched = NeuronsFile(SELECTED, candidates=candidates)
    run = described(folder, "test_time", 1, searched, neurons="same_activation")
    assert run["neurons"] == {"1": [8, 9]}
    assert run["control"] == "same_activation"
    assert "neurons_seed" not in run


def test_an_empty_control_and_one_of_a_backbone_without_outliers_have_registers_and_move_nothing(folder):
    for searched, neurons in ((FOUND, "empty"), (NeuronsFile({}), "random")):
        run = described(folder, "test_time", 2, searched, neurons=neurons)
        assert (run["control"], run["neurons"], run["num_registers"]) == (neurons, {}, 2)
        opened = open_run(write(folder, run), folder).model
        assert TokenLayout.of(opened) == TokenLayout(1, 0, 2)
        assert not any("register_neurons" in name for name, _ in opened.named_buffers())


@torch.no_grad()
def test_an_ablated_run_has_no_register_and_its_neurons_are_silent(folder):
    run = described(folder, "none", 0, neurons="ablated")
    assert (run["control"], run["neurons"], run["statistic"]) == ("ablated", {"1": [3, 5]}, None)
    opened = open_run(write(folder, run), folder).model
    assert TokenLayout.of(opened) == TokenLayout(1, 0, 0)
    x, plain = torch.randn(2, 3, 160, 160), load_backbone(folder / "tiny").model
    with ablated(plain, SELECTED):
        assert torch.equal(opened(x), plain(x))


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"[1]", "holds a list"), (b"{", "describes no run: "), (b"\xff\xfe\x00", "describes no run: ")],
)
def test_a_file_that_is_no_run_is_refused_by_name(tmp_path, content, said):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_run(tmp_path / "run.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_run(tmp_path / "none.json")


DETECTED = NeuronsFile(SELECTED, {"layer": 1, "threshold": 5.0})


@pytest.mark.parametrize("cure", ["clip_norm", {"name": "mask_attention", "queries": "cls"}, "ablate"])
def test_a_cured_run_opens_as_the_backbone_with_that_cure(folder, cure):
    run = described(folder, "none", 0, DETECTED, cure=cure)
    assert changes_backbone(run)
    assert not measures_images(run)
    x, plain = torch.randn(2, 3, 160, 160), load_backbone(folder / "tiny").model
    found = RegisterNeurons(Detection(1, 5.0, 1.0), (), selected=SELECTED)
    with torch.no_grad():
        untreated = plain(x)
        with add_cure(plain, cure, found):
            expected = plain(x)
        opened = open_run(write(folder, run), folder)
        assert torch.equal(opened.model(x), expected)
        assert not torch.equal(expected, untreated)


def test_what_a_cure_measures_stands_in_the_file_of_the_run(folder):
    run = described(folder, "test_time", 1, DETECTED, cure={"name": "constant_registers", "content": "noise"})
    assert measures_images(run)
    x = torch.randn(4, 3, 160, 160)
    run["cure"]["measured"] = measured_for(run, open_uncured(run, folder), x.split(2), SearchOptions())
    plain = load_backbone(folder / "tiny").model
    add_test_time_registers(plain, SELECTED, 1)
    with torch.no_grad(), add_cure(plain, "constant_registers", images=x, content="noise"):
        expected = plain.forward_features(x)
        assert torch.equal(open_run(write(folder, run), folder).model.forward_features(x), expected)


@pytest.mark.parametrize(
    ("registers", "count", "more", "message"),
    [
        ("trained", 4, {}, "num_registers is 4, but backbone tiny was trained with 0"),
        ("test_time", 0, {}, "need num_registers of 1 or more, got 0"),
        ("none", 0, {"neurons": "random"}, "neurons is 'random', which needs registers: test_time, but registers is 'none'"),
        ("test_time", 1, {"neurons": "ablated"}, "'ablated', which needs registers: none, but registers is 'test_time'"),
        ("test_time", 1, {"neurons": "other"}, "expected one of selected, empty, random, same_activation, ablated, or file:<path>"),
        ("none", 0, {"cure": "masked"}, "cure is 'masked'"),
        ("none", 0, {"cure": "constant_registers"}, "cure constant_registers needs registers: trained or test_time"),
        ("test_time", 1, {"cure": "ablate"}, "cure ablate treats the neurons that test-time registers hold"),
        ("test_time", 1, {"cure": "clip_norm", "neurons": "empty"}, "cure clip_norm and neurons empty exclude each other"),
    ],
)  # fmt: skip
def test_a_variant_or_cure_that_does_not_fit_is_refused_and_the_run_named(folder, registers, count, more, message):
    with pytest.raises(ValueError, match=f"^run r: .*{message}"):
        described(folder, registers, count, **more)
