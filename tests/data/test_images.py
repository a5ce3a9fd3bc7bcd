import hashlib
import json
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from regvit.data import decoding
from regvit.data.batches import load_batches
from regvit.data.decoding import ChangedImage, UnreadableImage, read_rgb, to_rgb
from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.prefetch import in_order
from regvit.data.transform import Transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(5, 90),
    st.integers(5, 90),
    st.integers(4, 48),
    st.sampled_from([1.0, 0.95, 0.9, 0.875]),
    st.sampled_from(["bicubic", "bilinear", "lanczos"]),
)
def test_pixels_equal_those_of_timms_evaluation_transform(width, height, size, crop_pct, interpolation):
    image = noise(width, height)
    reference = create_transform(
        (3, size, size), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop_pct, normalize=False
    )(image)
    mine = Transform(size, MEAN, STD, interpolation, crop_pct).crop(image)
    assert np.array_equal(np.asarray(mine), reference.permute(1, 2, 0).numpy())


def test_loading_and_normalising_equals_timms_whole_transform(tmp_path):
    noise(61, 47).save(tmp_path / "x.png")
    transform = Transform(32, MEAN, STD, "bicubic", 0.9)
    loaded = transform.load(tmp_path / "x.png")
    assert loaded.dtype == torch.uint8 and loaded.shape == (3, 32, 32) and loaded.is_contiguous()
    reference = create_transform((3, 32, 32), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=0.9)
    expected = reference(Image.open(tmp_path / "x.png"))
    torch.testing.assert_close(transform.normalise(loaded[None])[0], expected, rtol=0, atol=1e-6)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft blobs with grain, as noise alone shows nothing of how images are resized."""
    return noise(9, 7, seed).resize((width, height), Image.Resampling.BICUBIC)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(40, 200),
    st.integers(40, 200),
    st.integers(8, 64),
    st.sampled_from([1.0, 0.875]),
    st.sampled_from(["bicubic", "bilinear"]),
    st.integers(0, 99),
)
def test_torch_resizes_to_the_same_place_and_within_two_levels(width, height, size, crop_pct, interpolation, seed):
    image = photograph(width, height, seed)
    pillow = Transform(size, MEAN, STD, interpolation, crop_pct)
    torchs = Transform(size, MEAN, STD, interpolation, crop_pct, "torch")
    difference = np.abs(np.asarray(torchs.crop(image)).astype(int) - np.asarray(pillow.crop(image)))
    assert difference.shape == (size, size, 3) and difference.max() <= 2


def test_torch_resizes_as_torchvisions_transform_does_on_tensors():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    image = photograph(150, 90)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    reference = v2.Compose([v2.Resize(36, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(32)])(tensor)
    mine = Transform(32, MEAN, STD, "bicubic", 32 / 36, "torch").crop(image)
    assert np.array_equal(np.asarray(mine), reference.permute(1, 2, 0).numpy())


def test_a_file_is_read_once_and_held_to_the_digest_of_the_manifest(tmp_path, monkeypatch):
    noise(12, 10).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    digest, transform = hashlib.sha256(content).hexdigest(), Transform(8, MEAN, STD)
    reads, read_bytes = [], type(tmp_path).read_bytes
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda path: reads.append(path) or read_bytes(path))
    assert torch.equal(transform.load(tmp_path / "x.png", digest), transform.load(tmp_path / "x.png"))
    assert len(reads) == 2
    noise(12, 10, seed=1).save(tmp_path / "x.png")
    for load in (transform.load, transform.pixels, read_rgb):
        with pytest.raises(ChangedImage, match=rf"x\.png is not the file that the data set was made of: its SHA-256 is \w+, "
                           rf"that in the manifest {digest}; put that file back, or run download again"):  # fmt: skip
            load(tmp_path / "x.png", digest)
        load(tmp_path / "x.png")  # nothing to hold it to


def test_batches_are_held_to_the_digests_of_the_manifest(tmp_path):
    for i in range(3):
        noise(12, 10, seed=i).save(tmp_path / f"{i}.png")
    rows = [Row(str(i), f"{i}.png", "", "test", sha256=hashlib.sha256((tmp_path / f"{i}.png").read_bytes()).hexdigest())
            for i in range(3)]  # fmt: skip
    write_dataset(tmp_path, "noise", rows, (), {})
    dataset = read_dataset(tmp_path)
    assert sum(len(batch) for batch in load_batches(dataset, Transform(8, MEAN, STD), 2)) == 3
    noise(12, 10, seed=9).save(tmp_path / "1.png")
    with pytest.raises(ChangedImage, match=r"1\.png is not the file that the data set was made of"):
        list(load_batches(dataset, Transform(8, MEAN, STD), 2))


def test_an_error_of_another_process_comes_back_as_it_was():
    error = pickle.loads(pickle.dumps(UnreadableImage("x.png", "empty file")))
    assert str(error) == "x.png cannot be read as an image: empty file; replace the file or take it out of the data set"
    assert (str(error.path), error.reason) == ("x.png", "empty file")
    changed = pickle.loads(pickle.dumps(ChangedImage("x.png", "it differs")))
    assert type(changed) is ChangedImage and str(changed).startswith(
        "x.png is not the file that the data set was made of"
    )


def test_reading_leaves_the_callers_image_alone():
    image = noise(4, 3)
    before = image.tobytes()
    Transform(2, MEAN, STD).crop(to_rgb(image))
    assert image.tobytes() == before and image.size == (4, 3)


def test_transparent_pixels_become_white_in_every_transparent_mode(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    rgba.putpixel((0, 0), (10, 20, 30, 0))
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    rgba.save(tmp_path / "rgba.png")
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("rgba.png", "palette.png"):
        assert np.asarray(read_rgb(tmp_path / name)).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 51)).save(tmp_path / "x.png")  # a fifth opaque: 255 * 0.8 = 204
    assert read_rgb(tmp_path / "x.png").getpixel((0, 0)) == (204, 204, 204)


def test_grey_images_get_three_equal_channels_and_16_bits_are_scaled_to_8(tmp_path):
    Image.new("L", (1, 1), 77).save(tmp_path / "grey.png")
    Image.fromarray(np.array([[0, 257 * 77, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (1, 1), 1).save(tmp_path / "bit.png")
    assert np.asarray(read_rgb(tmp_path / "grey.png")).tolist() == [[[77] * 3]]
    assert np.asarray(read_rgb(tmp_path / "deep.png")).tolist() == [[[0] * 3, [77] * 3, [255] * 3]]
    assert np.asarray(read_rgb(tmp_path / "bit.png")).tolist() == [[[255] * 3]]


def test_an_image_brought_to_rgb_in_parts_is_the_same(monkeypatch):
    deep = Image.fromarray(np.arange(0, 65536, 1311, dtype=np.uint16).reshape(10, 5))
    many = (
        deep,
        Image.fromarray(np.asarray(deep).astype(np.int32)),
        Image.merge("RGBA", [*noise(5, 10).split(), noise(5, 10, 1).getchannel(0)]),
        Image.merge("LA", noise(5, 10).split()[:2]),
        noise(5, 10).quantize(8),
    )
    many[-1].info["transparency"] = bytes(range(0, 256, 32))
    for image in many:
        monkeypatch.setattr(decoding, "BLOCK", 1 << 22)
        whole = np.asarray(to_rgb(image))
        monkeypatch.setattr(decoding, "BLOCK", 15)  # three rows
        assert np.array_equal(np.asarray(to_rgb(image)), whole) and whole.std() > 10
    expected = np.round(np.asarray(deep) / 65535 * 255)
    assert np.array_equal(np.asarray(to_rgb(deep)), np.stack([expected] * 3, -1))


def test_a_transform_survives_json():
    for transform in (Transform(112, MEAN, STD, "bilinear", 0.9), Transform(112, MEAN, STD, resizing="torch")):
        assert Transform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size 0 must be at least 1"),
        ({"interpolation": "cubic"}, "interpolation 'cubic' is unknown; use one of nearest, bilinear, bicubic"),
        ({"crop_pct": 1.5}, r"crop_pct 1\.5 must lie in \(0, 1\]"),
        ({"std": (1, 0, 1)}, "std above 0"),
        ({"extra": 1}, "its keys are size, mean, std, interpolation, crop_pct"),
        ({"resizing": "opencv"}, "resizing 'opencv' is unknown; use one of pillow, torch"),
        (
            {"resizing": "torch", "interpolation": "lanczos"},
            r"torch has no antialiased lanczos interpolation \(only bilinear, bicubic\); use resizing 'pillow'",
        ),
    ],
)
def test_a_bad_transform_says_what_is_allowed(change, message):
    with pytest.raises(ValueError, match=message):
        Transform.from_dict({"size": 8, "mean": MEAN, "std": STD} | change)


def test_normalise_is_worked_per_channel():
    batch = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    out = Transform(1, (0.0, 0.1, 0.5), (1.0, 0.5, 0.25)).normalise(batch)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0.2, 2.0]))


def test_normalise_takes_nothing_to_the_device_after_the_first_batch(monkeypatch):
    transform, batch = Transform(2, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    with torch.inference_mode():
        first = transform.normalise(batch)
    monkeypatch.setattr(torch, "tensor", None)
    again = transform.normalise(batch)
    assert torch.equal(first, again)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (again * weight).sum().backward()  # what is kept may be used in training too
    other = Transform(2, (0.1, 0.2, 0.3), (0.4, 0.5, 0.7))
    monkeypatch.undo()
    assert not torch.equal(other.normalise(batch), first)


def test_normalise_refuses_what_is_not_a_uint8_batch():
    with pytest.raises(ValueError, match=r"batch is torch\.float32 \(1, 3, 2, 2\); expected torch\.uint8"):
        Transform(2, MEAN, STD).normalise(torch.zeros(1, 3, 2, 2))


@pytest.fixture
def dataset(tmp_path):
    for i in range(7):
        noise(12, 10, seed=i).save(tmp_path / f"{i}.png")
    write_dataset(tmp_path, "noise", [Row(str(i), f"{i}.png", "", "test") for i in (3, 1, 6, 0, 5, 2, 4)], (), {})
    return read_dataset(tmp_path)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_come_in_row_order_with_any_number_of_workers(dataset, workers):
    transform = Transform(8, MEAN, STD)
    batches = list(load_batches(dataset, transform, 3, workers))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    expected = torch.stack([transform.load(dataset.image_path(i)) for i in range(7)])
    assert torch.equal(torch.cat(batches), expected)


def test_an_unreadable_image_stops_the_batches_also_in_a_worker(dataset):
    dataset.image_path(4).write_text("broken")
    for workers in (0, 2):
        with pytest.raises(UnreadableImage, match=r"5\.png cannot be read"):
            list(load_batches(dataset, Transform(8, MEAN, STD), 2, workers))


def test_a_batch_size_of_zero_is_refused_before_anything_is_read(dataset):
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        load_batches(dataset, Transform(8, MEAN, STD), 0)


def test_workers_run_no_further_ahead_than_allowed_and_stop_with_the_caller():
    begun, lock = [], threading.Lock()

    def count(i: int) -> int:
        with lock:
            begun.append(i)
        return i

    results = in_order(count, range(1000), workers=3, ahead=5)
    assert [next(results) for _ in range(10)] == list(range(10))
    results.close()
    assert len(begun) <= 10 + 5 + 1
