import io
import json
from functools import partial

import numpy as np
import pytest
import timm
import torch
from extracting import Backwards, Interrupting, backbone_of, noise, run, tree, with_registers

from regvit.data.decoding import Transform
from regvit.data.progress import progress
from regvit.features import batch_size, extraction, extractor
from regvit.features.batch_size import default_batch_size
from regvit.features.extractor import Extractor
from regvit.models.arithmetic import arithmetic
from regvit.models.backbones import Backbone

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("data"))


def test_the_default_batch_is_eight_on_a_cpu_and_on_a_gpu_follows_from_the_model_alone(monkeypatch):
    """The test model's largest tensor: query, key and value of 64 channels of CLS and 4 patches, 960 values an image."""
    backbone = backbone_of()
    assert default_batch_size(backbone, "cpu") == 8
    assert default_batch_size(backbone, "cuda") == batch_size.LARGEST_BATCH == 1024
    for limit, images in ((960 * 100, 64), (960 * 64, 64), (960 * 64 - 1, 32), (1, 1)):
        monkeypatch.setattr(batch_size, "LARGEST_ACTIVATION", limit)
        assert default_batch_size(backbone, "cuda") == images
    monkeypatch.setattr(batch_size, "LARGEST_ACTIVATION", 960 * 64)
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
    monkeypatch.setattr(batch_size, "available", lambda device: {"cuda:1": 10_000}[str(device)])
    shapes = {"cls": (5,), "registers": (3, 5)}  # 20 values, 80 bytes a row
    assert batch_size.room_on(torch.device("cuda:1"), shapes, 10) == 0.8 * (10_000 - 3 * 10 * 80)
    assert batch_size.room_on(torch.device("cpu"), shapes, 10) == np.inf


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
    expected = batch_size.LIVE_ACTIVATIONS * batch_size._largest_output(backbone, precision)[1]
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
    real = extractor.features_of
    monkeypatch.setattr(extractor, "features_of", lambda *given: sizes.append(len(given[2])) or real(*given))
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
    fits, real, key = {"images": 2, "free": 1 << 30}, extractor.features_of, extraction._resume_key

    def features(backbone, forward, batch, *more):
        if len(batch) > fits["images"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(backbone, forward, batch, *more)

    monkeypatch.setattr(extractor, "features_of", features)
    for module in (batch_size, extraction):
        monkeypatch.setattr(module, "has_own_memory", lambda device: True)
    monkeypatch.setattr(batch_size, "available", lambda device: fits["free"])
    monkeypatch.setattr(extraction, "_resume_key", lambda *given: key(*given) | {"batch_size": given[1]})
    monkeypatch.setattr(batch_size, "LARGEST_BATCH", 4)
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

    def try_out(size):
        make(batch_size=size).try_out()

    small_gpu["images"] = 0
    with pytest.raises(
        torch.OutOfMemoryError, match=r"no room for 1 images .*free memory of the device and run the same"
    ):
        batch_size.find_batch_size(try_out, torch.device("cpu"), 4, 4, None, None)


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
    one = 5 * batch_size._largest_output(backbone, precision)[1] + batch_size._input_bytes(backbone)
    assert torch.cuda.max_memory_allocated() - before <= 64 * one + 3 * unit


@needs_gpu
def test_a_gpu_takes_its_own_batch_size_and_goes_on_with_it(tmp_path, dataset):
    backbone = with_registers(backbone_of(), 1)
    run(tmp_path / "whole", backbone, dataset, device="cuda", batch_size=None, precision="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, backbone, dataset, "bfloat16", device="cuda", batch_size=None, progress=Interrupting(9))
    run(tmp_path, backbone, dataset, "bfloat16", device="cuda", batch_size=None)
    assert tree(tmp_path / "whole/noise.zarr") == tree(tmp_path / "noise.zarr")
