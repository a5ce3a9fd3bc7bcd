import dataclasses
import json
import pickle
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from extracting import SIZE, Backwards, Interrupting, backbone_of, image_of, noise, run, tokens_of, tree, with_registers
from PIL import Image

from regvit.data.decoding import ChangedImage
from regvit.data.manifest import read_dataset, write_dataset
from regvit.data.packages import file_sha256
from regvit.data.transform import Transform
from regvit.features import extraction
from regvit.features.extraction import Job, extract
from regvit.features.forward import Forward, Readouts
from regvit.features.store import FeatureStore
from regvit.features.store_writer import UnitWriter

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, dataset):
    """The store of the model as it is, extracted undisturbed."""
    return run(tmp_path_factory.mktemp("plain"), backbone_of(), dataset)


@pytest.fixture(scope="module")
def cured(tmp_path_factory, dataset):
    """The same of the model with one register."""
    return run(tmp_path_factory.mktemp("cured"), with_registers(backbone_of(), 1), dataset)


@pytest.fixture(scope="module")
def cured_by_twos(tmp_path_factory, dataset):
    """The same in batches of two images."""
    return run(tmp_path_factory.mktemp("by_twos"), with_registers(backbone_of(), 1), dataset, batch_size=2)


# What is stored


def test_row_i_holds_the_features_of_the_image_in_row_i_of_the_manifest(tmp_path, dataset):
    backbone = with_registers(backbone_of(), 2)
    store = run(tmp_path, backbone, dataset)
    assert store.arrays == {"cls": (64,), "patch_mean": (64,), "registers": (2, 64)}
    for row in range(len(dataset)):
        tokens = tokens_of(backbone, row)[0].numpy()  # CLS, two registers, 4 patches
        assert len(tokens) == 7
        np.testing.assert_allclose(store.read("cls")[row], tokens[0], atol=2e-3)
        np.testing.assert_allclose(store.read("registers")[row], tokens[1:3], atol=2e-3)
        np.testing.assert_allclose(store.read("patch_mean")[row], tokens[3:].mean(0), atol=2e-3)
    rows = store.read("cls")
    assert np.abs(rows[:, None] - rows[None]).max(2)[~np.eye(11, dtype=bool)].min() > 0.02  # no two rows are alike


def test_patches_are_stored_row_by_row_where_they_are_asked_for_also_of_larger_images(tmp_path, dataset):
    backbone = with_registers(backbone_of(), 2)
    store = run(tmp_path, backbone, dataset, arrays=["patches"])
    assert store.arrays == {"patches": (4, 64)} and store.attributes["arrays"] == ["patches"]
    np.testing.assert_allclose(store.read("patches")[8], tokens_of(backbone, 8)[0].numpy()[3:], atol=2e-3)
    larger = backbone_of(dynamic_img_size=True)
    larger = dataclasses.replace(larger, transform=dataclasses.replace(larger.transform, size=2 * SIZE))
    assert run(tmp_path / "larger", larger, dataset, arrays=["patches"]).arrays == {"patches": (16, 64)}


def test_arrays_that_are_unknown_or_that_the_model_does_not_have_are_refused(tmp_path, dataset):
    expected = "array 'patch' is unknown; expected some of cls, registers, patch_mean, patches"
    with pytest.raises(ValueError, match=expected):
        run(tmp_path, backbone_of(), dataset, arrays=["patch"])
    with pytest.raises(ValueError, match=r"the model has none of the arrays asked for \(registers\)"):
        run(tmp_path, backbone_of(), dataset, arrays=["registers"])


def test_attributes_say_what_made_the_features_and_nothing_of_this_machine(tmp_path, dataset):
    backbone = backbone_of()
    attributes = run(tmp_path, backbone, dataset).attributes
    expected = {"backbone": "test_vit", "weights_sha256": "w" * 64, "architecture": "test_vit", "run": "original",
                "precision": "float32", "dataset": "noise", "manifest_sha256": dataset.digest}  # fmt: skip
    assert expected.items() <= attributes.items()
    assert Transform.from_dict(attributes["transform"]) == backbone.transform
    assert str(tmp_path) not in json.dumps(attributes)


# Machines and interruptions leave the bytes alone


@pytest.mark.parametrize("options", [{"workers": 2}, {"engine": Backwards()}], ids=["threads", "engine"])
def test_workers_and_engines_do_not_change_a_byte(tmp_path, dataset, cured, options):
    again = run(tmp_path, with_registers(backbone_of(), 1), dataset, **options)
    assert tree(again.path) == tree(cured.path)


@pytest.mark.parametrize(("after", "units", "workers"), [(2, 0, 2), (6, 1, 0), (10, 2, 2)])
def test_an_interrupted_extraction_goes_on_and_ends_in_the_same_bytes(
    tmp_path, dataset, cured_by_twos, capsys, monkeypatch, after, units, workers
):
    """Ctrl-C when so many images are done."""
    backbone = with_registers(backbone_of(), 1)
    before = threading.active_count()

    class Bar(extraction.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n >= after:
                raise KeyboardInterrupt

    monkeypatch.setattr(extraction, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone, dataset, batch_size=2, workers=workers, label="extract")
    monkeypatch.undo()
    assert {thread.name for thread in threading.enumerate() if thread.name.startswith(("store", "in_order"))} == set()
    assert threading.active_count() <= before + 1  # tqdm's monitor
    partial = tmp_path / "noise.zarr.partial"
    assert f"interrupted: {units} of 3 units are safe in {partial}; run the same again" in capsys.readouterr().err
    assert not (tmp_path / "noise.zarr").exists()
    resumed = run(tmp_path, backbone, dataset, batch_size=2, workers=workers, label="extract")
    said = capsys.readouterr().err
    assert f"resumed: {units} of 3 units were done" in said and "11/11" in said
    assert tree(resumed.path) == tree(cured_by_twos.path) and not partial.exists()


def test_batches_of_another_size_are_not_mixed_with_what_there_is(tmp_path, dataset, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone_of(), dataset, engine=Interrupting(2))
    run(tmp_path, backbone_of(), dataset, batch_size=3, label="extract")
    assert "started anew, as the unfinished store differs: batch_size\n" in capsys.readouterr().err


def test_the_kind_of_gpu_must_agree_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    key = extraction._resume_key(torch.device("cuda"), 64, None)
    assert (key["device"], key["gpu"], key["batch_size"]) == ("cuda", "some GPU", 64)
    assert "gpu" not in extraction._resume_key(torch.device("cuda"), 64, Backwards())  # the engine looks after it


def test_a_finished_store_of_the_same_settings_is_opened_and_of_others_refused(tmp_path, dataset):
    backbone = backbone_of()
    path = run(tmp_path, backbone, dataset).path
    written = (path / "zarr.json").stat().st_mtime_ns
    (tmp_path / "noise.zarr.partial").mkdir()  # of a process that was killed before it could remove it
    run(tmp_path, backbone, dataset)
    assert (path / "zarr.json").stat().st_mtime_ns == written and not (tmp_path / "noise.zarr.partial").exists()
    for change in ({"precision": "bfloat16"}, {"arrays": ["cls"]}):
        with pytest.raises(FileExistsError, match=r"noise.zarr exists; delete it to extract it again"):
            run(tmp_path, backbone, dataset, **change)
    (path / "cls/c.0.0").unlink()
    with pytest.raises(FileExistsError, match=r"noise.zarr exists; delete it to extract it again"):
        run(tmp_path, backbone, dataset)


def test_experiments_with_other_settings_work_in_other_folders(tmp_path, dataset):
    for precision in ("float32", "bfloat16"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, backbone_of(), dataset, precision, engine=Interrupting(1), work=tmp_path / "work")
    partials = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert len(partials) == 2 and all(re.search(r"-noise-[0-9a-f]{12}\.partial$", name) for name in partials)
    store = run(tmp_path, backbone_of(), dataset, work=tmp_path / "work")
    assert store.path == tmp_path / "noise.zarr" and len(list((tmp_path / "work").iterdir())) == 1


def test_units_are_written_at_the_same_time(tmp_path, dataset, plain, monkeypatch):
    all_three, write = threading.Barrier(3), UnitWriter.write
    monkeypatch.setattr(UnitWriter, "write", lambda *given: all_three.wait(20) is not None and write(*given))
    assert tree(run(tmp_path, backbone_of(), dataset).path) == tree(plain.path)


def test_a_job_computes_any_units_in_any_order_in_another_process(dataset):
    backbone = with_registers(backbone_of(), 1)
    job = pickle.loads(pickle.dumps(Job(Forward(backbone, Readouts()), dataset, 4, workers=2)))
    told = []
    later, earlier = job.units([(8, 11), (0, 4)], advance=told.append)
    assert told == [3, 4] and later["cls"].dtype == np.float16
    np.testing.assert_allclose(later["cls"][2], tokens_of(backbone, 10)[0, 0].numpy(), atol=2e-3)
    np.testing.assert_allclose(earlier["cls"][3], tokens_of(backbone, 3)[0, 0].numpy(), atol=2e-3)


# What is refused


def test_a_picture_that_changed_since_the_manifest_was_made_stops_by_name_and_records_nothing(tmp_path, dataset):
    files = [dataset.image_path(row) for row in range(len(dataset))]
    root = tmp_path / "data"
    shutil.copytree(files[0].parent, root / "images")
    rows = [dataclasses.replace(row, sha256=file_sha256(file)) for row, file in zip(dataset.rows, files, strict=True)]
    write_dataset(root, "noise", rows, ["noise"], {})
    here = read_dataset(root)
    whole = run(tmp_path / "whole", backbone_of(), here)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone_of(), here, engine=Interrupting(2))
    changed = here.image_path(9)
    before = changed.read_bytes()
    Image.fromarray(image_of(100)).save(changed)
    for workers in (0, 2):
        with pytest.raises(ChangedImage, match=rf"{changed} is not the file that the data set was made of"):
            run(tmp_path, backbone_of(), here, workers=workers)
    assert sorted(file.name for file in (tmp_path / "noise.zarr.partial/done").iterdir()) == ["0", "1"]
    assert not (tmp_path / "noise.zarr").exists()
    changed.write_bytes(before)
    assert tree(run(tmp_path, backbone_of(), here).path) == tree(whole.path)


def test_a_model_that_returns_no_tokens_and_an_empty_data_set_are_refused(tmp_path, dataset):
    model = torch.nn.Identity()
    model.forward_features = lambda x: x
    expected = r"Identity.forward_features returns \(1, 3, 32, 32\), expected a token sequence"
    with pytest.raises(ValueError, match=expected):
        run(tmp_path, dataclasses.replace(backbone_of(), model=model), dataset)
    with pytest.raises(ValueError, match=r"rows 0"):
        run(tmp_path, backbone_of(), dataset.subset("test"))


# Precision


@pytest.mark.parametrize("precision", ["float32_medium", "bfloat16", "float16"])
def test_lower_precision_stays_close_and_leaves_torch_as_it_was(tmp_path, dataset, plain, precision):
    backbone = backbone_of()
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    exact = plain.read("cls")
    lower = extract(tmp_path / "lower.zarr", backbone, dataset, precision=precision).read("cls")
    cosine = (exact * lower).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(lower, axis=1)
    assert cosine.min() > 0.999
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert not torch.is_autocast_enabled("cpu")


@needs_gpu
def test_a_gpu_gives_the_features_of_the_cpu(tmp_path, dataset):
    backbone = with_registers(backbone_of(), 1)
    cpu = run(tmp_path / "cpu", backbone, dataset)
    gpu = run(tmp_path / "gpu", backbone, dataset, device="cuda", workers=2, batch_size=None)
    for name in cpu.arrays:
        np.testing.assert_allclose(FeatureStore.open(gpu.path).read(name), cpu.read(name), atol=5e-3)


def test_a_model_without_cls_has_no_cls_array_and_its_register_is_no_patch(tmp_path, dataset):
    backbone = backbone_of("test_vit2")
    store = run(tmp_path, backbone, dataset)
    assert store.arrays == {"patch_mean": (64,), "registers": (1, 64)}
    tokens = tokens_of(backbone, 3)[0].numpy()  # register, then 4 patches
    assert len(tokens) == 5
    np.testing.assert_allclose(store.read("registers")[3, 0], tokens[0], atol=2e-3)
    np.testing.assert_allclose(store.read("patch_mean")[3], tokens[1:].mean(0), atol=2e-3)
