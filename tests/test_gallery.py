import numpy as np
import timm
import torch
from PIL import Image

from regvit.attention import cls_attention
from regvit.gallery import draw_maps, token_maps
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
