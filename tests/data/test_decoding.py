import hashlib
import pickle

import numpy as np
import pytest
import torch
from made_images import MEAN, STD, noise
from PIL import Image

from regvit.data import decoding
from regvit.data.decoding import ChangedImage, UnreadableImage, read_rgb, to_rgb
from regvit.data.transform import Transform


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


def test_an_error_of_another_process_comes_back_as_it_was():
    error = pickle.loads(pickle.dumps(UnreadableImage("x.png", "empty file")))
    assert str(error) == "x.png cannot be read as an image: empty file; replace the file or take it out of the data set"
    assert (str(error.path), error.reason) == ("x.png", "empty file")
    changed = pickle.loads(pickle.dumps(ChangedImage("x.png", "it differs")))
    assert type(changed) is ChangedImage and str(changed).startswith(
        "x.png is not the file that the data set was made of"
    )


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
