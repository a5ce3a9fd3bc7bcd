import dataclasses
import hashlib
import io
import json
import pickle
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from regvit import extraction
from regvit.arithmetic import arithmetic
from regvit.backbones import Backbone
from regvit.extraction import (
    BadFeatures,
    CannotCompile,
    Extractor,
    InProcess,
    default_batch_size,
    describe,
    extract,
    readouts,
    row_shapes,
)
from regvit.images import ChangedImage, Transform, UnreadableImage
from regvit.lanes import Download, Lane, Upload
from regvit.manifest import Row, read_dataset, write_dataset
from regvit.progress import progress
from regvit.registers import add_test_time_registers
from regvit.store import FeatureStore, StoreWriter
from regvit.tokens import TokenLayout

SIZE = 32
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def backbone_of(name="test_vit", **changes):
    """A timm model of random weights that sees 32 px images."""
    torch.manual_seed(0)
    model = (
        timm.create_model(name, pretrained=False, img_size=SIZE, num_classes=0, **changes).eval().requires_grad_(False)
    )
    transform = Transform(SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Backbone(
        name=name, model=model, transform=transform, weights_sha256="w" * 64, planted=None, info={"architecture": name}
    )


def image_of(row):
    """An image whose content encodes its row: noise of that seed."""
    return np.random.default_rng(row).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Eleven images whose names are in another order than their rows."""
    folder = tmp_path_factory.mktemp("data") / "noise"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(11):
        name = f"{(7 * i) % 11:02}"
        Image.fromarray(image_of(i)).save(folder / f"images/{name}.png")
        rows.append(Row(f"id {name}", f"images/{name}.png", "noise", "train"))
    write_dataset(folder, "noise", rows, ["noise"], {"source": "made for this test"})
    return read_dataset(folder)


def run(folder, backbone, dataset, precision="float32", **options):
    """Extracts in units of four rows and opens the result."""
    options = {"batch_size": 4, "rows_per_unit": 4} | options
    final = folder / "noise.zarr"
    attributes = describe(backbone, dataset, precision) | {"run": "original"}
    extract(backbone, dataset, final, folder / "noise.partial", attributes, precision, **options)
    return FeatureStore.open(final, dataset.digest, [row.image_id for row in dataset.rows])


def tokens_of(backbone, row):
    """What the model says of one image alone, worked without the loader: (1, n, d)."""
    image = torch.from_numpy(image_of(row)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        return backbone.model.forward_features((image / 255 - 0.5) / 0.5)


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def with_registers(backbone, count):
    add_test_time_registers(backbone.model, {1: [0, 5], 3: [7]}, count)
    return backbone


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


def test_readouts_take_each_token_from_its_place():
    tokens = torch.arange(6.0).reshape(1, 6, 1)  # CLS 0, trained 1, test-time 2, patches 3 4 5
    found = readouts(TokenLayout(cls=1, trained=1, test_time=1), tokens)
    assert {name: values.flatten().tolist() for name, values in found.items()} == {
        "cls": [0.0],
        "registers": [1.0, 2.0],
        "patch_mean": [4.0],
    }
    assert readouts(TokenLayout(cls=0, trained=0), tokens).keys() == {"patch_mean"}


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


def test_patch_means_of_half_precision_tokens_are_taken_in_float32():
    tokens = torch.full((1, 5000, 1), 0.1, dtype=torch.bfloat16)
    found = readouts(TokenLayout(cls=0, trained=0), tokens)["patch_mean"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.10009765625, rel=1e-6)  # 0.1 in bfloat16


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


class Interrupting(progress):
    """Ctrl-C after some images."""

    def __init__(self, after):
        self.log = io.StringIO()
        super().__init__(11, "extract", stream=self.log)
        self.after = after

    def advance(self, n=1):
        super().advance(n)
        if self.done >= self.after:
            raise KeyboardInterrupt


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
    monkeypatch.setattr("regvit.tokens.__file__", __file__)
    log = io.StringIO()
    run(tmp_path, backbone_of(), dataset, progress=progress(11, "extract", stream=log))
    assert "started anew, as the unfinished store differs: resume_key.code_sha256 was" in log.getvalue()


# Units, wherever they are computed


class SlowLane(Lane):
    """To a device that works beside the host, as a GPU does: each of its three queues is a thread that comes late.

    What is written too early, read too early or waited for too little shows in the features.
    """

    ahead = 2

    def __init__(self, device):
        super().__init__(device)
        self.up, self.work, self.down = (ThreadPoolExecutor(1) for _ in range(3))
        self.in_flight = self.most_in_flight = 0

    def upload(self, batch):
        images = torch.zeros_like(batch)

        def copy():
            time.sleep(0.01)
            images.copy_(batch)

        return Upload(images, Awaited(self.up.submit(copy)))

    def compute(self, step, upload):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

        def run():
            upload.done.synchronize()
            time.sleep(0.02)
            step(upload.images)
            self.in_flight -= 1

        self.last = Awaited(self.work.submit(run))
        return self.last

    def download(self, tensors):
        computed, found = self.last, {name: torch.zeros_like(values) for name, values in tensors.items()}

        def copy():
            computed.synchronize()
            time.sleep(0.02)
            for name, values in tensors.items():
                found[name].copy_(values)

        return Download(found, Awaited(self.down.submit(copy)))


class Awaited:
    def __init__(self, future):
        self.future = future

    def synchronize(self):
        self.future.result()


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_device_that_works_beside_the_host_gives_the_same_bytes(tmp_path, dataset, monkeypatch, workers, batch_size):
    backbone = with_registers(backbone_of(), 1)
    run(tmp_path / "plain", backbone, dataset, batch_size=batch_size)
    lanes = []
    monkeypatch.setattr(extraction, "lane_of", lambda device: lanes.append(SlowLane(device)) or lanes[-1])
    bar = progress(11, "extract", stream=io.StringIO())
    run(tmp_path / "slow", backbone, dataset, batch_size=batch_size, workers=workers, progress=bar)
    assert tree(tmp_path / "plain/noise.zarr") == tree(tmp_path / "slow/noise.zarr")
    assert bar.done == 11
    assert lanes[0].most_in_flight == 1 + SlowLane.ahead  # it is kept busy, and no more than that waits


def test_a_unit_is_the_same_alone_in_any_order_and_at_another_worker(dataset):
    backbone = with_registers(backbone_of(), 1)
    make = partial(Extractor, backbone, dataset, batch_size=3, rows_per_unit=4)
    extractor = make(device="cpu")
    assert extractor.batch_size == 2 and extractor.shapes == {"cls": (64,), "registers": (1, 64), "patch_mean": (64,)}
    whole = {unit.start: unit for unit in extractor.units([(0, 4), (4, 8), (8, 11)])}
    assert [(unit.start, unit.stop) for unit in whole.values()] == [(0, 4), (4, 8), (8, 11)]
    other = pickle.loads(pickle.dumps(make))(device="cpu", workers=2)
    backwards = list(other.units([(8, 11), (0, 4)]))
    assert [unit.start for unit in backwards] == [8, 0]
    for unit in backwards:
        for name, values in unit.arrays.items():
            np.testing.assert_array_equal(values, whole[unit.start].arrays[name])
            np.testing.assert_array_equal(extractor.unit(unit.start, unit.stop)[name], values)
    np.testing.assert_allclose(whole[8].arrays["cls"][1], tokens_of(backbone, 9)[0, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_units_of_a_single_row_are_as_good_as_any(dataset, workers):
    extractor = Extractor(backbone_of(), dataset, batch_size=4, workers=workers, rows_per_unit=4)
    whole = np.concatenate([unit.arrays["cls"] for unit in extractor.units([(0, 4), (4, 8), (8, 11)])])
    single = np.concatenate([unit.arrays["cls"] for unit in extractor.units([(row, row + 1) for row in range(11)])])
    np.testing.assert_allclose(single, whole, atol=1e-5)  # in another batch


def test_rows_that_the_data_set_does_not_have_are_refused(dataset):
    with pytest.raises(IndexError, match="rows 8 to 12 are out of range: noise has rows 0 to 11"):
        Extractor(backbone_of(), dataset).unit(8, 12)


def test_numbers_out_of_range_are_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 or more"):
        run(tmp_path, backbone_of(), dataset, batch_size=0)
    with pytest.raises(ValueError, match="workers is -1; expected 0 or more"):
        Extractor(backbone_of(), dataset, workers=-1)


class Backwards:
    """An engine that computes the last unit first, each with an extractor of its own, as workers do."""

    def fill(self, make, writer, advance):
        for unit in reversed(writer.missing_units()):
            start, stop = writer.unit_rows(unit)
            writer.write(unit, pickle.loads(pickle.dumps(make))(device="cpu").unit(start, stop))
            advance(stop - start)


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


def test_shapes_are_those_of_a_row(dataset):
    backbone = with_registers(backbone_of(), 2)
    assert row_shapes(backbone, "float32", arrays=["registers", "patches"]) == {
        "registers": (2, 64),
        "patches": (4, 64),
    }


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


def test_the_default_batch_is_eight_on_a_cpu_and_on_a_gpu_follows_from_the_model_alone(monkeypatch):
    """The test model's largest tensor: query, key and value of 64 channels of CLS and 4 patches, 960 values an image."""
    backbone = backbone_of()
    assert default_batch_size(backbone, "cpu") == 8
    assert default_batch_size(backbone, "cuda") == extraction.LARGEST_BATCH == 1024
    for limit, images in ((960 * 100, 64), (960 * 64, 64), (960 * 64 - 1, 32), (1, 1)):
        monkeypatch.setattr(extraction, "LARGEST_ACTIVATION", limit)
        assert default_batch_size(backbone, "cuda") == images
    monkeypatch.setattr(extraction, "LARGEST_ACTIVATION", 960 * 64)
    assert default_batch_size(with_registers(backbone, 5), "cuda:1") == 32  # twice as many tokens


def test_the_default_batch_on_a_gpu_fits_into_the_room_that_there_is():
    """5 of the largest tensors, 960 values of 4 bytes, and 3 · 32² pixels of 4 + 3 bytes: 40,704 bytes an image."""
    backbone = backbone_of()
    for room, images in ((40_704 * 64, 64), (40_704 * 64 - 1, 32), (40_704, 1), (0, 1), (-1e9, 1)):
        assert default_batch_size(backbone, "cuda", "float32", room) == images
    assert (
        default_batch_size(backbone, "cuda", "bfloat16", 40_704 * 64) == 64
    )  # 31,104: half as much, but for the input
    assert default_batch_size(backbone, "cuda", "bfloat16", 31_104 * 128) == 128
    assert default_batch_size(backbone, "cpu", room=0) == 8


def test_units_on_their_way_take_up_room_too(monkeypatch):
    monkeypatch.setattr(extraction, "available", lambda device: {"cuda:1": 10_000}[str(device)])
    shapes = {"cls": (5,), "registers": (3, 5)}  # 20 values, 80 bytes a row
    assert extraction._room(torch.device("cuda:1"), shapes, 10) == 0.8 * (10_000 - 3 * 10 * 80)
    assert extraction._room(torch.device("cpu"), shapes, 10) == np.inf


def peak_of(backbone, images, precision, folder):
    """Most bytes that a forward holds at once on a CPU, its input left out, as torch's profiler sees them."""
    batch, spent = torch.zeros(images, 3, backbone.transform.size, backbone.transform.size), [0]
    with (
        torch.inference_mode(),
        arithmetic(precision, torch.device("cpu")),
        torch.profiler.profile(profile_memory=True) as profile,
    ):
        backbone.model.forward_features(batch)
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    for event in sorted((each for each in events if each["name"] == "[memory]"), key=lambda each: each["ts"]):
        spent.append(spent[-1] + event["args"]["Bytes"])
    return max(spent)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "size", "fused"),
    [
        ("vit_small_patch16_224", 224, True),
        ("vit_base_patch14_dinov2", 224, False),
        ("vit_giant_patch14_dinov2", 224, True),  # SwiGLU
        ("vit_small_patch16_dinov3", 256, False),  # rotary positions
    ],
)
def test_what_a_forward_is_expected_to_need_is_between_what_it_takes_and_twice_as_much(
    tmp_path, name, size, fused, precision
):
    model = timm.create_model(name, img_size=size, depth=2, num_classes=0).eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    backbone = Backbone(name, model, Transform(size, (0.5,) * 3, (0.5,) * 3), "w" * 64, None, {})
    peak = (peak_of(backbone, 8, precision, tmp_path) - peak_of(backbone, 4, precision, tmp_path)) / 4
    expected = extraction.LIVE_ACTIVATIONS * extraction._largest_output(backbone, precision)[1]
    assert peak <= expected <= 2 * peak


def test_a_vit_l_gets_128_images_and_fewer_of_larger_ones():
    for size, images in ((224, 128), (518, 16)):
        model = timm.create_model("vit_large_patch14_dinov2", img_size=size, depth=1, num_classes=0).eval()
        backbone = Backbone("l", model, Transform(size, (0.5,) * 3, (0.5,) * 3), "w" * 64, None, {})
        assert default_batch_size(backbone, "cuda") == images


def test_the_batch_size_of_a_gpu_is_the_same_here_and_on_others_and_nothing_left_over_changes_it(
    tmp_path, dataset, monkeypatch
):
    """Computed on the CPU here, as if that were a GPU of which only the batch size is asked."""
    sizes = []
    monkeypatch.setattr(extraction, "default_batch_size", lambda backbone, device: 2)
    real = extraction._features
    monkeypatch.setattr(extraction, "_features", lambda *given: sizes.append(len(given[2])) or real(*given))
    for name, options in (("here", {}), ("there", {"engine": Backwards()})):
        run(tmp_path / name, backbone_of(), dataset, batch_size=None, **options)
        assert set(sizes) == {1, 2}  # 1: the blank image, and the last of eleven
        sizes.clear()
    assert tree(tmp_path / "here/noise.zarr") == tree(tmp_path / "there/noise.zarr")


def test_what_was_begun_on_a_gpu_with_another_batch_size_is_begun_anew(tmp_path, dataset, monkeypatch):
    key = extraction._resume_key
    monkeypatch.setattr(
        extraction, "_resume_key", lambda *given: key(*given) | {"batch_size": given[1]}
    )  # as that of a GPU
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone_of(), dataset, batch_size=4, progress=Interrupting(9))
    log = io.StringIO()
    run(tmp_path, backbone_of(), dataset, batch_size=None, progress=progress(11, "extract", stream=log))
    assert "resume_key.batch_size was 4 and is 8" in log.getvalue()


@pytest.fixture
def small_gpu(monkeypatch):
    """The CPU, as if it were a GPU of 1 GB that has room for `fits["images"]` images of the test model at once."""
    fits, real, key = {"images": 2, "free": 1 << 30}, extraction._features, extraction._resume_key

    def features(backbone, forward, batch, *more):
        if len(batch) > fits["images"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(backbone, forward, batch, *more)

    monkeypatch.setattr(extraction, "_features", features)
    monkeypatch.setattr(extraction, "_has_own_memory", lambda device: True)
    monkeypatch.setattr(extraction, "available", lambda device: fits["free"])
    monkeypatch.setattr(extraction, "_resume_key", lambda *given: key(*given) | {"batch_size": given[1]})
    monkeypatch.setattr(extraction, "LARGEST_BATCH", 4)
    return fits


def test_a_batch_is_halved_until_it_fits_before_the_store_is_begun(tmp_path, dataset, small_gpu):
    log = io.StringIO()
    found = run(tmp_path, backbone_of(), dataset, batch_size=None, progress=progress(11, "extract", stream=log))
    assert "batches of 2 images instead of 4, as cpu has no room for more\n" in log.getvalue()
    assert tree(found.path) == tree(run(tmp_path / "given", backbone_of(), dataset, batch_size=2).path)
    small_gpu["images"], bar = 4, progress(11, "extract", stream=io.StringIO())
    run(tmp_path / "room", backbone_of(), dataset, batch_size=None, progress=bar)
    assert "batches" not in bar._stream.getvalue()
    small_gpu["free"] = int(40_704 * 3 / 0.8) + 3 * 4 * 128 * 4  # for three images, beside three units of four rows
    run(tmp_path / "less", backbone_of(), dataset, batch_size=None, progress=bar)
    assert "batches of 2 images instead of 4" in bar._stream.getvalue()


def test_what_was_begun_is_gone_on_with_in_its_own_batches_whatever_memory_is_free(tmp_path, dataset, small_gpu):
    whole = run(tmp_path / "whole", backbone_of(), dataset, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone_of(), dataset, batch_size=None, progress=Interrupting(9))
    for images, free in ((4, 1 << 30), (2, 0)):
        small_gpu.update(images=images, free=free)
        bar = Interrupting(9)  # counts what was done before
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, backbone_of(), dataset, batch_size=None, progress=bar)
        assert "resumed: 2 of 3 units were done" in bar.log.getvalue()
    assert tree(run(tmp_path, backbone_of(), dataset, batch_size=None).path) == tree(whole.path)


def test_finished_units_are_not_thrown_away_where_their_batches_have_no_room_any_more(tmp_path, dataset, small_gpu):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone_of(), dataset, batch_size=None, progress=Interrupting(9))
    small_gpu["images"] = 1
    done = (tmp_path / "noise.partial/done.jsonl").read_text()
    with pytest.raises(
        torch.OutOfMemoryError,
        match="the unfinished store was made in batches of 2 images and is only gone on with in such; a smaller "
        "batch_size begins it anew: cpu has no room for 2 images of test_vit at once",
    ):
        run(tmp_path, backbone_of(), dataset, batch_size=None)
    assert (tmp_path / "noise.partial/done.jsonl").read_text() == done and len(done.splitlines()) == 2
    run(tmp_path, backbone_of(), dataset, batch_size=1)


def test_a_batch_size_is_not_taken_from_a_store_that_is_begun_anew_or_damaged(tmp_path, dataset, small_gpu):
    (tmp_path / "noise.partial").mkdir()
    for text in ("[]", "{", '{"attributes": {}, "resume_key": {"batch_size": 8}}'):
        (tmp_path / "noise.partial/resume.json").write_text(text)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, backbone_of(), dataset, batch_size=None, progress=Interrupting(9))
        assert json.loads((tmp_path / "noise.partial/resume.json").read_text())["resume_key"]["batch_size"] == 2


def test_a_batch_size_that_was_given_is_not_lowered_and_one_image_without_room_ends_it(tmp_path, dataset, small_gpu):
    with pytest.raises(torch.OutOfMemoryError, match="no room for 4 images of test_vit at once; give a smaller batch"):
        run(tmp_path, backbone_of(), dataset, batch_size=4)
    make = partial(Extractor, backbone_of(), dataset, rows_per_unit=4)
    make = partial(make, shapes={"cls": (64,)}, arrays=["cls"])
    small_gpu["images"] = 0
    with pytest.raises(
        torch.OutOfMemoryError, match=r"no room for 1 images .*free memory of the device and run the same"
    ):
        extraction._find_batch_size(make, torch.device("cpu"), 4, 4, None, None)


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


def test_two_threads_may_use_one_extractor(dataset):
    extractor = Extractor(with_registers(backbone_of(), 1), dataset, batch_size=2, rows_per_unit=4, workers=2)
    spans = [(0, 4), (4, 8), (8, 11)] * 4
    wanted = {start: extractor.unit(start, stop) for start, stop in spans}
    before = torch.get_float32_matmul_precision()
    with ThreadPoolExecutor(2) as pool:
        for (start, _), found in zip(spans, pool.map(lambda span: extractor.unit(*span), spans), strict=True):
            for name, values in found.items():
                np.testing.assert_array_equal(values, wanted[start][name])
    assert torch.get_float32_matmul_precision() == before


def test_a_batch_that_does_not_fit_says_what_to_do(tmp_path, dataset, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backbone = backbone_of()
    extractor = Extractor(backbone, dataset, batch_size=4, rows_per_unit=4)
    monkeypatch.setattr(extraction, "_features", full)
    with pytest.raises(
        torch.OutOfMemoryError, match="cpu has no room for 4 images of test_vit at once; give a smaller batch_size"
    ):
        extractor.unit(0, 4)


# Resized by torch, and compiled


def test_resizing_by_torch_is_said_in_the_attributes_and_resizing_by_pillow_is_not(tmp_path, dataset):
    backbone = backbone_of()
    assert "resizing" not in describe(backbone, dataset, "float32")["transform"]
    other = dataclasses.replace(backbone, transform=dataclasses.replace(backbone.transform, resizing="torch"))
    store = run(tmp_path, other, dataset)
    assert store.attributes["transform"]["resizing"] == "torch"
    assert Transform.from_dict(store.attributes["transform"]) == other.transform


class Compiled:
    """In place of torch.compile: counts calls, and gives what the model gives, or fails as a missing compiler does."""

    def __init__(self, fails=False):
        self.fails, self.seen = fails, []

    def __call__(self, forward, dynamic):
        def compiled(images):
            if self.fails:
                raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no C++ compiler"), None)
            self.seen.append(len(images))
            return forward(images)

        assert dynamic is False
        return compiled


def test_only_whole_batches_are_compiled(tmp_path, dataset, monkeypatch):
    backbone, stand_in = with_registers(backbone_of(), 1), Compiled()
    run(tmp_path / "plain", backbone, dataset)
    monkeypatch.setattr(torch, "compile", stand_in)
    run(tmp_path / "compiled", backbone, dataset, compile=True)
    assert stand_in.seen == [4, 4]  # the last batch has three images
    assert tree(tmp_path / "plain/noise.zarr") == tree(tmp_path / "compiled/noise.zarr")


def test_where_torch_cannot_compile_the_message_says_what_to_do(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiled(fails=True))
    with pytest.raises(
        CannotCompile, match=r"(?s)torch.compile fails on VisionTransformer here \(.*\); extract without it"
    ):
        run(tmp_path, backbone_of(), dataset, compile=True)


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
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_forward_on_a_gpu_takes_no_more_than_is_expected(dataset, precision):
    model = timm.create_model("vit_small_patch16_224", num_classes=0).eval().requires_grad_(False)
    backbone = Backbone("s", model, Transform(224, (0.5,) * 3, (0.5,) * 3), "w" * 64, None, {})
    extractor = Extractor(backbone, dataset, precision, "cuda", batch_size=64, rows_per_unit=64)
    extractor.try_out()  # the libraries take their own
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    extractor.try_out()
    unit = 4 * 64 * sum(np.prod(shape) for shape in extractor.shapes.values())
    one = 5 * extraction._largest_output(backbone, precision)[1] + extraction._input_bytes(backbone)
    assert torch.cuda.max_memory_allocated() - before <= 64 * one + 3 * unit


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_gives_the_features_of_the_cpu(tmp_path, dataset, compile):
    backbone = with_registers(backbone_of(), 1)
    cpu = run(tmp_path / "cpu", backbone, dataset)
    gpu = run(tmp_path / "gpu", backbone, dataset, device="cuda", workers=2, compile=compile)
    for name in cpu.arrays:
        np.testing.assert_allclose(gpu.read(name), cpu.read(name), atol=5e-3)


@needs_gpu
def test_a_gpu_takes_its_own_batch_size_and_goes_on_with_it(tmp_path, dataset):
    backbone = with_registers(backbone_of(), 1)
    run(tmp_path / "whole", backbone, dataset, device="cuda", batch_size=None, precision="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone, dataset, "bfloat16", device="cuda", batch_size=None, progress=Interrupting(9))
    run(tmp_path, backbone, dataset, "bfloat16", device="cuda", batch_size=None)
    assert tree(tmp_path / "whole/noise.zarr") == tree(tmp_path / "noise.zarr")
