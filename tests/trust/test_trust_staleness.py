"""A half-finished store is gone on with only where all that makes it is the same: each ingredient is changed in turn."""

import dataclasses
import hashlib
import shutil

import numpy as np
import pytest
import timm
import torch
from extracting import Interrupting, tree
from PIL import Image

from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.transform import Transform
from regvit.features import extraction, store, store_writer
from regvit.features.extraction import Options, fill_store
from regvit.features.forward import Forward, Readouts
from regvit.features.store import FeatureStore, InvalidStore, fingerprint
from regvit.models.backbones import load_backbone, save_backbone
from regvit.registers.test_time import add_test_time_registers

IMAGES, UNIT = 6, 2


@dataclasses.dataclass(frozen=True)
class Made:
    """All that makes a store, each ready to be changed."""

    weights: int = 0  # seed
    transform: Transform = Transform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # noqa: RUF009 (frozen)
    neurons: tuple[int, ...] | None = (0, 5)  # of layer 1
    registers: int = 1
    statistic: str = "per_neuron"
    labels: tuple[str, ...] = ("x",) * IMAGES
    pixels: int = 0  # seed
    precision: str = "float32"
    arrays: tuple[str, ...] = ("cls", "registers", "patch_mean")


CHANGES = {
    "other weights": ({"weights": 1}, "weights_sha256"),
    "another image size": ({"transform": Transform(48, (0.5,) * 3, (0.5,) * 3)}, "size"),
    "another normalisation": ({"transform": Transform(32, (0.4,) * 3, (0.5,) * 3)}, "mean"),
    "another crop": ({"transform": Transform(32, (0.5,) * 3, (0.5,) * 3, crop_pct=0.9)}, "crop_pct"),
    "another interpolation": ({"transform": Transform(32, (0.5,) * 3, (0.5,) * 3, "bilinear")}, "interpolation"),
    "other neurons": ({"neurons": (0, 6)}, "neurons_sha256"),
    "no neurons": ({"neurons": None, "registers": 0}, "neurons_sha256"),
    "another number of registers": ({"registers": 2}, "num_registers"),
    "another statistic": ({"statistic": "reference"}, "statistic"),
    "other labels": ({"labels": ("x",) * (IMAGES - 1) + ("y",)}, "manifest_sha256"),
    "other pixels": ({"pixels": 1}, "manifest_sha256"),
    "another precision": ({"precision": "bfloat16"}, "precision"),
    "other arrays": ({"arrays": ("cls", "patch_mean", "registers", "patches")}, "arrays"),
}


def extracted(folder, made, engine=None):
    """Extracts what `made` describes into folder/x.zarr; all is made anew from the description, as stages do."""
    data, weights = folder / "data", folder / "weights"
    for place in (data, weights):
        shutil.rmtree(place, ignore_errors=True)
    (data / "images").mkdir(parents=True)
    rows, rng = [], np.random.default_rng(made.pixels)
    for i, label in enumerate(made.labels):
        path = data / f"images/{i}.png"
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(Row(f"{i}", f"images/{i}.png", label, "train", sha256=digest))
    write_dataset(data, "noise", rows, sorted(set(made.labels)), {})
    torch.manual_seed(made.weights)
    args = {"num_classes": 0, "img_size": 32, "dynamic_img_size": True}
    model = timm.create_model("test_vit", pretrained=False, **args).eval()
    save_backbone(weights, model, name="tiny", architecture="test_vit", model_args=args, transform=made.transform,
                  source="random", licence="MIT")  # fmt: skip
    backbone = load_backbone(weights)
    if made.neurons is not None:
        add_test_time_registers(backbone.model, {1: made.neurons}, made.registers, statistic=made.statistic)
    attributes = {
        "run": "tried",
        "num_registers": made.registers,
        "statistic": made.statistic,
        "neurons_sha256": None if made.neurons is None else fingerprint({"1": list(made.neurons)}),
    }
    forward = Forward(backbone, Readouts(made.arrays), made.precision)
    options = Options(batch_size=2, engine=engine, label="x")
    return tree(fill_store(folder / "x.zarr", read_dataset(data), forward, attributes, options, UNIT).path)


@pytest.fixture
def interrupted(tmp_path, capsys):
    """A folder where one unit of three is done."""
    with pytest.raises(KeyboardInterrupt):
        extracted(tmp_path, Made(), Interrupting(1))
    assert not (tmp_path / "x.zarr").exists()
    assert [file.name for file in (tmp_path / "x.zarr.partial/done").iterdir()] == ["0"]
    capsys.readouterr()
    return tmp_path


def test_a_store_is_resumed_where_all_that_makes_it_is_the_same(interrupted, capsys):
    resumed = extracted(interrupted, Made())
    assert "resumed: 1 of 3 units were done" in capsys.readouterr().err
    assert resumed == extracted(interrupted / "undisturbed", Made())


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_store_is_begun_anew_where_any_ingredient_differs_and_says_which(interrupted, capsys, change):
    changed, reason = CHANGES[change]
    new = extracted(interrupted, Made(**changed))
    said = capsys.readouterr().err
    assert "started anew, as the unfinished store differs: " in said and reason in said and "resumed" not in said
    assert new == extracted(interrupted / "undisturbed", Made(**changed))


@pytest.mark.parametrize("library", ["torch", "timm", "pillow", "numpy"])
def test_a_store_is_begun_anew_with_another_version_of_a_library(interrupted, monkeypatch, capsys, library):
    real = extraction.version
    monkeypatch.setattr(extraction, "version", lambda name: "0.0" if name == library else real(name))
    extracted(interrupted, Made())
    assert f"started anew, as the unfinished store differs: {library}\n" in capsys.readouterr().err


def test_a_store_is_begun_anew_with_another_version_of_the_format(interrupted, monkeypatch, capsys):
    for module in (store, store_writer):
        monkeypatch.setattr(module, "FORMAT_VERSION", 99)
    extracted(interrupted, Made())
    assert "started anew, as the unfinished store differs: format_version\n" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(InvalidStore, match="format version 99 and this code reads 2; extract again"):
        FeatureStore.open(interrupted / "x.zarr")


@pytest.mark.parametrize("module", ["data.decoding", "models.tokens", "registers.test_time", "features.forward"])
def test_a_store_is_begun_anew_with_any_change_of_our_own_code(interrupted, monkeypatch, capsys, module):
    monkeypatch.setattr(f"regvit.{module}.__file__", __file__)
    extracted(interrupted, Made())
    assert "started anew, as the unfinished store differs: code_sha256\n" in capsys.readouterr().err
