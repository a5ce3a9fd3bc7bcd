"""A half-finished store is gone on with only where all that makes it is the same: each ingredient is changed in turn."""

import dataclasses
import hashlib
import io
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.progress import progress
from regvit.data.transform import Transform
from regvit.features import extraction, store, store_writer
from regvit.features.extraction import describe, extract
from regvit.features.store import FeatureStore, InvalidStore, fingerprint
from regvit.models.backbones import load_backbone, save_backbone
from regvit.registers.test_time import add_test_time_registers

IMAGES, UNIT = 6, 2


@dataclasses.dataclass
class Made:
    """All that makes a store, each ready to be changed."""

    weights: int = 0  # seed
    transform: Transform = Transform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # noqa: RUF009 (frozen)
    neurons: dict | None = None
    registers: int = 0
    statistic: str = "per_neuron"
    labels: tuple[str, ...] = ("x",) * IMAGES
    pixels: int = 0  # seed
    precision: str = "float32"
    arrays: tuple[str, ...] = ("cls", "registers", "patch_mean")


CHANGES = {
    "other weights": ({"weights": 1}, "attributes.weights_sha256 was"),
    "another image size": ({"transform": Transform(48, (0.5,) * 3, (0.5,) * 3)}, "attributes.transform.size was 32 and is 48"),
    "another normalisation": ({"transform": Transform(32, (0.4,) * 3, (0.5,) * 3)}, "attributes.transform.mean was"),
    "another crop": ({"transform": Transform(32, (0.5,) * 3, (0.5,) * 3, crop_pct=0.9)}, "attributes.transform.crop_pct was 1.0"),
    "another interpolation": (
        {"transform": Transform(32, (0.5,) * 3, (0.5,) * 3, "bilinear")}, "attributes.transform.interpolation was 'bicubic'"),
    "other neurons": ({"neurons": {1: (0, 6)}}, "attributes.neurons_sha256 was"),
    "no neurons": ({"neurons": None, "registers": 0}, "attributes.neurons_sha256 was"),
    "another number of registers": ({"registers": 2}, "attributes.num_registers was 1 and is 2"),
    "another statistic": ({"statistic": "reference"}, "attributes.statistic was 'per_neuron' and is 'reference'"),
    "other labels": ({"labels": ("x",) * (IMAGES - 1) + ("y",)}, "attributes.manifest_sha256 was"),
    "other pixels": ({"pixels": 1}, "attributes.manifest_sha256 was"),
    "another precision": ({"precision": "bfloat16"}, "attributes.precision was 'float32' and is 'bfloat16'"),
    "other arrays": ({"arrays": ("cls", "patch_mean", "registers", "patches")}, "attributes.arrays was"),
}  # fmt: skip
PLAIN = {"neurons": {1: (0, 5)}, "registers": 1}


class Stop(progress):
    """Ctrl-C after the third image: one unit of three is done."""

    def advance(self, n=1):
        super().advance(n)
        if self.done >= 4:
            raise KeyboardInterrupt


def extracted(folder, made, bar=None):
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
    backbone, dataset = load_backbone(weights), read_dataset(data)
    if made.neurons is not None:
        add_test_time_registers(backbone.model, made.neurons, made.registers, statistic=made.statistic)
    neurons = None if made.neurons is None else {str(layer): list(units) for layer, units in made.neurons.items()}
    attributes = describe(backbone, dataset, made.precision) | {
        "run": "tried",
        "num_registers": made.registers,
        "statistic": made.statistic,
        "neurons_sha256": None if neurons is None else fingerprint(neurons),
    }
    extract(backbone, dataset, folder / "x.zarr", folder / "x.partial", attributes, made.precision, batch_size=2,
            rows_per_unit=UNIT, progress=bar, arrays=made.arrays)  # fmt: skip
    return FeatureStore.open(folder / "x.zarr", dataset.digest)


def interrupted(folder, made):
    with pytest.raises(KeyboardInterrupt):
        extracted(folder, made, Stop(IMAGES, "x", stream=io.StringIO()))
    assert not (folder / "x.zarr").exists()
    assert (folder / "x.partial/done.jsonl").read_text() == '{"unit": 0}\n'


def gone_on(folder, made):
    """The digest of the store after the second run, and what that said."""
    said = io.StringIO()
    return extracted(folder, made, progress(IMAGES, "x", stream=said)).digest(), said.getvalue()


def test_a_store_is_resumed_where_all_that_makes_it_is_the_same(tmp_path):
    interrupted(tmp_path, Made(**PLAIN))
    digest, said = gone_on(tmp_path, Made(**PLAIN))
    assert "resumed: 1 of 3 units were done" in said
    assert digest == extracted(tmp_path / "undisturbed", Made(**PLAIN)).digest()


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_store_is_begun_anew_where_any_ingredient_differs_and_says_which(tmp_path, change):
    changed, reason = CHANGES[change]
    interrupted(tmp_path, Made(**PLAIN))
    new = Made(**(PLAIN | changed))
    digest, said = gone_on(tmp_path, new)
    assert "started anew, as the unfinished store differs: " in said and reason in said and "resumed" not in said
    assert digest == extracted(tmp_path / "undisturbed", new).digest()


@pytest.mark.parametrize("library", ["torch", "timm", "pillow"])
def test_a_store_is_begun_anew_with_another_version_of_a_library(tmp_path, monkeypatch, library):
    interrupted(tmp_path, Made(**PLAIN))
    real = extraction.version
    monkeypatch.setattr(extraction, "version", lambda name: "0.0" if name == library else real(name))
    _, said = gone_on(tmp_path, Made(**PLAIN))
    assert f"resume_key.{library} was {real(library)!r} and is '0.0'" in said


def test_a_store_is_begun_anew_with_another_version_of_the_format(tmp_path, monkeypatch):
    interrupted(tmp_path, Made(**PLAIN))
    for module in (store, store_writer):
        monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    _, said = gone_on(tmp_path, Made(**PLAIN))
    assert "attributes.format_version was 1 and is 2" in said
    monkeypatch.undo()
    with pytest.raises(InvalidStore, match="format version 2 and this code reads 1; extract again"):
        FeatureStore.open(tmp_path / "x.zarr")


@pytest.mark.parametrize("module", ["images", "tokens", "registers", "extraction", "backbones"])
def test_a_store_is_begun_anew_with_any_change_of_our_own_code(tmp_path, monkeypatch, module):
    interrupted(tmp_path, Made(**PLAIN))
    monkeypatch.setattr(f"regvit.{module}.__file__", __file__)
    _, said = gone_on(tmp_path, Made(**PLAIN))
    assert "resume_key.code_sha256 was" in said


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_store_whose_description_is_torn_is_begun_anew(tmp_path, content):
    interrupted(tmp_path, Made(**PLAIN))
    (tmp_path / "x.partial/resume.json").write_bytes(content)
    digest, said = gone_on(tmp_path, Made(**PLAIN))
    assert "started anew" in said
    assert digest == extracted(tmp_path / "undisturbed", Made(**PLAIN)).digest()


@pytest.mark.parametrize(
    "lost", ["store/zarr.json", "store/cls/zarr.json", "store/cls", "store/cls/c.0.0", "done.jsonl"]
)
def test_a_store_that_lost_a_part_is_never_completed_without_it(tmp_path, lost):
    interrupted(tmp_path, Made(**PLAIN))
    path = tmp_path / "x.partial" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    digest, _ = gone_on(tmp_path, Made(**PLAIN))
    assert digest == extracted(tmp_path / "undisturbed", Made(**PLAIN)).digest()


@pytest.mark.parametrize("units", ['{"unit": 7}\n', '{"unit": -1}\n', '{"unit": "0"}\n', "{}\n", '{"unit": null}\n'])
def test_a_log_that_names_units_that_there_are_not_does_not_pass_for_work_that_is_done(tmp_path, units):
    interrupted(tmp_path, Made(**PLAIN))
    (tmp_path / "x.partial/done.jsonl").write_text(units)
    digest, _ = gone_on(tmp_path, Made(**PLAIN))
    assert digest == extracted(tmp_path / "undisturbed", Made(**PLAIN)).digest()
