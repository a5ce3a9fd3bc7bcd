import dataclasses
import hashlib
import io
import json
import re
import threading

import numpy as np
import pytest
import torch
from extracting import (
    SIZE,
    Backwards,
    Compiled,
    Interrupting,
    backbone_of,
    image_of,
    noise,
    run,
    tokens_of,
    tree,
    with_registers,
)
from PIL import Image

from regvit.data.decoding import ChangedImage, Transform, UnreadableImage
from regvit.data.manifest import read_dataset, write_dataset
from regvit.data.progress import progress
from regvit.features import extraction
from regvit.features.extraction import InProcess, describe
from regvit.features.extractor import Extractor
from regvit.features.store_writer import StoreWriter
from regvit.models.nan_check import BadFeatures

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("data"))


# What is stored


def test_row_i_holds_the_features_of_the_image_in_row_i_of_the_manifest(tmp_path, dataset):
    backbone = backbone_of()
    store = run(tmp_path, backbone, dataset)
    assert store.arrays == {"cls": (64,), "patch_mean": (64,)}
    for row in range(len(dataset)):
        tokens = tokens_of(backbone, row)[0].numpy()
        np.testing.assert_allclose(store.read("cls")[row], tokens[0], atol=2e-3)
        np.testing.assert_allclose(store.read("patch_mean")[row], tokens[1:].mean(0), atol=2e-3)
    rows = store.read("cls")
    assert np.abs(rows[:, None] - rows[None]).max(2)[~np.eye(11, dtype=bool)].min() > 0.02  # no two rows are alike


def test_a_model_without_cls_has_no_cls_array_and_its_register_is_no_patch(tmp_path, dataset):
    backbone = backbone_of("test_vit2")
    store = run(tmp_path, backbone, dataset)
    assert store.arrays == {"patch_mean": (64,), "registers": (1, 64)}
    tokens = tokens_of(backbone, 3)[0].numpy()  # register, then 4 patches
    assert len(tokens) == 5
    np.testing.assert_allclose(store.read("registers")[3, 0], tokens[0], atol=2e-3)
    np.testing.assert_allclose(store.read("patch_mean")[3], tokens[1:].mean(0), atol=2e-3)


def test_test_time_registers_are_stored_apart_from_patches(tmp_path, dataset):
    backbone = with_registers(backbone_of(), 2)
    store = run(tmp_path, backbone, dataset)
    assert store.arrays == {"cls": (64,), "patch_mean": (64,), "registers": (2, 64)}
    tokens = tokens_of(backbone, 8)[0].numpy()  # CLS, two registers, 4 patches
    assert len(tokens) == 7
    np.testing.assert_allclose(store.read("registers")[8], tokens[1:3], atol=2e-3)
    np.testing.assert_allclose(store.read("patch_mean")[8], tokens[3:].mean(0), atol=2e-3)


def test_patches_are_stored_row_by_row_where_they_are_asked_for_and_nothing_else(tmp_path, dataset):
    backbone = with_registers(backbone_of(), 2)
    store = run(tmp_path, backbone, dataset, arrays=["patches"])
    assert store.arrays == {"patches": (4, 64)} and store.attributes["arrays"] == ["patches"]
    tokens = tokens_of(backbone, 8)[0].numpy()  # CLS, two registers, 4 patches
    np.testing.assert_allclose(store.read("patches")[8], tokens[3:], atol=2e-3)


def test_patches_of_larger_images_are_more(tmp_path, dataset):
    torch.manual_seed(0)
    backbone = backbone_of(dynamic_img_size=True)
    larger = dataclasses.replace(backbone, transform=dataclasses.replace(backbone.transform, size=2 * SIZE))
    assert run(tmp_path, larger, dataset, arrays=["patches"]).arrays == {"patches": (16, 64)}


def test_an_interrupted_extraction_of_patches_is_the_same_byte_for_byte(tmp_path, dataset):
    class Stop(Exception):
        pass

    class StopsAt(progress):
        def advance(self, n=1):
            super().advance(n)
            if self.done >= 8:
                raise Stop

    backbone, options = backbone_of(), {"arrays": ["patches", "cls"]}
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", backbone, dataset, **options)
    (tmp_path / "torn").mkdir()
    with StopsAt(11, None) as bar, pytest.raises(Stop):
        run(tmp_path / "torn", backbone, dataset, progress=bar, **options)
    torn = run(tmp_path / "torn", backbone, dataset, **options)
    assert tree(torn.path) == tree(whole.path) and torn.digest() == whole.digest()


def test_arrays_that_are_unknown_or_that_the_model_does_not_have_are_refused(tmp_path, dataset):
    with pytest.raises(
        ValueError, match="array 'patch' is unknown; expected some of cls, registers, patch_mean, patches"
    ):
        run(tmp_path, backbone_of(), dataset, arrays=["patch"])
    with pytest.raises(ValueError, match=r"test_vit has none of the arrays asked for \(registers\)"):
        run(tmp_path, backbone_of(), dataset, arrays=["registers"])


def test_attributes_say_what_made_the_features(tmp_path, dataset):
    store = run(tmp_path, backbone_of(), dataset)
    attributes = store.attributes
    assert attributes["backbone"] == "test_vit" and attributes["weights_sha256"] == "w" * 64
    assert attributes["architecture"] == "test_vit"
    assert attributes["run"] == "original" and attributes["precision"] == "float32"
    assert attributes["dataset"] == "noise" and attributes["manifest_sha256"] == dataset.digest
    assert Transform.from_dict(attributes["transform"]) == backbone_of().transform
    assert str(tmp_path) not in json.dumps(attributes)


# Machines and interruptions leave the bytes alone


def test_workers_do_not_change_a_byte(tmp_path, dataset):
    backbone = with_registers(backbone_of(), 1)
    run(tmp_path / "plain", backbone, dataset)
    run(tmp_path / "other", backbone, dataset, workers=2)
    assert tree(tmp_path / "plain/noise.zarr") == tree(tmp_path / "other/noise.zarr")


@pytest.mark.parametrize("batch_size", [1, 3, 99])
def test_batch_size_changes_no_feature_by_more_than_rounding(tmp_path, dataset, batch_size):
    backbone = with_registers(backbone_of(), 1)
    plain = run(tmp_path / "plain", backbone, dataset)
    other = run(tmp_path / "other", backbone, dataset, batch_size=batch_size)
    for name in plain.arrays:  # matrix products on several threads may differ by 1e-6, which can tip a float16
        np.testing.assert_allclose(other.read(name), plain.read(name), rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("after", "units"), [(2, 0), (6, 1), (10, 2), (11, 2)])
def test_an_interrupted_extraction_goes_on_and_ends_in_the_same_bytes(tmp_path, dataset, after, units, workers):
    backbone = with_registers(backbone_of(), 1)
    run(tmp_path / "undisturbed", backbone, dataset, batch_size=2)
    before = threading.active_count()
    bar = Interrupting(after)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone, dataset, batch_size=2, workers=workers, progress=bar)
    assert threading.active_count() == before
    assert (
        f"interrupted: {units} of 3 units are safe in {tmp_path / 'noise.partial'}; run the same again"
        in bar.log.getvalue()
    )
    assert not (tmp_path / "noise.zarr").exists()

    bar = progress(11, "extract", stream=io.StringIO())
    run(tmp_path, backbone, dataset, batch_size=2, workers=workers, progress=bar)
    assert f"resumed: {units} of 3 units were done" in bar._stream.getvalue()
    assert bar.done == 11
    assert tree(tmp_path / "noise.zarr") == tree(tmp_path / "undisturbed/noise.zarr")
    assert not (tmp_path / "noise.partial").exists()


def test_units_with_a_gap_are_filled_in_their_places(tmp_path, dataset):
    backbone = backbone_of()
    undisturbed = run(tmp_path / "undisturbed", backbone, dataset)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone, dataset, progress=Interrupting(9))
    log = tmp_path / "noise.partial/done.jsonl"
    log.write_text('{"unit": 1}\n')  # as if units had been finished in another order
    assert log.exists()
    resumed = run(tmp_path, backbone, dataset)
    np.testing.assert_array_equal(resumed.read("cls"), undisturbed.read("cls"))


def test_changed_code_is_not_mixed_with_what_older_code_made(tmp_path, dataset, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone_of(), dataset, progress=Interrupting(9))
    monkeypatch.setattr("regvit.models.tokens.__file__", __file__)
    log = io.StringIO()
    run(tmp_path, backbone_of(), dataset, progress=progress(11, "extract", stream=log))
    assert "started anew, as the unfinished store differs: resume_key.code_sha256 was" in log.getvalue()


def test_numbers_out_of_range_are_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 or more"):
        run(tmp_path, backbone_of(), dataset, batch_size=0)
    with pytest.raises(ValueError, match="workers is -1; expected 0 or more"):
        Extractor(backbone_of(), dataset, workers=-1)


def test_an_engine_gives_the_bytes_of_this_process_and_goes_on_with_what_it_left(tmp_path, dataset):
    backbone = with_registers(backbone_of(), 1)
    run(tmp_path / "here", backbone, dataset)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "there", backbone, dataset, progress=Interrupting(9))
    bar = progress(11, "extract", stream=io.StringIO())
    run(tmp_path / "there", backbone, dataset, progress=bar, engine=Backwards())
    assert "resumed: 2 of 3 units were done" in bar._stream.getvalue() and bar.done == 11
    assert tree(tmp_path / "here/noise.zarr") == tree(tmp_path / "there/noise.zarr")


def test_an_engine_that_meets_features_that_cannot_be_stored_names_the_image(tmp_path, dataset):
    backbone = backbone_of()
    broken = dataclasses.replace(backbone, model=Broken(backbone.model, 6, np.nan))
    with pytest.raises(BadFeatures, match=r"image 'id 09' \(images/09.png\): array 'cls', row 6: nan"):
        run(tmp_path, broken, dataset, engine=InProcess())


# What decides last bits is not mixed


def test_what_was_begun_on_another_kind_of_device_is_not_gone_on_with(tmp_path, dataset, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone_of(), dataset, progress=Interrupting(9))
    resume = tmp_path / "noise.partial/resume.json"
    resume.write_text(resume.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    log = io.StringIO()
    run(tmp_path, backbone_of(), dataset, progress=progress(11, "extract", stream=log))
    assert "started anew, as the unfinished store differs: resume_key.device was 'cuda' and is 'cpu'" in log.getvalue()


def test_a_gpus_name_batch_size_and_compilation_are_part_of_what_must_agree(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    key = extraction._resume_key(torch.device("cuda"), 64, True, None)
    assert {name: key[name] for name in ("device", "gpu", "batch_size", "compile")} == {
        "device": "cuda", "gpu": "some GPU", "batch_size": 64, "compile": True,
    }  # fmt: skip
    assert "gpu" not in extraction._resume_key(torch.device("cuda"), 64, True, Backwards())  # the engine looks after it
    assert "batch_size" not in extraction._resume_key(torch.device("cpu"), 64, False, None)


def test_units_are_written_at_the_same_time(tmp_path, dataset, monkeypatch):
    all_three, unit_writer = threading.Barrier(3), StoreWriter.unit_writer

    class Together:
        def __init__(self, writer):
            self.writer = unit_writer(writer)

        def write(self, unit, arrays):
            all_three.wait(20)
            return self.writer.write(unit, arrays)

    undisturbed = run(tmp_path / "undisturbed", backbone_of(), dataset)
    monkeypatch.setattr(StoreWriter, "unit_writer", lambda writer: Together(writer))
    assert run(tmp_path, backbone_of(), dataset).digest() == undisturbed.digest()


# Resized by torch, and compiled


def test_resizing_by_torch_is_said_in_the_attributes_and_resizing_by_pillow_is_not(tmp_path, dataset):
    backbone = backbone_of()
    assert "resizing" not in describe(backbone, dataset, "float32")["transform"]
    other = dataclasses.replace(backbone, transform=dataclasses.replace(backbone.transform, resizing="torch"))
    store = run(tmp_path, other, dataset)
    assert store.attributes["transform"]["resizing"] == "torch"
    assert Transform.from_dict(store.attributes["transform"]) == other.transform


@pytest.mark.parametrize(
    "error", [None, RuntimeError("Failed to find C compiler"), FileNotFoundError("no /usr/bin/cc")]
)
def test_where_nobody_asked_for_it_compiling_is_tried_on_a_blank_batch_and_left_out_where_it_fails(
    tmp_path, dataset, monkeypatch, error
):
    run(tmp_path / "plain", backbone_of(), dataset)
    stand_in = Compiled(fails=True)
    if error is not None:  # torch lets some of what Triton and the compiler raise through

        def fails(images):
            raise error

        stand_in = lambda forward, dynamic: fails  # noqa: E731
    monkeypatch.setattr(torch, "compile", stand_in)
    monkeypatch.setattr(extraction, "_compiling_pays", lambda device, images: True)
    log = io.StringIO()
    run(tmp_path, backbone_of(), dataset, compile=None, progress=progress(11, "extract", stream=log))
    reason = "no C\\+\\+ compiler" if error is None else str(error)
    assert re.search(f"goes on without torch.compile: it fails on a blank batch: .*{reason}", log.getvalue())
    assert tree(tmp_path / "plain/noise.zarr") == tree(tmp_path / "noise.zarr")


def test_compiling_that_works_is_tried_before_the_store_is_begun(tmp_path, dataset, monkeypatch):
    stand_in, begun = Compiled(), []
    writer = extraction.store_writer
    monkeypatch.setattr(torch, "compile", stand_in)
    monkeypatch.setattr(extraction, "_compiling_pays", lambda device, images: True)
    monkeypatch.setattr(
        extraction,
        "store_writer",
        lambda *given: begun.append((given[6]["compile"], len(stand_in.seen))) or writer(*given),
    )
    run(tmp_path, backbone_of(), dataset, compile=None)
    assert begun == [(True, 1)] and stand_in.seen == [4, 4, 4]  # the blank batch, then two whole ones of eleven images


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to try it on")
def test_others_compute_without_compiling_where_there_is_no_gpu_here_to_try_it_on(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(extraction, "COMPILED_FROM", 1)
    log = io.StringIO()
    bar = progress(11, "extract", stream=log)
    run(tmp_path, backbone_of(), dataset, compile=None, device="cuda", engine=Backwards(), progress=bar)
    assert "goes on without torch.compile: there is no GPU here to try it on; set compile" in log.getvalue()


def test_compilation_is_left_out_on_a_cpu_unless_asked_for(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiled(fails=True))
    monkeypatch.setattr(extraction, "COMPILED_FROM", 1)
    run(tmp_path, backbone_of(), dataset, compile=None)


# What is refused


class Broken(torch.nn.Module):
    """A model that goes wrong on one image: `value` in one channel of its CLS token."""

    def __init__(self, model, image, value):
        super().__init__()
        self.model, self.image, self.value = model, image, value
        self.num_prefix_tokens, self.seen = 1, -1

    def forward_features(self, x):
        tokens = self.model.forward_features(x).clone()
        for i in range(len(x)):
            if self.seen == self.image:
                tokens[i, 0, 5] = self.value
            self.seen += 1  # the first image seen is the blank one that tells the shapes
        return tokens


@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan is not a finite number"), (7e4, "70000 is beyond float16")])
def test_features_that_cannot_be_stored_name_the_image_and_the_array(tmp_path, dataset, value, text):
    backbone = backbone_of()
    broken = dataclasses.replace(backbone, model=Broken(backbone.model, 6, value))
    expected = rf"image 'id 09' \(images/09.png\): array 'cls', row 6: {text}.* take the image out"  # 7 * 6 mod 11 = 9
    with pytest.raises(BadFeatures, match=expected):
        run(tmp_path, broken, dataset)
    log = io.StringIO()  # the unit before it is kept, and the one after it where it was already computed
    run(tmp_path, backbone, dataset, progress=progress(11, "extract", stream=log))
    assert re.search(r"resumed: [12] of 3 units were done", log.getvalue())


def test_a_picture_that_changed_since_the_manifest_was_made_stops_by_name_and_records_nothing(tmp_path, dataset):
    files = [dataset.image_path(row) for row in range(len(dataset))]
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for file in files:
        (root / "images" / file.name).write_bytes(file.read_bytes())
    rows = [
        dataclasses.replace(row, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
        for row, file in zip(dataset.rows, files, strict=True)
    ]
    write_dataset(root, "noise", rows, ["noise"], {})
    here = read_dataset(root)
    whole = run(tmp_path / "whole", backbone_of(), here)
    with pytest.raises(KeyboardInterrupt):  # two units of four are done
        run(tmp_path, backbone_of(), here, progress=Interrupting(9))
    changed = here.image_path(9)
    before = changed.read_bytes()
    Image.fromarray(image_of(100)).save(changed)
    for workers in (0, 2):
        with pytest.raises(ChangedImage, match=rf"{changed} is not the file that the data set was made of"):
            run(tmp_path, backbone_of(), here, workers=workers)
    records = (tmp_path / "noise.partial/done.jsonl").read_text().splitlines()
    assert sorted(records) == ['{"unit": 0}', '{"unit": 1}']
    assert not (tmp_path / "noise.zarr").exists()
    changed.write_bytes(before)
    assert run(tmp_path, backbone_of(), here).digest() == whole.digest()


def test_an_unreadable_image_stops_with_its_path_and_keeps_finished_units(tmp_path, dataset):
    rows = (*dataset.rows[:9], dataclasses.replace(dataset.rows[9], path="images/gone.png"), *dataset.rows[10:])
    with pytest.raises(UnreadableImage, match=r"images/gone.png"):
        run(tmp_path, backbone_of(), dataclasses.replace(dataset, rows=rows))
    with StoreWriter(
        tmp_path / "a", tmp_path / "noise.partial", 11, {"cls": (64,), "patch_mean": (64,)}, {}, 4
    ) as writer:  # other attributes: only to see that the lock is free
        assert "started anew" in writer.note


def test_an_unknown_precision_is_refused(dataset):
    with pytest.raises(
        ValueError, match=r"precision is 'int8'; expected one of float32, float32_medium, bfloat16, float16"
    ):
        describe(backbone_of(), dataset, "int8")


def test_a_model_that_returns_no_tokens_is_refused(tmp_path, dataset):
    model = torch.nn.Identity()
    model.forward_features = lambda x: x
    broken = dataclasses.replace(backbone_of(), model=model)
    with pytest.raises(
        ValueError, match=r"Identity.forward_features returns \(1, 3, 32, 32\), expected a token sequence"
    ):
        run(tmp_path, broken, dataset)


def test_an_empty_data_set_is_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match=r"rows 0"):
        run(tmp_path, backbone_of(), dataset.subset("test"))


# Precision


@pytest.mark.parametrize("precision", ["float32_medium", "bfloat16", "float16"])
def test_lower_precision_stays_close_and_leaves_torch_as_it_was(tmp_path, dataset, precision):
    backbone = backbone_of()
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    exact = run(tmp_path / "exact", backbone, dataset).read("cls")
    lower = run(tmp_path / "lower", backbone, dataset, precision).read("cls")
    cosine = (exact * lower).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(lower, axis=1)
    assert cosine.min() > 0.999
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert not torch.is_autocast_enabled("cpu")


def test_float32_does_not_depend_on_the_callers_matmul_setting(tmp_path, dataset):
    backbone, seen = backbone_of(), []
    handle = backbone.model.blocks[0].register_forward_pre_hook(
        lambda *_: seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        run(tmp_path, backbone, dataset)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
        handle.remove()
    assert set(seen) == {("highest", False)}


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_gives_the_features_of_the_cpu(tmp_path, dataset, compile):
    backbone = with_registers(backbone_of(), 1)
    cpu = run(tmp_path / "cpu", backbone, dataset)
    gpu = run(tmp_path / "gpu", backbone, dataset, device="cuda", workers=2, compile=compile)
    for name in cpu.arrays:
        np.testing.assert_allclose(gpu.read(name), cpu.read(name), atol=5e-3)
