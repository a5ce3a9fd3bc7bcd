import numpy as np
import pytest
import timm
import torch
from PIL import Image

from regvit.models.attention import cls_attention
from regvit.models.tokens import TokenLayout
from regvit.registers.outliers import Detection, patch_norms
from regvit.registers.test_time import add_test_time_registers
from regvit.report.look import Look, View, _maps, draw_look, feature_colours, look

NEURONS = {1: (3, 8)}


def pixels(size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(size: int = 64) -> torch.Tensor:
    return pixels(size)[None].float() / 128 - 1


def view(norms, attention=None, features=None, on_registers=0.0) -> View:
    count = len(norms)
    attention = np.full(count, 1 / count) if attention is None else attention
    features = np.random.default_rng(0).normal(size=(count, 5)) if features is None else features
    return View(np.array(norms, dtype=np.float32), np.array(attention), on_registers, np.array(features, np.float32))


def seen(before: View, after: View | None = None, threshold: float | None = 10.0, num_registers: int = 1) -> Look:
    return Look(np.zeros((8, 8, 3), np.uint8), before, after, 2, threshold, (3, 4), num_registers)


def test_a_look_holds_norms_attention_and_features_of_both_models(tiny_vit):
    model = tiny_vit()
    x = normalised()
    norms = patch_norms(model, [x], [2])[0, 0]
    detection = Detection(2, float(np.sort(norms)[-4]), 0.5)  # three outliers
    found = look(model, pixels(), x, detection, NEURONS)
    assert found.later == (2, 3, 4, 5)  # the blocks after the last register neuron
    assert found.outliers.sum() == 3
    assert np.allclose(found.before.norms, norms)
    attention = cls_attention(model, x, [2, 3, 4, 5]).mean(0)[0]
    assert np.allclose(found.before.attention, attention[1:], atol=1e-6)
    assert found.attention_on_outliers(found.before) == pytest.approx(float(attention[1:][found.outliers].sum()), 1e-5)
    assert found.before.on_registers == 0
    with add_test_time_registers(model, NEURONS, 1), torch.no_grad():
        tokens = TokenLayout.of(model).patches(model.forward_features(x))[0]
        treated = cls_attention(model, x, [2, 3, 4, 5]).mean(0)[0]
    assert np.allclose(found.after.features, tokens, atol=1e-6)
    assert found.after.on_registers == pytest.approx(float(treated[1]), rel=1e-4)
    assert getattr(model, "test_time_registers", None) is None


def test_the_lines_give_the_figures():
    before = view([1, 2, 3, 40], [0.1, 0.1, 0.1, 0.5])
    after = view([1, 2, 3, 4], [0.1, 0.1, 0.1, 0.02], on_registers=0.25)
    assert seen(before, after).sentences() == [
        "1 of 4 patches are outliers: norm over 10 after block 2 (largest norm 40, median 2.5); 0 with 1 register",
        "CLS attention on them, blocks 3 to 4: 50.0%, then 2.0%; 25.0% on 1 register",
    ]
    assert seen(before).sentences()[1] == "no register neurons are known, so nothing was moved"


def test_an_image_without_outliers_is_said_to_have_none():
    quiet = view([1, 2, 3, 4])
    assert seen(quiet, quiet).sentences() == [
        "no outliers: none of 4 patches has a norm over 10 after block 2 (largest norm 4, median 2.5)"
    ]
    assert seen(quiet, threshold=None).sentences() == [
        "no outliers were found (after block 2: largest norm 4, median 2.5)"
    ]


def test_colours_are_the_first_three_principal_components_of_the_normal_patches():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(16, 6)) * [9, 5, 3, 0.1, 0.1, 0.1]
    features[5] = 1e3  # an outlier
    norms = np.where(np.arange(16) == 5, 99.0, 1.0)
    (rgb,) = feature_colours(seen(view(norms, features=features)))
    normal = np.delete(features, 5, axis=0)
    values, vectors = np.linalg.eigh(np.cov(normal.T, bias=True))
    for channel in range(3):
        axis = vectors[:, np.argsort(values)[-1 - channel]]
        projected = (normal - normal.mean(0)) @ axis
        inside = (np.delete(rgb, 5, axis=0)[:, channel] > 0) & (np.delete(rgb, 5, axis=0)[:, channel] < 1)
        correlation = np.corrcoef(projected[inside], np.delete(rgb, 5, axis=0)[inside, channel])[0, 1]
        assert abs(correlation) == pytest.approx(1, abs=1e-5)
    assert set(rgb[5]) <= {0.0, 1.0}  # clipped, and without a say in the basis


def test_both_columns_share_one_basis_and_one_scale():
    features = np.random.default_rng(1).normal(size=(16, 6))
    changed = features.copy()
    changed[3] += 1
    before, after = feature_colours(seen(view([1.0] * 16, features=features), view([1.0] * 16, features=changed)))
    same = np.arange(16) != 3
    assert np.array_equal(before[same], after[same])
    assert not np.allclose(before[3], after[3])


@pytest.mark.parametrize("patches", [1, 4])
def test_colours_exist_where_there_are_hardly_any_patches_or_all_are_alike(patches):
    (rgb,) = feature_colours(seen(view([1.0] * patches, features=np.ones((patches, 5)))))
    assert rgb.shape == (patches, 3)
    assert np.isfinite(rgb).all()


@pytest.mark.parametrize("treated", [True, False])
def test_the_picture_fits_a_phone_and_has_the_same_bytes_each_time(tmp_path, tiny_vit, treated):
    model = tiny_vit()
    norms = patch_norms(model, [normalised()], [2])[0, 0]
    found = look(
        model, pixels(), normalised(), Detection(2, float(np.sort(norms)[-4]), 0.5), NEURONS if treated else {}
    )
    for name in ("a.png", "deep/b.png"):
        draw_look(tmp_path / name, found, "tiny")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "deep" / "b.png").read_bytes()
    picture = Image.open(tmp_path / "a.png")
    assert picture.width == 1024
    assert picture.height > picture.width
    frames = (np.array(picture.convert("RGB")) == (0, 200, 224)).all(-1)  # the colour around outliers
    assert frames.any()


def test_norms_show_relief_up_to_the_normal_patches_and_outliers_in_the_colour_of_their_frames():
    before = view([*np.linspace(1.4, 2.2, 15), 117.0])
    maps = _maps(seen(before, view(np.linspace(1.4, 2.2, 16))))[0]
    norms = maps[0].panel["X"].reshape(16, 3)
    assert np.allclose(norms[15], np.array([0, 200, 224]) / 255)
    assert norms[14].min() > 0.7 and norms[0].max() < 0.02  # from the dark to the bright end of magma
    # one scale for both: of the 31 normal patches the two largest are 2.2, and so is their 99 % quantile
    assert maps[1].caption.startswith("after: 1.4 to 2.2+, largest 2.2")
    (alone,) = _maps(seen(before))[0]
    assert alone.caption.startswith("1.4 to 2.19+, largest 117")


def test_no_frame_is_drawn_where_nothing_is_an_outlier(tmp_path, tiny_vit):
    found = look(tiny_vit(), pixels(), normalised(), None, {})
    assert (found.layer, found.threshold, found.after) == (4, None, None)  # the last block but one
    draw_look(tmp_path / "a.png", found, "tiny")
    assert not (np.array(Image.open(tmp_path / "a.png").convert("RGB")) == (0, 200, 224)).all(-1).any()


def test_a_model_without_cls_is_drawn_without_attention(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit2", pretrained=False, dynamic_img_size=True).eval()  # one register, no CLS
    found = look(model, pixels(), normalised(), Detection(1, 0.0, 0.5), NEURONS)
    assert found.before.attention is None
    assert len(found.sentences()) == 1
    draw_look(tmp_path / "a.png", found, "no CLS")
    assert Image.open(tmp_path / "a.png").width == 1024


def test_neurons_of_another_model_are_refused(tiny_vit):
    with pytest.raises(
        ValueError, match=r"detection layer is 9, but the model has 6 blocks \(0 to 5\); give the neurons"
    ):
        look(tiny_vit(), pixels(), normalised(), Detection(9, 1.0, 0.5), NEURONS)
    with pytest.raises(ValueError, match="num_registers is 0; expected 1 or more"):
        look(tiny_vit(), pixels(), normalised(), None, NEURONS, 0)
