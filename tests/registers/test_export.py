import copy
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from white_patches import LAYER, UNIT, picture, plant_one

from regvit.data.transform import Transform
from regvit.models.backbones import load_backbone, resized, save_backbone
from regvit.models.tokens import TokenLayout
from regvit.registers.cures.options import CURES
from regvit.registers.export import (
    TOLERANCE,
    TokenOutputs,
    _difference,
    bake,
    export,
    export_run,
    load,
    onnx_outputs,
    write_onnx,
    write_pt2,
)
from regvit.registers.neurons_file import NeuronsFile
from regvit.registers.outliers import patch_norms
from regvit.registers.run_files import Variant, describe_run, read_run
from regvit.registers.runs import measured_for, open_run, open_uncured
from regvit.registers.search import SearchOptions
from regvit.registers.test_time import add_test_time_registers, remove_test_time_registers

ARGS = {"num_classes": 0, "dynamic_img_size": True, "img_size": 64, "depth": 2, "embed_dim": 96}
NEURONS = {0: (3, 8), 1: (5,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone on disk: two blocks of timm's smallest plain ViT, at 64 px, random weights."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **ARGS).eval()
    path = tmp_path_factory.mktemp("backbones") / "small"
    transform = Transform(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    about = {"name": "small", "architecture": "vit_tiny_patch16_224", "model_args": ARGS, "transform": transform}
    save_backbone(path, model, **about, source="made here", licence="MIT")
    return path


def images(size: int = 64, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def hooked(folder, size: int = 64, num_registers: int = 1, **options) -> torch.nn.Module:
    model = resized(load_backbone(folder), size).model
    add_test_time_registers(model, NEURONS, num_registers, **options)
    return model


def expected(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tokens of the hooked model, sliced by hand: CLS, registers, patches."""
    count = model.test_time_registers.num_registers
    with torch.no_grad():
        tokens = model.forward_features(x)
        return {
            "pooled": model(x),
            "cls": tokens[:, 0],
            "registers": tokens[:, 1 : 1 + count],
            "patches": tokens[:, 1 + count :],
        }


MODELS = [
    ("test_vit", {}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "embed_dim": 96, "num_heads": 4, "depth": 2}),
    ("vit_giant_patch14_dinov2", {"img_size": 56, "embed_dim": 96, "num_heads": 4, "depth": 2}),  # SwiGLU
    ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}),  # a token after CLS
    ("naflexvit_base_patch16_gap", {"embed_dim": 96, "num_heads": 4, "depth": 2}),  # registers inserted before block 0
    ("vit_pe_core_tiny_patch16_384", {"depth": 2}),  # attention pooling over prefix tokens
    ("vit_base_patch16_siglip_224", {"img_size": 64, "embed_dim": 96, "num_heads": 4, "depth": 2}),  # no CLS
]


@pytest.mark.parametrize(("name", "kwargs"), MODELS, ids=[name for name, _ in MODELS])
def test_a_baked_model_gives_the_bits_of_the_hooked_one_and_has_no_hooks(name, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, **kwargs).eval()
    x = images(getattr(getattr(model, "patch_embed", None), "img_size", [96])[0], 2)
    add_test_time_registers(model, NEURONS, 2)
    state = copy.deepcopy(model.state_dict())
    plain = bake(model)
    with torch.no_grad():
        assert torch.equal(plain.forward_features(x), model.forward_features(x))
        assert torch.equal(plain(x), model(x))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())
    assert TokenLayout.of(plain) == TokenLayout.of(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="baked in and cannot be removed; open the backbone without them"):
        remove_test_time_registers(plain)
    with pytest.raises(ValueError, match="baked in already; bake takes a model after add_test_time_registers"):
        bake(plain)
    remove_test_time_registers(model)  # the original can still be given back
    with pytest.raises(ValueError, match="has no test-time registers"):
        bake(model)


@pytest.mark.parametrize(
    ("size", "options"), [(64, {}), (64, {"statistic": "reference", "patches": "mean", "scale": 0.5}), (96, {})]
)
def test_what_is_exported_opens_again_at_its_size_and_equals_the_hooked_model(folder, tmp_path, size, options):
    written = export(resized(load_backbone(folder), size), NEURONS, tmp_path / "out", 2, **options)
    opened = load(tmp_path / "out")
    want = expected(hooked(folder, size, num_registers=2, **options), images(size))
    with torch.no_grad():
        found = dict(zip(written.outputs, TokenOutputs(opened.model)(images(size)), strict=True))
    assert written.outputs == ("pooled", "cls", "registers", "patches")
    for name, value in want.items():
        assert torch.allclose(found[name], value, atol=1e-5), name
    assert found["registers"].shape[1] == 2 and found["patches"].shape[1] == (size // 16) ** 2
    assert opened.transform == resized(load_backbone(folder), size).transform
    assert resolve_data_config({}, model=opened.model)["input_size"] == (3, size, size)
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())


@pytest.fixture
def no_onnxscript(monkeypatch):
    """torch's older exporter, which traces, is taken."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))


@pytest.mark.usefixtures("no_onnxscript")
def test_onnx_runtime_gives_what_the_hooked_model_gives_for_one_image_and_for_three(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    written = export(load_backbone(folder), NEURONS, tmp_path / "out", onnx=True)
    want = expected(hooked(folder), images())
    for part in (slice(3), slice(1, 2)):
        found = onnx_outputs(tmp_path / "out" / "model.onnx", images()[part])
        for value, name in zip(found, written.outputs, strict=True):
            assert value.shape == want[name][part].shape
            assert torch.allclose(value, want[name][part], atol=1e-5), name
    assert not torch.allclose(*want["registers"][:2], atol=1e-3)  # each image has its own


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[TokenOutputs, torch.Tensor, torch.nn.Module]:
    """A baked model with a register neuron that makes outliers, images that have one each, and the model without."""
    torch.manual_seed(0)
    args = {"img_size": 64, "patch_size": 8, "depth": 3, "embed_dim": 64, "num_heads": 4, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **args).eval()
    x = torch.from_numpy(np.stack([picture(i) for i in range(12)])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        plant_one(model, x)
    plain = copy.deepcopy(model)
    add_test_time_registers(model, {LAYER: (UNIT,)})
    return TokenOutputs(bake(model)).eval(), x, plain


def program_outputs(path, x: torch.Tensor) -> list[torch.Tensor]:
    """What an exported program gives in a process that never sees this package."""
    torch.save(x, path.with_name("images.pt"))
    code = (
        f"import sys, torch; program = torch.export.load('{path.name}').module();"
        "torch.save(program(torch.load('images.pt')), 'outputs.pt');"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('regvit', 'timm')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=path.parent, check=True)
    return torch.load(path.with_name("outputs.pt"))


GRAPHS = {"onnx": (write_onnx, onnx_outputs), "pt2": (write_pt2, program_outputs)}


@pytest.mark.parametrize("graph", GRAPHS)
def test_on_images_with_outliers_a_graph_is_within_the_tolerance_of_each_outputs_largest_value(
    planted, tmp_path, graph
):
    (outputs, x, plain), (write, outputs_of) = planted, GRAPHS[graph]
    norms = patch_norms(plain, [x], [LAYER])[0]
    assert ((norms > 100).sum(1) == 1).all() and np.median(norms) < 10  # one outlier an image
    if graph == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    write(outputs, x[:3], tmp_path / "model")
    with torch.no_grad():
        wanted = outputs(x)
    for name, value, want in zip(outputs.names, outputs_of(tmp_path / "model", x), wanted, strict=True):
        assert (value - want).abs().max() <= TOLERANCE * want.abs().max(), name


def test_a_difference_is_a_share_of_the_largest_value_of_the_same_output():
    wanted = (torch.tensor([[2.0, -4.0]]), torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.1]]))
    found = (torch.tensor([[2.0, -4.1]]), torch.tensor([[1001.0, 0.0]]), torch.tensor([[0.1]]))
    assert _difference(lambda _: found, torch.zeros(1, 3, 2, 2), wanted) == pytest.approx(0.1 / 4)
    assert _difference(lambda _: (found[2] + 0.5,), torch.zeros(1, 3, 2, 2), wanted[2:]) == pytest.approx(0.5)


@pytest.mark.usefixtures("no_onnxscript")
def test_an_operation_that_the_tracing_exporter_lacks_is_told_with_the_cure(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    add_test_time_registers(model, NEURONS)
    with pytest.raises(RuntimeError, match=r"upsample_bicubic2d_aa.*pip install onnxscript"):
        write_onnx(TokenOutputs(bake(model)), images(192), tmp_path / "m.onnx")  # positions resampled in each forward


def test_without_the_package_onnx_it_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs the package onnx, which is not installed: pip install onnx"):
        export(load_backbone(folder), NEURONS, tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_an_earlier_one_and_nothing_else(folder, tmp_path):
    backbone = load_backbone(folder)
    assert export(backbone, NEURONS, tmp_path / "out", pt2=True).differences["pt2"] <= 1e-5
    assert (tmp_path / "out" / "model.pt2").is_file()
    export(backbone, {1: (5,)}, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "backbone.json",
        "registers.json",
        "weights.safetensors",
    ]
    assert json.loads((tmp_path / "out" / "registers.json").read_text())["neurons"] == {"1": [5]}
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out holds 'notes.txt', which is not of an export; give a new or empty"):
        export(backbone, NEURONS, tmp_path / "out")
    assert getattr(backbone.model, "test_time_registers", None) is None


def test_nothing_to_bake_in_is_refused(folder, tmp_path):
    for neurons, count, message in (({0: ()}, 1, "no register neurons are given"), (NEURONS, 0, "num_registers is 0")):
        with pytest.raises(ValueError, match=message):
            export(load_backbone(folder), neurons, tmp_path / "out", count)


QUICK = {"average_views": {"views": 2}, "interpolate_lof": {"neighbours": 5}, "remove_direction": {"samples": 300}}


def composed(folder, path, cure=None, registers="none", detection=True):
    """The description of a run of the small backbone, as the compose stage writes it; a few patches are its outliers."""
    norms = patch_norms(load_backbone(folder).model, [images()], [0])[0]
    found = {"layer": 0, "threshold": float(np.sort(norms, axis=None)[-4:-2].mean())} if detection else None
    if cure == "constant_registers":
        registers = "test_time"
    variant = Variant(registers, int(registers == "test_time"), cure=cure and {"name": cure, **QUICK.get(cure, {})})
    info = json.loads((folder / "backbone.json").read_text())
    run = describe_run("r", info, variant, NeuronsFile({0: (3, 8)} if detection else {}, found))
    if cure and detection and "images" in CURES[cure].needs:
        run["cure"]["measured"] = measured_for(run, open_uncured(run, folder.parent), [images()], SearchOptions())
    path.write_text(json.dumps(run))
    return read_run(path)


@pytest.mark.parametrize("cure", CURES)
def test_a_run_with_a_cure_is_exported_and_opens_again_to_the_bit(folder, tmp_path, cure):
    run = composed(folder, tmp_path / "r.json", cure)
    written = export_run(load_backbone(folder), run, tmp_path / "out")
    want = TokenOutputs(open_run(tmp_path / "r.json", folder.parent).model)
    found, plain = TokenOutputs(load(tmp_path / "out").model), TokenOutputs(load_backbone(folder).model)
    assert written.outputs == want.names
    with torch.no_grad():
        for ours, theirs in zip(found(images()), want(images()), strict=True):
            assert torch.equal(ours, theirs)
        assert not torch.allclose(found(images())[-1], plain(images())[-1], atol=1e-5)


def test_onnx_holds_a_cure_or_says_by_name_that_it_cannot(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    masked = composed(folder, tmp_path / "r.json", "mask_attention")
    written = export_run(load_backbone(folder), masked, tmp_path / "out", onnx=True)
    assert written.differences["onnx"] < 1e-5
    with torch.no_grad():
        want = TokenOutputs(open_run(tmp_path / "r.json", folder.parent).model)(images())
    found = onnx_outputs(tmp_path / "out" / "model.onnx", images())
    assert torch.allclose(found[-1], want[-1], atol=1e-4)
    lof = composed(folder, tmp_path / "r.json", "interpolate_lof")
    with pytest.raises(RuntimeError, match=r"cannot hold cure interpolate_lof: No ONNX function found for .*cdist"):
        export_run(load_backbone(folder), lof, tmp_path / "out", onnx=True)
    with pytest.raises(ValueError, match="out is an export that was broken off"):
        load(tmp_path / "out")


def test_a_run_with_registers_alone_is_what_export_writes(folder, tmp_path):
    export_run(load_backbone(folder), composed(folder, tmp_path / "r.json", registers="test_time"), tmp_path / "run")
    export(load_backbone(folder), {0: (3, 8)}, tmp_path / "out")
    for file in ("registers.json", "weights.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_a_run_that_cannot_be_exported_is_said_by_name(folder, tmp_path):
    backbone, path = load_backbone(folder), tmp_path / "r.json"
    with pytest.raises(ValueError, match="run r is its backbone as it came, so there is nothing to bake in"):
        export_run(backbone, composed(folder, path), tmp_path / "out")
    with pytest.raises(ValueError, match="run r silences neurons as a control; a run with cure: ablate"):
        export_run(backbone, {**composed(folder, path), "control": "ablated"}, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"run r was composed of weights 000000000000…, but small has .*; give the backbone"
    ):
        export_run(backbone, {**composed(folder, path), "weights_sha256": 64 * "0"}, tmp_path / "out")
    with (
        pytest.warns(UserWarning, match="no outliers"),
        pytest.raises(ValueError, match="no outliers, so cure clip_norm has nothing to bake in"),
    ):
        export_run(backbone, composed(folder, path, "clip_norm", detection=False), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_differs_is_not_left_behind(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("regvit.registers.export.TOLERANCE", -1.0)
    with pytest.raises(ArithmeticError, match=r"the module differs from the hooked model by 0.*vit_tiny_patch16_224"):
        export(load_backbone(folder), NEURONS, tmp_path / "out")
    with pytest.raises(ValueError, match="out is an export that was broken off, or found to differ; export the model"):
        load(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"registers.json is missing; give a folder written by `regvit export`"):
        load(tmp_path)


def test_a_damaged_description_is_told(folder, tmp_path):
    export(load_backbone(folder), NEURONS, tmp_path / "out")
    path = tmp_path / "out" / "registers.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "format": 9}))
    with pytest.raises(ValueError, match="has format 9, this version reads 1 and 2; export the model again"):
        load(tmp_path / "out")
    path.write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="lacks num_registers, statistic, patches, scale, neurons; export the model"):
        load(tmp_path / "out")


def test_a_backbone_of_the_pipeline_opens_by_the_same_call_and_its_transform_takes_a_picture_or_a_path(
    folder, tmp_path
):
    opened = load(folder)
    one = Image.fromarray(picture(0))
    one.save(tmp_path / "one.png")
    x = opened.transform(one)
    assert x.shape == (3, 64, 64) and x.dtype == torch.float32
    assert torch.equal(opened.transform(tmp_path / "one.png"), x) and torch.equal(
        opened.transform(str(tmp_path / "one.png")), x
    )
    crop = create_transform(**resolve_data_config({}, model=opened.model))
    torch.testing.assert_close(crop(one), x)
    with torch.no_grad():
        assert torch.equal(opened.model(x[None]), load_backbone(folder).model(x[None]))
