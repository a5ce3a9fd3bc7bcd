import json
import os
from types import SimpleNamespace

import pytest

from regvit.models.checkpoint_files import checkpoint_files, files_sha256
from regvit.pipeline import checkpoint_changes as module
from regvit.pipeline.checkpoint_changes import changed_checkpoints


@pytest.fixture
def params(tmp_path, monkeypatch):
    """A pipeline with one backbone of a file, whose stage has run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"one")
    made("weights.safetensors")
    sources = {"mine": "file:weights.safetensors", "hub": "timm:test_vit", "new": "file:weights.safetensors"}
    return SimpleNamespace(backbones={name: SimpleNamespace(source=source) for name, source in sources.items()})


def made(path):
    keys = ("name", "architecture", "model_args", "transform", "weights_sha256", "licence", "planted", "trained_registers",
            "mlp_widths")  # fmt: skip
    os.makedirs("data/backbones/mine", exist_ok=True)
    source = f"file:weights.safetensors (sha256 {files_sha256(checkpoint_files(path))}; model: module.)"
    with open("data/backbones/mine/backbone.json", "w") as file:
        json.dump({**dict.fromkeys(keys), "source": source}, file)


def test_a_checkpoint_that_was_trained_on_is_named_until_its_backbone_is_made_again(params, tmp_path):
    assert list(changed_checkpoints(params)) == []
    (tmp_path / "weights.safetensors").write_bytes(b"two")
    assert list(changed_checkpoints(params)) == ["mine"]
    assert list(changed_checkpoints(params)) == ["mine"]
    made("weights.safetensors")
    assert list(changed_checkpoints(params)) == []
    os.utime("weights.safetensors", ns=(1, 1))  # touched, but the same
    assert list(changed_checkpoints(params)) == []


def test_the_digest_is_taken_anew_only_where_size_or_time_changed(params, monkeypatch):
    assert list(changed_checkpoints(params)) == []
    monkeypatch.setattr(module, "files_sha256", lambda _: pytest.fail("the file was read again"))
    assert list(changed_checkpoints(params)) == []


def test_a_checkpoint_that_is_gone_leaves_its_backbone_alone(params):
    os.remove("weights.safetensors")
    assert list(changed_checkpoints(params)) == []
