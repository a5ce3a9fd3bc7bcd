import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest

from regvit.models.checkpoint_files import checkpoint_files, files_sha256
from regvit.pipeline.checks import source_changes as module
from regvit.pipeline.checks.source_changes import changed_sources, remember_folder


@pytest.fixture
def params(tmp_path, monkeypatch):
    """A pipeline with one backbone of a file, whose stage has run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"one")
    made("weights.safetensors")
    sources = {"mine": "file:weights.safetensors", "hub": "timm:test_vit", "new": "file:weights.safetensors"}
    backbones = {name: SimpleNamespace(source=source) for name, source in sources.items()}
    return SimpleNamespace(backbones=backbones, datasets={}, scenes={}, runs={})


def made(path):
    keys = ("name", "architecture", "model_args", "transform", "weights_sha256", "licence", "planted", "trained_registers",
            "mlp_widths")  # fmt: skip
    os.makedirs("data/backbones/mine", exist_ok=True)
    source = f"file:weights.safetensors (sha256 {files_sha256(checkpoint_files(path))}; model: module.)"
    with open("data/backbones/mine/backbone.json", "w") as file:
        json.dump({**dict.fromkeys(keys), "source": source}, file)


def test_a_checkpoint_that_was_trained_on_is_named_until_its_backbone_is_made_again(params, tmp_path):
    assert list(changed_sources(params)) == []
    (tmp_path / "weights.safetensors").write_bytes(b"two")
    assert list(changed_sources(params)) == ["backbone@mine"]
    assert list(changed_sources(params)) == ["backbone@mine"]
    made("weights.safetensors")
    assert list(changed_sources(params)) == []
    os.utime("weights.safetensors", ns=(1, 1))  # touched, but the same
    assert list(changed_sources(params)) == []


def test_the_digest_is_taken_anew_only_where_size_or_time_changed(params, monkeypatch):
    assert list(changed_sources(params)) == []
    monkeypatch.setattr(module, "files_sha256", lambda _: pytest.fail("the file was read again"))
    assert list(changed_sources(params)) == []


def test_a_checkpoint_that_is_gone_leaves_its_backbone_alone(params):
    os.remove("weights.safetensors")
    assert list(changed_sources(params)) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "cat/new.png").write_bytes(b"3"),
        lambda folder: (folder / "cat/1.png").write_bytes(b"other"),
        lambda folder: (folder / "cat/1.png").rename(folder / "cat/2.png"),
        lambda folder: (folder / "cat/1.png").unlink(),
    ],
    ids=["one more", "another content", "another name", "one less"],
)
def test_a_folder_of_images_that_changed_is_named_until_its_download_runs_again(params, tmp_path, change):
    source = "folder:photos"
    params.datasets = {"photos": SimpleNamespace(source=source), "digits": SimpleNamespace(source="digits")}
    (tmp_path / "photos/cat").mkdir(parents=True)
    (tmp_path / "photos/cat/1.png").write_bytes(b"1")
    remember_folder("photos", source)
    remember_folder("digits", "digits")
    change(tmp_path / "photos")
    assert list(changed_sources(params)) == []  # nothing was made of it yet
    (tmp_path / "data/photos").mkdir(parents=True)
    (tmp_path / "data/photos/dataset.json").write_text("{}")
    assert list(changed_sources(params)) == ["download@photos"]
    remember_folder("photos", source)
    assert list(changed_sources(params)) == []
    shutil.rmtree(tmp_path / "photos")
    assert list(changed_sources(params)) == []


def test_a_table_of_neurons_that_changed_is_named_with_the_run_that_was_composed_of_it(params, tmp_path):
    params.runs = {
        "cured": SimpleNamespace(neurons="file:table.json?top_k=1"),
        "plain": SimpleNamespace(neurons="selected"),
    }
    (tmp_path / "table.json").write_text("[[0, 1]]")
    assert list(changed_sources(params)) == []
    made_of = {"table": {"name": "table.json", "sha256": hashlib.sha256(b"[[0, 1]]").hexdigest()}}
    (tmp_path / "features/runs").mkdir(parents=True)
    (tmp_path / "features/runs/cured.json").write_text(json.dumps(made_of))
    assert list(changed_sources(params)) == []
    (tmp_path / "table.json").write_text("[[0, 2]]")
    assert list(changed_sources(params)) == ["compose@cured"]
