"""What holds for every cure: it treats each image for itself, says how far it changes one without outliers, and goes again."""

import copy
import pickle

import numpy as np
import pytest
import torch
from stock_models import features, images, make

from regvit.registers.cures.cure import FILES, add_cure, remove_cure
from regvit.registers.cures.options import CURES, parse_cure
from regvit.registers.export import TokenOutputs
from regvit.registers.neurons import RegisterNeurons, find_register_neurons
from regvit.registers.outliers import Detection, patch_norms
from regvit.registers.planting import plant
from regvit.registers.test_time import add_test_time_registers, remove_test_time_registers

EVERY = [
    *CURES,
    {"name": "mask_attention", "queries": "cls"},
    {"name": "interpolate", "at": "output"},
    {"name": "remove_direction", "direction": "outliers"},
    {"name": "prefix_kv", "tokens": 3},
    {"name": "constant_registers", "content": "noise"},
    {"name": "constant_registers", "content": "other"},
]
QUICK = {"average_views": {"views": 2}, "interpolate_lof": {"neighbours": 5}, "remove_direction": {"samples": 300}}
EACH = pytest.mark.parametrize("cure", EVERY, ids=str)


@pytest.fixture(scope="module")
def planted(tiny_vit, noise_images):
    """A model with outliers in nearly all of these images, and what a search finds in it."""
    model, x = tiny_vit(3, depth=3), noise_images(16)
    plant(model, x, seed_layer=0, amplifier_layer=1, edit_keys=True)
    return model, x, find_register_neurons(model, x)


@pytest.fixture(scope="module")
def cured_once(planted):
    """The planted model with a cure, the same one whenever it is asked for: not to be changed."""
    made = {}

    def once(cure):
        if str(cure) not in made:
            made[str(cure)] = cured(planted, cure)
        return made[str(cure)]

    return once


def cured(planted, cure):
    """A copy of the planted model with a cure."""
    model, x, found = planted
    model, name = copy.deepcopy(model), parse_cure(cure)[0]
    if name == "constant_registers":
        add_test_time_registers(model, found)
    options = {"name": cure} if isinstance(cure, str) else cure
    add_cure(model, {**QUICK.get(name, {}), **options}, found, images=x)
    return model


def test_every_file_of_a_cure_is_among_the_options_and_the_other_way_round():
    assert FILES.keys() == CURES.keys()
    assert all(hasattr(FILES[name], "calibrate") == ("images" in cure.needs) for name, cure in CURES.items())


@EACH
def test_each_image_is_treated_for_itself(planted, cured_once, cure):
    model, x = cured_once(cure), planted[1]
    alone = torch.cat([features(model, image[None]) for image in x[:5]])
    assert torch.equal(features(model, x[:5]), alone)
    of_the_model = [0, *range(-64, 0)]  # CLS and patches
    assert not torch.equal(alone[:, of_the_model], features(planted[0], x[:5])[:, of_the_model])  # it does something


@EACH
def test_what_is_removed_is_gone_to_the_bit(planted, cure):
    model, plain = cured(planted, cure), planted[0]
    assert model.state_dict().keys() == plain.state_dict().keys()
    remove_cure(model)
    remove_cure(model)
    remove_test_time_registers(model)
    assert torch.equal(features(model, planted[1]), features(plain, planted[1]))
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert dict(ours.named_buffers(recurse=False)).keys() == dict(theirs.named_buffers(recurse=False)).keys()


def without_outliers(cure):
    """How far a cure says that it changes an image without outliers; None: it changes every one."""
    return CURES[parse_cure(cure)[0]].without_outliers


@pytest.mark.parametrize("cure", [cure for cure in EVERY if without_outliers(cure) is not None], ids=str)
def test_an_image_without_outliers_changes_by_no_more_than_the_cure_says(planted, cured_once, cure):
    model, x, _ = planted
    said = without_outliers(cure)
    none = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    plain, after = features(model, none), features(cured_once(cure), none)
    assert torch.allclose(after, plain, rtol=0, atol=said * float(plain.abs().max()))
    assert not torch.allclose(features(cured_once(cure), x), features(model, x), atol=1e-3)


@EACH
def test_copies_and_pickles_are_cured_too(planted, cured_once, cure):
    model, x = cured_once(cure), planted[1][:3]
    expected = features(model, x)
    assert torch.equal(features(copy.deepcopy(model), x), expected)
    assert torch.equal(features(pickle.loads(pickle.dumps(model)), x), expected)
    half = features(copy.deepcopy(model).to(torch.bfloat16), x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


LIKE_ANOTHER = {"recursive", "remove_direction", "interpolate"}  # compiled as test-time registers, or clip_norm


@pytest.fixture(params=sorted(CURES.keys() - LIKE_ANOTHER))
def small_cured(request, tiny_vit, noise_images):
    """Two blocks with a cure, and images of which some have outliers."""
    model, x = tiny_vit(1, depth=2), noise_images(5)
    norms = patch_norms(model, [x], [0])[0]
    found = RegisterNeurons(Detection(0, float(np.quantile(norms, 0.98)), 1.0), (), selected={0: (1, 2)})
    if request.param == "constant_registers":
        add_test_time_registers(model, found)
    add_cure(model, {"name": request.param, **QUICK.get(request.param, {})}, found, images=x)
    return model, x


def test_compiled_models_are_cured_too(small_cured):
    model, x = small_cured
    torch.compiler.reset()
    compiled = torch.compile(model.forward_features, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), features(model, x), atol=1e-5)


def test_a_graph_of_a_cured_model_gives_what_the_model_gives(small_cured):
    outputs, x = TokenOutputs(small_cured[0]).eval(), small_cured[1]
    with torch.no_grad():
        graph = torch.export.export(outputs, (x[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        for some in (x[:5], x[:1]):
            for ours, theirs in zip(graph(some), outputs(some), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-4)


NARROW = {"embed_dim": 96, "num_heads": 3}
STOCK = {
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 3},
    "deit3_small_patch16_224": {"img_size": 64, "depth": 3, **NARROW},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "depth": 3, **NARROW},
    "vit_small_patch16_dinov3": {"img_size": 64, "depth": 3, **NARROW},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 3},
    "vit_base_patch16_siglip_224": {"img_size": 64, "depth": 3, **NARROW},
    "vit_base_patch16_clip_224": {"img_size": 64, "depth": 3, **NARROW},
    "beit3_base_patch16_224": {"img_size": 64, "depth": 3, **NARROW},
}


@pytest.mark.parametrize("name", STOCK)
def test_cures_work_on_the_families_of_vision_transformers(name):
    model = make(name, num_classes=0, **STOCK[name])
    x = images(model, 3)
    plain = features(model, x)
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out))
    features(model, x)
    handle.remove()
    norms = seen[0][:, model.num_prefix_tokens :].norm(dim=-1)
    threshold = float(norms.flatten().sort().values[-3:-1].mean())  # two patches of all images are over it
    found = RegisterNeurons(Detection(1, threshold, 1.0), (), selected={0: (1, 2)})
    for cure in CURES:
        if cure == "recursive" or (cure == "constant_registers" and "reg4" not in name and "dinov3" not in name):
            continue
        with add_cure(model, {"name": cure, **QUICK.get(cure, {})}, found, images=x):
            after = features(model, x)
            assert after.shape == plain.shape
            assert after.isfinite().all()
            assert not torch.allclose(after, plain, atol=1e-6), cure
            assert torch.equal(features(model, x[1:2]), after[1:2]), cure
        assert torch.equal(features(model, x), plain)


@pytest.mark.parametrize(
    ("cure", "message"),
    [
        ("mask_atention", "cure is 'mask_atention'; did you mean 'mask_attention'"),
        (3, "cure is 3; Expected one of recursive, ablate"),
        ({"name": "clip_norm", "at": "output"}, "cure clip_norm has no option 'at': it has none"),
        ({"name": "interpolate", "at": "end"}, "at of cure interpolate is 'end'; expected detection or output"),
        ({"name": "average_views", "shift": 1.5}, "shift of cure average_views is 1.5; expected a share over 0 and below 1"),
    ],
)  # fmt: skip
def test_an_unknown_cure_or_option_is_named(cure, message):
    with pytest.raises(ValueError, match=message):
        parse_cure(cure)


def test_what_a_cure_cannot_treat_is_said_by_name(planted, tiny_vit):
    _, x, found = planted
    with pytest.raises(ValueError, match="has no CLS token; mask_attention needs queries: all"):
        add_cure(tiny_vit(cls=False), "mask_attention", found, queries="cls")
    with pytest.raises(ValueError, match="has no registers, trained or test-time"):
        add_cure(tiny_vit(), "constant_registers", found, images=x)
    with pytest.raises(ValueError, match="cure clip_norm needs what a search found"):
        add_cure(tiny_vit(), "clip_norm")
    with pytest.raises(ValueError, match="cure prefix_kv is measured on images first"):
        add_cure(tiny_vit(), "prefix_kv", found)
    with pytest.raises(ValueError, match="63 patches form no square grid"):
        features_of = cured(planted, "interpolate_lof")
        features_of.blocks[1](torch.randn(1, 64, 64))
    once = cured(planted, "clip_norm")
    with pytest.raises(ValueError, match="has the cure clip_norm already; call remove_cure"):
        add_cure(once, "ablate", found)
    with pytest.raises(ValueError, match="which comes after registers; call remove_cure"):
        add_test_time_registers(once, found)
    registers = cured(planted, "constant_registers")
    with pytest.raises(ValueError, match="was added after the registers; call remove_cure"):
        remove_test_time_registers(registers)
    post_norm = make("vit_relpos_small_patch16_224", num_classes=0, depth=2)
    with pytest.raises(ValueError, match="takes no attn_mask"):
        add_cure(post_norm, "mask_attention", RegisterNeurons(Detection(0, 1.0, 1.0), ()))
    assert type(post_norm.blocks[0]).__name__ == "RelPosBlock"


def test_where_a_search_found_no_outliers_a_cure_of_outliers_changes_nothing_and_says_so(tiny_vit, noise_images):
    model, x = tiny_vit(), noise_images(2)
    plain = features(model, x)
    with pytest.warns(UserWarning, match="the model has no outliers, so interpolate changes nothing"):
        add_cure(model, "interpolate", RegisterNeurons(None, ()))
    assert torch.equal(features(model, x), plain)
