"""Zero-shot with a small open_clip model of random weights, saved as open_clip saves its own."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from run_example import write_run
from safetensors.torch import save, save_file
from stage_runner import run_stage
from timm.models.vision_transformer import checkpoint_filter_fn

from regvit.data.manifest import Row, write_dataset
from regvit.data.transform import Transform
from regvit.measures.zeroshot import (
    TEMPLATES,
    TextTowerError,
    among_first,
    check_same_tower,
    class_embeddings,
    classify,
    embed_images,
    names_of,
    open_text_tower,
)
from regvit.models.backbones import load_backbone, save_backbone
from regvit.registers.run_files import Variant
from regvit.registers.test_time import add_test_time_registers
from regvit.stats.accuracy import accuracy, paired_accuracy_difference
from regvit.stats.figures import read_figures

SIZE, WIDTH, DEPTH = 64, 64, 3
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
VISION = {"image_size": SIZE, "layers": DEPTH, "width": WIDTH, "head_width": 32, "patch_size": 16}
ARCHITECTURES = {True: "vit_base_patch16_clip_quickgelu_224", False: "vit_base_patch16_clip_224"}
ARGS = {"img_size": SIZE, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "num_classes": 0}
NAMES = ["red apple", "blue whale", "tree", "car", "house", "tiny dog", "sun"]


def images(count: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def save_clip(folder: Path, quick: bool, seed: int = 0) -> Path:
    """A folder as open_clip reads it with `local-dir:`."""
    config = {"embed_dim": 48, "quick_gelu": quick, "vision_cfg": VISION, "text_cfg": TEXT}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
        for name, value in model.named_parameters():  # at its initialisation blocks add hardly anything to CLS
            factors = {"mlp.c_fc.weight": 2, "mlp.c_proj.weight": 20, "attn.out_proj.weight": 20}
            value.data *= next((factor for end, factor in factors.items() if name.endswith(end)), 1)
        proj, model.visual.proj = model.visual.proj, None
        with torch.no_grad():  # what all images have in common is projected out, or all would be of one class
            common = torch.nn.functional.normalize(model.eval().encode_image(images()).mean(0), dim=0)
            proj -= torch.outer(common, common @ proj)
        model.visual.proj = proj
    folder.mkdir(parents=True)
    text = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(text))
    state = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def save_tower(folder: Path, clip_folder: Path, architecture: str, **args: int):
    """The image tower of that model, as the backbone stage saves timm's."""
    model = timm.create_model(architecture, pretrained=False, **(ARGS | args)).eval()
    whole = open_clip.create_model(f"local-dir:{clip_folder}").state_dict()
    state = checkpoint_filter_fn(whole, model)
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("head.")})
    transform = Transform(model.patch_embed.img_size[0], (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    save_backbone(
        folder, model, name=folder.name, architecture=architecture, model_args=ARGS | args, transform=transform,
        source="random weights", licence="MIT",
    )  # fmt: skip
    return load_backbone(folder)


@pytest.fixture(scope="module", params=[True, False], ids=["quick_gelu", "gelu"])
def pair(request, tmp_path_factory):
    """The taken-apart CLIP, the timm backbone, and open_clip's own whole model."""
    folder = tmp_path_factory.mktemp("clip")
    clip_folder = save_clip(folder / "text", request.param)
    backbone = save_tower(folder / "tower", clip_folder, ARCHITECTURES[request.param])
    return open_text_tower(f"folder:{clip_folder}"), backbone, open_clip.create_model(f"local-dir:{clip_folder}").eval()


@pytest.mark.parametrize("templates", ["openai", "simple"])
def test_the_prompt_ensemble_is_open_clips(pair, templates):
    clip, _, whole = pair
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    expected = open_clip.build_zero_shot_classifier(whole, tokenizer, NAMES, TEMPLATES[templates])  # (e, c)
    ours = class_embeddings(clip, NAMES, TEMPLATES[templates])
    assert (ours.T - expected).abs().max() < 1e-5
    assert len(TEMPLATES["openai"]) == 80
    assert TEMPLATES["openai"][0]("dog") == "a bad photo of a dog."


def test_a_text_tower_that_gives_nan_is_refused_naming_the_class(pair, monkeypatch):
    clip = pair[0]
    one = torch.ones(1, 8)
    monkeypatch.setattr(clip.model, "encode_text", lambda texts: torch.cat([one, one * torch.nan, one]))
    with pytest.raises(TextTowerError, match="gives NaN or infinity for class 'dog'; get its weights again"):
        class_embeddings(clip, ["cat", "dog", "eel"], [str])


def test_zero_shot_with_timms_tower_is_open_clips(pair):
    clip, backbone, whole = pair
    x = images()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    classes = open_clip.build_zero_shot_classifier(whole, tokenizer, NAMES, TEMPLATES["simple"])
    with torch.no_grad():
        expected = (whole.encode_image(x, normalize=True) @ classes).numpy()
    ours = classify(backbone.model, clip.projection, x.split(5), class_embeddings(clip, NAMES, TEMPLATES["simple"]))
    assert np.abs(ours - expected).max() < 1e-5
    assert (ours.argmax(1) == expected.argmax(1)).all()
    assert check_same_tower(clip, backbone) > 0.99999


def test_a_tower_of_the_other_activation_is_refused(tmp_path):
    folder = save_clip(tmp_path / "text", quick=True)
    backbone = save_tower(tmp_path / "tower", folder, ARCHITECTURES[False])
    with pytest.raises(TextTowerError, match=r"tower and the image tower of folder:text disagree .*clip_quickgelu_"):
        check_same_tower(open_text_tower(f"folder:{folder}"), backbone)


def test_a_tower_of_other_weights_or_width_is_refused(pair, tmp_path):
    clip, backbone, _ = pair
    other = save_tower(tmp_path / "other", save_clip(tmp_path / "text", True, seed=1), ARCHITECTURES[True])
    with pytest.raises(TextTowerError, match="take both from the same checkpoint"):
        check_same_tower(clip, other)
    wide = dataclasses.replace(backbone, model=timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=0))
    with pytest.raises(TextTowerError, match=r"does not fit backbone tower \(192 channels\)"):
        check_same_tower(clip, wide)
    larger = dataclasses.replace(backbone, transform=dataclasses.replace(backbone.transform, size=96))
    assert check_same_tower(clip, larger) is None  # of another image size: not compared


@pytest.mark.parametrize("projection", ["linear", "none", ""])
def test_open_clip_models_around_a_timm_tower_work_too(tmp_path, projection):
    size = {"none": 64}  # test_vit is 64 wide: without a projection the shared space is as wide
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": projection, "image_size": 160}
    config = {"embed_dim": size.get(projection, 48), "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}
    torch.manual_seed(0)
    whole = open_clip.CustomTextCLIP(**{key: value for key, value in config.items() if key != "custom_text"}).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(dict(whole.state_dict()), tmp_path / "open_clip_model.safetensors")
    tower = timm.create_model("test_vit", num_classes=0).eval()
    own = {n: v for n, v in whole.visual.trunk.state_dict().items() if not n.startswith("head.")}
    tower.load_state_dict(own)
    x = torch.randn(3, 3, 160, 160)
    with torch.no_grad():
        expected = whole.encode_image(x, normalize=True)
    clip = open_text_tower(f"folder:{tmp_path}")
    assert (embed_images(tower, clip.projection, x) - expected).abs().max() < 1e-5


def test_a_checkpoint_file_opens_with_the_name_of_its_model(tmp_path, monkeypatch):
    folder = save_clip(tmp_path / "text", quick=False)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    opened = open_text_tower(f"file:small-clip:{folder / 'open_clip_model.safetensors'}")
    assert torch.equal(opened.projection.weight, open_text_tower(f"folder:{folder}").model.visual.proj)
    assert opened.label == "file:small-clip:open_clip_model.safetensors"  # no absolute path goes into the metrics


def test_a_text_tower_that_cannot_be_had_is_refused(tmp_path):
    folder = save_clip(tmp_path / "text", quick=False)
    config, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    config.write_text(config.read_text().replace('"embed_dim": 48', '"embed_dim": 40'))
    with pytest.raises(TextTowerError, match=r"Error.s. in loading state_dict for CLIP"):
        open_text_tower(f"folder:{folder}")
    weights.unlink()
    for source, message in (
        (f"folder:{folder}", "holds no weights"),  # rather than random ones
        ("folder:/nowhere", "/nowhere has no open_clip_config.json"),
        (f"file:ViT-B-16:{weights}", r"open_clip_model.safetensors does not exist"),
        ("clip", "text tower 'clip' is unknown; use folder:<path>"),
        ("hub:ViT-B-16/openai", "were trained with QuickGELU, .* say hub:ViT-B-16-quickgelu/openai"),
        ("hub:ViT-B-16/nothing", r"no weights 'nothing' for 'ViT-B-16' \(openai, laion"),
        ("hub:ViT-Z/openai", r"no weights 'openai' for 'ViT-Z' \(no such model\)"),
    ):
        with pytest.raises(TextTowerError, match=message):
            open_text_tower(source)


def test_wordnet_ids_become_the_curated_names_and_words_lose_their_underscores():
    assert names_of(["n01440764", "n01443537", "n15075141"]) == ["tench", "goldfish", "toilet paper"]
    assert names_of(["smileys_emotion", "Food & Drink"]) == ["smileys emotion", "Food & Drink"]
    with pytest.raises(ValueError, match="class 'n00000001' is not one of ImageNet-1k's 1,000"):
        names_of(["n01440764", "n00000001"])


def test_an_image_counts_in_the_first_five_if_fewer_than_five_classes_are_nearer():
    cosines = np.array([[6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1.0]])
    assert among_first(cosines, np.array([4, 5, 4, 5])).tolist() == [True, False, True, False]
    assert among_first(cosines[:1], np.array([1]), k=1).tolist() == [False]


def test_the_stage_gives_accuracy_with_and_without_registers_and_the_paired_difference(tmp_path):
    clip_folder = save_clip(tmp_path / "text", quick=True)
    backbone = save_tower(tmp_path / "data/backbones/tower", clip_folder, ARCHITECTURES[True])
    rng = np.random.default_rng(0)
    (tmp_path / "data/mine").mkdir()
    rows = []
    for i in range(40):
        pixels = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)  # as many colours
        Image.fromarray(pixels).save(tmp_path / f"data/mine/{i}.png")
        rows.append(Row(str(i), f"{i}.png", NAMES[i % 7] if i < 36 else "", "train" if i < 4 else "test"))
    write_dataset(tmp_path / "data/mine", "mine", rows, NAMES, {})
    for name, variant in {"plain": ("none", 0), "cured": ("test_time", 1)}.items():
        run_file, selected = tmp_path / f"features/runs/{name}.json", {0: (1, 2), 1: (3, 5)}
        write_run(run_file, tmp_path / "data/backbones" / backbone.name, Variant(*variant, scale=100.0), selected)
    options = SimpleNamespace(text={"tower": f"folder:{clip_folder}"}, templates="simple")
    found, images = {}, {}
    for name in ("plain", "cured"):
        run_stage(tmp_path, SimpleNamespace(zeroshot=options), "zeroshot", name, "mine")
        folder = tmp_path / f"metrics/runs/{name}/zeroshot/mine"
        found[name] = read_figures(folder / "figures.csv").set_index("metric")
        images[name] = pd.read_csv(folder / "images.csv")

    # By open_clip itself, on pixels of the transform's arithmetic (the images have its size: no resizing).
    whole = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    classes = open_clip.build_zero_shot_classifier(
        whole, open_clip.get_tokenizer("ViT-B-32"), NAMES, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    pixels = np.stack([np.asarray(Image.open(tmp_path / f"data/mine/{i}.png")) for i in range(4, 36)])
    x = torch.from_numpy((pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5).float()
    labels = np.arange(4, 36) % 7
    with torch.no_grad():
        right = (whole.encode_image(x, normalize=True) @ classes).argmax(1).numpy() == labels
        add_test_time_registers(backbone.model, {0: (1, 2), 1: (3, 5)}, 1, scale=100.0)
        moved = torch.nn.functional.normalize(backbone.model(x) @ whole.visual.proj, dim=-1)
        right_moved = (moved @ classes).argmax(1).numpy() == labels

    plain, cured = found["plain"].loc["top1"], found["cured"].loc["top1"]
    assert plain["n"] == 32 and "untreated_top1" not in found["plain"].index
    expected = accuracy(right)
    assert [plain[end] for end in ("value", "lo", "hi")] == pytest.approx(
        [expected.value, expected.lo, expected.hi], abs=1e-6
    )
    assert found["cured"].loc["untreated_top1", "value"] == plain["value"]
    assert cured["value"] == pytest.approx(right_moved.mean(), abs=1e-6)
    gain, paired = found["cured"].loc["gain"], paired_accuracy_difference(right_moved, right)
    assert (gain["value"], gain["lo"]) == pytest.approx((paired.value, paired.lo), abs=1e-6)
    assert (right != right_moved).any()  # the register did change an answer
    assert (
        images["plain"]["top1"].tolist() == right.tolist() and images["cured"]["top1"].tolist() == right_moved.tolist()
    )
    table = pd.read_csv(tmp_path / "metrics/runs/cured/zeroshot/mine/classes.csv")
    assert table["n"].sum() == 32 and table["class"].tolist() == NAMES
    assert table["top1"][0] == pytest.approx(right_moved[labels == 0].mean(), abs=1e-6)


def test_a_text_tower_of_the_hub_comes_through_open_clips_own_client(pair, hub, tmp_path, monkeypatch):
    config = json.loads((Path(pair[0].source.partition(":")[2]) / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    weights = {"hf_hub": "me/tiny/", "quick_gelu": config["quick_gelu"]}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"made": weights})
    repository = f"me/tiny_{config['quick_gelu']}"
    monkeypatch.setitem(weights, "hf_hub", f"{repository}/")
    with pytest.raises(TextTowerError, match=r"hub:tiny/made cannot be had: the hub has no such repository"):
        open_text_tower("hub:tiny/made")
    state = save(pair[2].state_dict())
    hub.push(repository, {"open_clip_model.safetensors": state})
    opened = open_text_tower("hub:tiny/made")
    texts = opened.tokenizer(["a dog"])
    assert torch.equal(opened.model.encode_text(texts), pair[2].encode_text(texts))
    hub.refuse[repository] = 401
    assert open_text_tower("hub:tiny/made").label == "hub:tiny/made"  # kept
