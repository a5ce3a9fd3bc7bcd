import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import MEAN, STD, noise
from PIL import Image
from timm.data import create_transform

from regvit.data.transform import Transform


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


def test_a_whole_image_is_squashed_and_nothing_of_it_is_cropped():
    pixels = np.zeros((50, 100, 3), np.uint8)
    pixels[:, :50, 0] = pixels[:, 50:, 2] = 255  # left half red, right half blue
    whole = Transform(64, MEAN, STD, crop_pct=0.875).whole()
    squashed = np.asarray(whole.crop(Image.fromarray(pixels)))
    assert squashed[:, :30, 0].min() == 255 and squashed[:, 34:, 2].min() == 255
    square = noise(90, 90)
    assert whole.crop(square).tobytes() == Transform(64, MEAN, STD).crop(square).tobytes()


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
