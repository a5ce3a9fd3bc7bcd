import numpy as np
import pytest
import timm
import torch
from PIL import Image

from regvit.attention import cls_attention, prefix_attention
from regvit.gallery import as_picture, attention_maps, draw_attention, draw_maps, first_images, token_maps
from regvit.images import Transform
from regvit.manifest import Row, read_dataset, write_dataset
from regvit.outliers import patch_norms


def test_maps_are_norms_and_attention_in_reading_order():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False).eval()
    x = torch.randn(2, 3, 160, 160)
    maps = token_maps(model, x, 3, [4, 5])
    assert np.allclose(maps.norms, patch_norms(model, [x], [3])[0].reshape(2, 10, 10))
    assert np.allclose(maps.attention, cls_attention(model, x, [4, 5]).mean(0)[:, 1:].reshape(2, 10, 10), atol=1e-6)


def test_the_picture_has_a_row_an_image_and_the_same_bytes_each_time(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False).eval()
    maps = {"original": token_maps(model, torch.randn(2, 3, 160, 160), 3, [5])}
    for name in ("a.png", "b.png"):
        draw_maps(tmp_path / name, np.random.default_rng(0).random((2, 16, 16, 3)), maps, 10.0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    width, height = Image.open(tmp_path / "a.png").size
    assert 1.1 < width / height < 1.6  # three columns, two rows


def test_each_prefix_token_has_a_map_in_reading_order(tiny_vit, noise_images):
    model, images = tiny_vit(registers=2), noise_images(2)
    maps = attention_maps(model, images, [3, 5])
    assert list(maps) == ["cls", "register_0", "register_1"]
    expected = prefix_attention(model, images, [3, 5]).mean((0, 2))[:, 2, 3:].reshape(2, 8, 8)
    assert np.allclose(maps["register_1"], expected, atol=1e-6)


def test_a_model_without_prefix_tokens_has_no_maps_and_the_picture_shows_the_images(tiny_vit, noise_images, tmp_path):
    assert attention_maps(tiny_vit(cls=False), noise_images(1), [3]) == {}
    draw_attention(tmp_path / "a.png", np.zeros((2, 8, 8, 3)), {})
    width, height = Image.open(tmp_path / "a.png").size
    assert height > 2 * width


def test_attention_is_drawn_with_a_column_a_map_and_the_same_bytes_each_time(tmp_path):
    rng = np.random.default_rng(0)
    images, columns = rng.random((2, 8, 8, 3)), {name: rng.random((2, 4, 4)) for name in ("cls", "register_0")}
    for name in ("a.png", "b.png"):
        draw_attention(tmp_path / name, images, columns)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    width, height = Image.open(tmp_path / "a.png").size
    assert 1.2 < width / height < 1.6  # three columns, two rows and a title


def test_the_first_images_are_those_of_the_manifest_and_drawn_from_zero_to_one(tmp_path):
    for name, value in (("a", 255), ("b", 51), ("c", 0)):
        Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    write_dataset(tmp_path, "made", [Row(name, f"{name}.png", "", "test") for name in "abc"], [], {})
    pixels = first_images(read_dataset(tmp_path), Transform(4, (0, 0, 0), (1, 1, 1)), 2)
    assert pixels.shape == (2, 3, 4, 4)
    assert as_picture(pixels).shape == (2, 4, 4, 3)
    assert as_picture(pixels).reshape(2, -1).mean(1) == pytest.approx([1.0, 0.2])
