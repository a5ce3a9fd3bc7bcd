"""Checkpoints as they really come: a matrix of layouts and containers, each opened with equal outputs or refused helpfully."""

import argparse
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from regvit.models.backbones import create
from regvit.models.checkpoints import WeightsError, read_checkpoint
from regvit.models.sources import build

DINOV2, DINOV2_REG, CLIP, VIT, EVA, DINOV3, GIANT = (
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch32_clip_224",
    "vit_tiny_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3_qkvb",
    "vit_giant_patch14_dinov2",
)


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """Every model has two narrow blocks; all else is as in timm."""
    real, small = timm.create_model, {"depth": 2, "embed_dim": 96, "num_heads": 4}
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: real(name, **{**small, **kwargs}))


def trained(architecture: str, seed: int = 0) -> torch.nn.Module:
    """A model of random weights, of the size that its weights would have been trained at."""
    torch.manual_seed(seed)
    model = create(architecture, {"num_classes": 0})
    for value in model.parameters():
        value.data = torch.randn_like(value) * 0.05
    return model


def clones(state: dict) -> dict:
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def dinov2(model) -> dict:
    """As `torch.hub` downloads DINOv2's and DINOv3's files."""
    state = model.state_dict() | {"mask_token": torch.zeros(1, model.embed_dim)}
    if "reg_token" in state:  # there the position table has a row for CLS
        own = torch.randn(1, 1, model.embed_dim)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - own
        state["pos_embed"] = torch.cat([own, state["pos_embed"]], 1)
    named = ((".mlp.fc1.", ".mlp.w12."), (".mlp.fc2.", ".mlp.w3.")) if hasattr(model.blocks[0].mlp, "chunk_dim") else ()
    for ours, theirs in named:
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    return clones(state)


def dinov3(model) -> dict:
    state = model.state_dict()
    out = {"storage_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, model.embed_dim)}
    out["rope_embed.periods"] = torch.ones(16)
    for name, value in state.items():
        if name.endswith("attn.q_bias"):
            zeros = torch.zeros_like(value)
            bias = torch.cat([value, zeros, state[name.replace("q_bias", "v_bias")]])
            out[name.replace("q_bias", "qkv.bias")] = bias
            out[name.replace("q_bias", "qkv.bias_mask")] = torch.ones_like(bias)
        elif not name.endswith(("v_bias", "k_bias")):
            out[re.sub(r"gamma_([12])", r"ls\1.gamma", name)] = value
    return clones(out)


def split_qkv(state: dict, template: str) -> dict:
    """The fused projection as three, named by `template` with {block} and {part}."""
    out = {}
    for name, value in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[template.format(block=match[1], part=part, p=part[0]) + match[2]] = rows
        else:
            out[name] = value
    return out


def transformers(model, kind: str) -> dict:
    """As `Dinov2Model`, `Dinov2WithRegistersModel`, `ViTModel` and `CLIPVisionModel` name their weights."""
    state = dinov2(model) if kind == "dinov2" else clones(model.state_dict())
    layers = "encoder.layers." if kind == "clip" else "encoder.layer."
    attention = "self_attn.{p}_proj." if kind == "clip" else "attention.attention.{part}."
    state = split_qkv(state, "BLOCK{block}." + attention)
    table = {
        "dinov2": {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1",
                   "mlp.fc2": "mlp.fc2", "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"},
        "vit": {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
                "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
        "clip": {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj",
                 "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    }[kind]  # fmt: skip
    out = {}
    for name, value in state.items():
        name = re.sub(r"^(?:blocks\.|BLOCK)(\d+)\.", rf"{layers}\1.", name)
        for ours, theirs in table.items():
            name = re.sub(rf"({re.escape(layers)}\d+\.){re.escape(ours)}\.", rf"\1{theirs}.", name)
        name = re.sub(r"\.ls([12])\.gamma", r".layer_scale\1.lambda1", name)
        name = re.sub(r"^norm_pre\.", "pre_layrnorm.", name)
        name = re.sub(r"^norm\.", "post_layernorm." if kind == "clip" else "layernorm.", name)
        if kind == "clip":
            flat = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight",
                    "patch_embed.proj.weight": "embeddings.patch_embedding.weight"}  # fmt: skip
            value = value.flatten() if name == "cls_token" else value[0] if name == "pos_embed" else value
            name = flat.get(name, name)
        else:
            name = re.sub(r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1", name)
            name = name.replace("pos_embed", "embeddings.position_embeddings")
            name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        out[name] = value
    if kind == "clip":
        out = {f"vision_model.{name}": value for name, value in out.items()}
        out |= {"vision_model.embeddings.position_ids": torch.arange(50)[None], "logit_scale": torch.ones(())}
        out["text_model.embeddings.token_embedding.weight"] = torch.zeros(3, 4)
    if kind == "vit":
        out |= {"pooler.dense.weight": torch.zeros(2, 2), "pooler.dense.bias": torch.zeros(2)}
    return clones(out)


def openai_clip(model) -> dict:
    state, out = model.state_dict(), {}
    for name, value in state.items():
        for ours, theirs in (("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("blocks.", "transformer.resblocks."),
                             (".norm1.", ".ln_1."), (".norm2.", ".ln_2."), ("attn.qkv.", "attn.in_proj_"),
                             ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
            name = name.replace(ours, theirs)
        name = re.sub(r"^norm\.", "ln_post.", name)
        value = value.flatten() if name == "cls_token" else value[0] if name == "pos_embed" else value
        name = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}.get(name, name)
        out[f"visual.{name}"] = value
    return clones(out | {"visual.proj": torch.zeros(96, 512), "token_embedding.weight": torch.zeros(3, 4)})


LAYOUTS = {
    "timm": (VIT, lambda m: clones(m.state_dict())),
    "timm with a head": (VIT, lambda m: clones(m.state_dict()) | {"head.weight": torch.zeros(9, 96), "head.bias": torch.zeros(9)}),
    "timm EVA": (EVA, lambda m: clones(m.state_dict())),
    "DINOv2": (DINOV2, dinov2),
    "DINOv2 with registers": (DINOV2_REG, dinov2),
    "DINOv2 giant": (GIANT, dinov2),
    "DINOv3": (DINOV3, dinov3),
    "Dinov2Model": (DINOV2, lambda m: transformers(m, "dinov2")),
    "Dinov2WithRegistersModel": (DINOV2_REG, lambda m: transformers(m, "dinov2")),
    "ViTModel": (VIT, lambda m: transformers(m, "vit")),
    "CLIPVisionModel": (CLIP, lambda m: transformers(m, "clip")),
    "OpenAI CLIP": (CLIP, openai_clip),
    "OpenCLIP around timm": (VIT, lambda m: {f"visual.trunk.{k}": v for k, v in clones(m.state_dict()).items()}),
}  # fmt: skip
CONTAINERS = {
    "plain": lambda state: state,
    "module., compiled": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "model: backbone., with arguments": lambda state: {
        "model": {f"backbone.{name}": value for name, value in state.items()},
        "args": argparse.Namespace(lr=0.1, model="x"), "epoch": 3,
    },
    "teacher beside student": lambda state: {
        "student": {f"module.backbone.{name}": value + 1 for name, value in state.items()},
        "teacher": {f"backbone.{name}": value for name, value in state.items()} | {"dino_head.mlp.0.weight": torch.zeros(2, 2)},
    },
}  # fmt: skip


def opened(path, architecture, size=None):
    built = build(f"file:{path}", architecture, size)
    assert not built.model.training and not any(p.requires_grad for p in built.model.parameters())
    return built


def contained(state: dict, container: str, folder: Path) -> Path:
    """The weights in a file, or in a folder of shards as it is downloaded."""
    path = folder / "weights.pth"
    if container in CONTAINERS:
        torch.save(CONTAINERS[container](state), path)
    elif container == "shards":
        names, path = sorted(state), folder / "shards"
        path.mkdir()
        shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, part in shards.items():
            save_file({name: state[name] for name in part}, path / file)
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        path = path.with_suffix(".safetensors")
        prefix = "module." if "module" in container else ""
        save_file({prefix + name: value for name, value in state.items()}, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_opens_with_equal_outputs_and_one_of_each_family_from_every_container(layout, tmp_path):
    architecture, made = LAYOUTS[layout]
    model = trained(architecture)
    state = made(model)
    built = opened(contained(state, "plain", tmp_path), architecture)
    x = torch.randn(1, 3, built.transform.size, built.transform.size)
    with torch.no_grad():
        torch.testing.assert_close(built.model.forward_features(x), model.forward_features(x), rtol=1e-4, atol=1e-5)
    weights, containers = built.model.state_dict(), [*CONTAINERS, "safetensors", "safetensors, module.", "shards"][1:]
    whole_family = layout in ("timm with a head", "DINOv2 with registers", "CLIPVisionModel")
    for container in containers if whole_family else containers[1:2]:
        other = opened(contained(state, container, tmp_path), architecture)
        assert other.transform == built.transform
        assert other.model.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in other.model.state_dict().items()), container


def test_weights_of_another_size_are_resampled_once_from_their_own_table(tmp_path):
    model = trained(DINOV2_REG)
    torch.save(dinov2(model), tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    at_once = timm.create_model(DINOV2_REG, num_classes=0, img_size=112).eval()
    at_once.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(model.state_dict()), at_once))
    built = opened(tmp_path / "dinov2_vits14_reg4_pretrain.pth", DINOV2_REG, 112)
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(built.model(x), at_once(x))
    assert torch.equal(built.model.trained_positions.table, model.pos_embed)
    assert built.about["model_args"]["img_size"] == 112 and built.transform.crop_pct == 0.875


def test_averaged_weights_are_taken_as_timm_takes_them_and_it_is_said(tmp_path, monkeypatch):
    model, averaged, said = trained(VIT, 1), "state_dict_ema", []
    torch.save({"state_dict": trained(VIT).state_dict(), averaged: model.state_dict()}, tmp_path / "last.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    built = build("file:~/last.pth", VIT, progress=said.append)
    theirs = timm.create_model(VIT, num_classes=0, checkpoint_path=str(tmp_path / "last.pth"))
    assert torch.equal(built.model.cls_token, model.cls_token) and torch.equal(theirs.cls_token, model.cls_token)
    assert averaged in said[0] and averaged in built.about["source"]
    assert "normalised and cropped as for augreg_in21k_ft_in1k" in said[-1]


@pytest.mark.parametrize("content", [b"\x80\x02.", b"", b"PK\x03\x04" + bytes(99), b"\x80\x02X\xff"])
def test_bytes_that_are_no_checkpoint_are_refused(tmp_path, content):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.pt cannot be read as plain tensors \(.+\); files that need code"):
        read_checkpoint(tmp_path / "weights.pt")
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.safetensors is not a whole safetensors file"):
        read_checkpoint(tmp_path / "weights.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.eye(3).to_sparse(), "a sparse or nested tensor"),
        (torch.zeros(3, device="meta"), "a meta tensor, which has a shape and no numbers"),
        (torch.zeros(3, dtype=torch.complex64), "a tensor of torch.complex64, expected real numbers"),
        (torch.zeros(1).expand(10**12), r"of shape \(1000000000000,\), more numbers than the file holds"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_weights_are_refused_by_name(tmp_path, value, said):
    torch.save({"norm.weight": value}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=rf"weights\.pt: norm\.weight is {said}.*; save model\.state_dict\(\)"):
        build(f"file:{tmp_path / 'weights.pt'}", VIT, 32)


def two(name: str, **changes) -> dict:
    return clones(trained(name).state_dict() | changes)


REFUSED = {
    "a list": (lambda: [torch.zeros(1)], r"holds list; expected a dict of name to tensor"),
    "numbers": (lambda: {"epoch": 3}, r"holds \['int'\]; expected"),
    "names that are no text": (lambda: {0: torch.zeros(1)}, "holds a tensor named 0; expected names that are text"),
    "two transformers": (
        lambda: {f"{a}.{k}": v for a in ("left", "right") for k, v in two(VIT).items()},
        "holds 2 vision transformers, under 'left.', 'right.'; save the state dict of the one that is meant",
    ),
    "no transformer": (lambda: {"conv1.bias": torch.zeros(3)}, r"it holds no vision transformer that is known \(conv1"),
    "another architecture": (
        lambda: dinov2(trained(DINOV2_REG)),
        r"has patches of 14 px, .* of 16; it holds a vision transformer 96 wide, of 2 blocks and patches of 14 px, with 4",
    ),
    "other channels": (
        lambda: two(VIT, **{"patch_embed.proj.weight": torch.zeros(96, 4, 16, 16)}),
        "takes images of 4 channels; backbones see red, green and blue",
    ),
    "another aspect": (
        lambda: two(VIT, pos_embed=torch.zeros(1, 1 + 12 * 20, 96)),
        "a position table of 241 rows is not that of square images",
    ),
    "a weight short": (
        lambda: {k: v for k, v in two(VIT).items() if k != "norm.bias"},
        r"does not fit VisionTransformer: missing norm\.bias; unexpected none.*96 wide, of 2 blocks and patches of 16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_what_the_file_holds(case, tmp_path):
    content, said = REFUSED[case]
    torch.save(content(), tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=said) as error:
        build(f"file:{tmp_path / 'mine.pth'}", VIT)
    assert "weights_only" not in str(error.value)


def test_the_architecture_that_would_fit_is_named(tmp_path, monkeypatch):
    monkeypatch.undo()  # models of all their blocks
    with torch.device("meta"):
        state = create(DINOV2_REG, {"num_classes": 0}).state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in state.items()}, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match="vit_small_patch14_reg4_dinov2 would fit"):
        build(f"file:{tmp_path / 'mine.pth'}", "vit_base_patch14_dinov2")


def test_a_missing_file_or_shard_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=r"holds no weights; expected one of model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(FileNotFoundError, match=r"names 2 shards, of which two\.safetensors is not beside it"):
        read_checkpoint(index)
    index.write_text("{}")
    with pytest.raises(WeightsError, match="is no index of shards: it has no weight_map"):
        read_checkpoint(index)
