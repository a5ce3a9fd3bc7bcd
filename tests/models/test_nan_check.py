"""An image whose tokens turn to NaN in a block stops whatever looks at it, with the image, the array and the layer named."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from regvit.data.batches import Batches
from regvit.data.manifest import Row, read_dataset, write_dataset
from regvit.data.transform import Transform
from regvit.features.dense_features import DenseArrays
from regvit.features.extraction import Options, extract, fill_store
from regvit.features.forward import Forward
from regvit.measures.zeroshot import classify
from regvit.models.backbones import Backbone
from regvit.models.nan_check import BadFeatures, check_finite, where_it_begins
from regvit.models.token_features import Feature, patch_features

COUNT, BAD, LAYER, SIZE = 4, 1, 3, 32
IMAGE = r"image 'id 1' \(images/1\.png\): array "
LAYER_SAID = "it begins in layer 3"


@pytest.fixture
def model():
    """In LAYER one channel of all tokens is NaN of the bad images, those whose upper left pixel is black."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, img_size=SIZE, num_classes=0, dynamic_img_size=True)
    model.eval().requires_grad_(False)
    bad = []

    def look(_, args):
        bad[:] = [(args[0][:, :, 0, 0] < -0.99).all(1)]

    def spoil(_, __, tokens):
        return tokens.masked_fill(bad[0][:, None, None] & (torch.arange(tokens.shape[2]) == 2), torch.nan)

    model.patch_embed.register_forward_pre_hook(look)
    model.blocks[LAYER].register_forward_hook(spoil)
    return model


@pytest.fixture
def backbone(model):
    return Backbone(
        "tiny", model, Transform(SIZE, (0.5,) * 3, (0.5,) * 3), "w" * 64, None, {"architecture": "test_vit"}
    )


@pytest.fixture
def dataset(tmp_path):
    folder, rng = tmp_path / "set", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for i in range(COUNT):
        pixels = rng.integers(1, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        pixels[0, 0] = 0 if i == BAD else 255
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
    boxes = "[[0, 0, 20, 20]]"
    rows = [Row(f"id {i}", f"images/{i}.png", "x", "train", boxes=boxes) for i in range(COUNT)]
    write_dataset(folder, "noise", rows, ["x"], {})
    return read_dataset(folder)


def batches(dataset, backbone, transform=None):
    return Batches(dataset, transform or backbone.transform, batch_size=3)


def images_of(dataset, backbone):
    return torch.cat(list(batches(dataset, backbone)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_extraction_stops_wherever_it_is_computed(tmp_path, backbone, dataset, precision):
    cure = {"float32": "check the weights", "bfloat16": "set extract.precision to float32"}[precision]
    said = rf"'cls', row 1: nan is not a finite number; {LAYER_SAID}; take the image out of the data set, or {cure}"
    with pytest.raises(BadFeatures, match=IMAGE + said):
        extract(tmp_path / "x.zarr", backbone, dataset, precision=precision, options=Options(batch_size=2))
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    ("groups", "array"),
    [(("attention",), "all_queries"), (("norms",), "norms"), (("inside",), "k"), (("patches",), "cls")],
)
def test_what_measurements_read_is_not_kept_of_such_an_image(tmp_path, backbone, dataset, groups, array):
    with pytest.raises(BadFeatures, match=rf"{IMAGE}'{array}', row 1: nan is not a finite number; {LAYER_SAID}"):
        forward = Forward(backbone, DenseArrays(groups, layers=2))
        fill_store(tmp_path / "x.zarr", dataset, forward, {}, Options(batch_size=2))


def test_features_from_before_the_layer_are_sound(tmp_path, backbone, dataset):
    found = patch_features(backbone.model, images_of(dataset, backbone), [Feature("k", LAYER)])  # of its input
    assert found[Feature("k", LAYER)].isfinite().all()


def test_zero_shot_stops_with_the_image_and_the_layer(backbone, dataset):
    classes = torch.nn.functional.normalize(torch.randn(3, 64), dim=1)
    with pytest.raises(BadFeatures, match=rf"{IMAGE}'embedding' is NaN or infinite; {LAYER_SAID}"):
        classify(backbone.model, torch.nn.Identity(), batches(dataset, backbone), classes)
    with pytest.raises(BadFeatures, match=rf"image 1: array 'embedding' .*{LAYER_SAID}"):
        classify(backbone.model, torch.nn.Identity(), [images_of(dataset, backbone)], classes)


def test_what_is_finite_is_looked_at_once_and_passes(model, dataset, backbone):
    images = images_of(dataset, backbone)[2:]
    model.register_forward_pre_hook(lambda *_: pytest.fail("the images went through the model again"))
    check_finite(model, images, {"a": torch.ones(2, 3), "b": torch.full((2, 1, 4), 1e38)})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_image_and_its_first_array_are_named(model, dataset, backbone, value):
    images = images_of(dataset, backbone)
    a, b, c = torch.zeros(4, 2), torch.zeros(4, 2, 2), torch.zeros(4)
    a[3, 1] = b[2, 0, 1] = c[2] = value
    said = (
        "image 12: array 'b' is NaN or infinite; no layer gives it when the image goes through the model alone; check"
    )
    with pytest.raises(BadFeatures, match=said):
        check_finite(model, images, {"a": a, "b": b, "c": c}, start=10)


def test_where_it_begins_is_told_of_every_part_of_a_model():
    def sound():
        torch.manual_seed(0)
        return timm.create_model("test_vit", pretrained=False, img_size=SIZE, num_classes=0).eval()

    image = torch.zeros(1, 3, SIZE, SIZE)
    assert where_it_begins(sound(), image) == "no layer gives it when the image goes through the model alone"
    assert where_it_begins(sound(), image * torch.nan) == "the normalised image has it already"
    begins = {"patch_embed.proj": "the patch embedding", "blocks.0.attn.proj": "layer 0", "norm": "the last norm"}
    for part, said in begins.items():
        model = sound()
        model.get_submodule(part).register_forward_hook(lambda _, __, output: output * torch.inf)
        assert where_it_begins(model, image) == f"it begins in {said}"
        assert not model.blocks[0]._forward_hooks  # no trace is left
