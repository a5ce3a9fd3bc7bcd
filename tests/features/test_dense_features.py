import pytest
import torch

from regvit.features.dense_features import DenseArrays, mean_embedding, patch_embeddings
from regvit.features.dense_set import GROUPS
from regvit.models.attention import prefix_attention
from regvit.models.query_attention import watch_query_attention
from regvit.models.token_features import Feature, patch_features
from regvit.registers.neighbourhood import low_information, neighbour_cosine
from regvit.registers.outliers import Detection, patch_norms
from regvit.registers.test_time import add_test_time_registers


def test_every_array_is_what_a_forward_of_its_own_would_give(tiny_vit, noise_images):
    model, images = tiny_vit(registers=1), noise_images(3)
    found = DenseArrays(GROUPS, layers=2, centre=torch.zeros(64))(model, images)
    tokens = model.forward_features(images)
    for name, expected in (("cls", tokens[:, 0]), ("registers", tokens[:, 1:2]), ("patches", tokens[:, 2:])):
        torch.testing.assert_close(found[name], expected)
    norms = torch.from_numpy(patch_norms(model, [images])).swapaxes(0, 1)
    torch.testing.assert_close(found["norms"], norms)
    torch.testing.assert_close(found["attention"], prefix_attention(model, images).swapaxes(0, 1))
    with watch_query_attention(model) as over_all:
        model.forward_features(images)
    torch.testing.assert_close(found["all_queries"], torch.stack([over_all[layer] for layer in range(6)], dim=1))
    for kind in ("k", "q", "v", "token"):
        features = [Feature(kind, layer) for layer in (4, 5)]
        expected = torch.stack(list(patch_features(model, images, features).values()), dim=1)
        torch.testing.assert_close(found[kind], expected)
    torch.testing.assert_close(found["neighbours"][:, 0], neighbour_cosine(patch_embeddings(model, images)))
    assert not found["outliers"].any()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_centred_embeddings_rank_information_as_planting_does(tiny_vit, noise_images):
    model, images = tiny_vit(), noise_images(6)
    centre = mean_embedding(model, images.split(4))
    found = DenseArrays(("norms",), centre=centre)(model, images)["neighbours"][:, 1]
    torch.testing.assert_close(found, low_information(model, images), atol=1e-5, rtol=1e-5)


def test_norms_are_the_runs_and_outliers_the_untreated_models(tiny_vit, noise_images):
    plain, treated, images = tiny_vit(), tiny_vit(), noise_images(5)
    add_test_time_registers(treated, {1: (3, 9)}, 1)
    before, after = (torch.from_numpy(patch_norms(model, [images])[3]) for model in (plain, treated))
    detection = Detection(3, float(before.quantile(0.9)), 0.0)
    found = DenseArrays(("norms",), 1, detection, plain)(treated, images)
    torch.testing.assert_close(found["norms"][:, 3], after)
    assert torch.equal(found["outliers"], before > detection.threshold)
    assert torch.equal(DenseArrays((), 1, detection)(plain, images)["outliers"], found["outliers"])


def test_what_a_model_lacks_is_left_out_and_strange_groups_are_refused(tiny_vit, noise_images):
    found = DenseArrays(("patches", "attention"))(tiny_vit(cls=False), noise_images(1))
    assert found.keys() == {"outliers", "patches", "all_queries"}
    with pytest.raises(ValueError, match=r"arrays \['keys'\] are unknown; expected some of patches, norms"):
        DenseArrays(("keys",))
    with pytest.raises(ValueError, match="no images to look into"):
        mean_embedding(tiny_vit(), [])
