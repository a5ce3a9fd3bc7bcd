"""What people hand to the search: every form gives what the plain tensor gives, or is refused with what to do."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from white_patches import LAYER, UNIT, picture, plant_one

from regvit import find_register_neurons
from regvit.data.transform import Transform
from regvit.registers import images as module
from regvit.registers.images import batches_of

COUNT = 16
TRANSFORM = Transform(64, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def planted():
    """A small ViT in which one neuron makes an outlier of the white patch of each picture."""
    torch.manual_seed(0)
    args = {"img_size": 64, "patch_size": 8, "depth": 4, "embed_dim": 64, "num_heads": 4, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **args).eval().requires_grad_(False)
    pictures = [Image.fromarray(picture(i)) for i in range(COUNT)]
    x = torch.stack([TRANSFORM(one) for one in pictures])
    plant_one(model, x)
    return model, x, pictures


def files(folder, pictures):
    for i, one in enumerate(pictures):
        (folder / f"class {i % 2}").mkdir(exist_ok=True, parents=True)
        one.save(folder / f"class {i % 2}" / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


FORMS = {
    "batches": lambda x, pictures, folder: x.split(7),
    "array": lambda x, pictures, folder: x.numpy(),
    "list of images": lambda x, pictures, folder: list(x),
    "list of arrays": lambda x, pictures, folder: list(x.numpy()),
    "loader": lambda x, pictures, folder: DataLoader(x, 5),
    "loader with labels": lambda x, pictures, folder: DataLoader(TensorDataset(x, torch.arange(COUNT)), 5),
    "loader of dicts": lambda x, pictures, folder: DataLoader([{"label": 0, "pixel_values": one} for one in x], 5),
    "shuffled": lambda x, pictures, folder: DataLoader(TensorDataset(x, torch.arange(COUNT)), 5, shuffle=True),
    "generator": lambda x, pictures, folder: iter(x.split(7)),
    "pictures": lambda x, pictures, folder: pictures,
    "paths": lambda x, pictures, folder: sorted(files(folder, pictures).rglob("*.png")),
    "folder": lambda x, pictures, folder: str(files(folder, pictures)),
}


@pytest.fixture(scope="module")
def expected(planted):
    return find_register_neurons(*planted[:2])


@pytest.mark.parametrize("form", FORMS)
def test_images_in_every_form_give_what_the_tensor_gives(planted, expected, form, tmp_path):
    model, x, pictures = planted
    assert expected.selected == {LAYER: (UNIT,)}
    found = find_register_neurons(model, FORMS[form](x, pictures, tmp_path), transform=TRANSFORM)
    assert found.selected == expected.selected
    assert found.detection.threshold == pytest.approx(expected.detection.threshold, rel=1e-5)
    assert found.neurons[0].attribution == pytest.approx(expected.neurons[0].attribution, rel=1e-4)
    assert sorted(found.outlier_fraction) == sorted(expected.outlier_fraction)


def test_without_a_transform_pictures_go_through_the_models_own(planted):
    model, _, pictures = planted
    seen = []
    handle = model.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    find_register_neurons(model, pictures[:4])
    handle.remove()
    crop = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model) | {"input_size": (3, 64, 64)})
    assert any(len(x) == 4 and torch.allclose(x[0], crop(pictures[0]), atol=1e-6) for x in seen)


LOADERS = {
    "shuffled": lambda x: DataLoader(x, 5, shuffle=True),
    "augmented": lambda x: DataLoader(x, 5, collate_fn=lambda part: torch.stack(part) + 0.01 * torch.randn(1)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_that_shuffles_or_augments_is_read_once_and_refused_where_that_takes_too_much(
    planted, kind, monkeypatch
):
    model, x, _ = planted
    assert find_register_neurons(model, LOADERS[kind](x)).selected == {LAYER: (UNIT,)}
    monkeypatch.setattr(module, "KEPT_BYTES", 100_000)
    with pytest.raises(ValueError, match=r"come in another order or changed.*shuffle=False and without augmentation"):
        find_register_neurons(model, LOADERS[kind](x))
    with pytest.raises(ValueError, match="can be gone through only once, and the search goes back to some"):
        find_register_neurons(model, iter(x.split(7)))
    assert find_register_neurons(model, DataLoader(x, 5)).selected == {LAYER: (UNIT,)}


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 3, 64, 64), np.uint8), r"images are torch.uint8 and not normalised; give transform\."),
        (torch.zeros(2, 64, 64, 3), r"\(2, 64, 64, 3\), as if their channels came last; give images.permute\(0, 3, 1, 2\)"),
        (torch.zeros(3, 64, 64), r"images have shape \(3, 64, 64\); expected \(images, channels, height, width\)"),
        ([{"labels": 1}], "a batch has the keys labels; its images are looked for under image, images, pixel_values"),
        ([("a", 1)], "a batch holds a str; expected a tensor"),
        (3, "the images are a int; give a tensor, a list, a folder or a DataLoader"),
        ("no such folder", "no such folder is no folder"),
        (Path(__file__).parent, r"holds no images; their names end in one of .*\.png"),
    ],
)  # fmt: skip
def test_what_is_no_normalised_images_is_refused_with_what_to_do(planted, images, said):
    with pytest.raises(ValueError, match=said):
        find_register_neurons(planted[0], images)


def test_images_that_look_unnormalised_are_named(planted):
    with pytest.warns(UserWarning, match="no value of the images is below 0 .largest 1"):
        batches_of(torch.rand(2, 3, 64, 64).clamp_min(0.01).index_fill(0, torch.tensor(0), 1.0), TRANSFORM)
