"""Nothing that comes from a stranger is run, and nothing of it lands where it should not."""

import ast
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError

import regvit
from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.manifest import InvalidManifest, Row, read_dataset, write_dataset
from regvit.data.sources.npy import npy
from regvit.features.store import FeatureStore, InvalidStore
from regvit.models.backbones import load_backbone
from regvit.models.checkpoints import WeightsError, read_checkpoint
from regvit.models.sources import build
from regvit.probing.probes import InvalidProbes, load_probes

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*Path(regvit.__file__).parent.rglob("*.py"), *(ROOT / "stages").rglob("*.py")])

# What can execute what it reads, by the end of its dotted name. A keyword in the second place makes a call harmless.
RUNS_WHAT_IT_READS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "zarr.load": None,
    "joblib.load": None,
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "marshal.load": None,
    "marshal.loads": None,
    "shelve.open": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
    "yaml.full_load": None,
    "torch.jit.load": None,
    "torch.hub.load": None,
    "torch.package.PackageImporter": None,
    "os.system": None,
    "os.popen": None,
    "importlib.import_module": None,
    "runpy.run_path": None,
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "imp"}
ALLOWED = {  # file, what: why
    ("regvit/__init__.py", "importlib.import_module()"): "of modules of this package that stand in a table there",
    (
        "regvit/features/ray_engine.py",
        "import pickle",
    ): "a job goes from the driver to its own workers, as in Ray itself",
    (
        "regvit/features/ray_engine.py",
        "pickle.loads()",
    ): "of what the driver of the same run has just sent: never of a file",
    ("regvit/pipeline/warm_python.py", "importlib.import_module()"): "of libraries that its caller names in code",
    ("regvit/pipeline/warm_python.py", "runpy.run_path()"): "the script that a program called `python` is asked to run",
}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression, or ""."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def suspicious(text: str) -> set[str]:
    """What of a module's calls and imports could execute what it reads, or hands a command to a shell."""
    found, tree, names = set(), ast.parse(text), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {f"import {a.name}" for a in node.names if a.name.split(".")[0] in IMPORTS}
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"import {node.module}"} if (node.module or "").split(".")[0] in IMPORTS else set()
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        first, _, rest = name.partition(".")
        full = names.get(first, first) + (f".{rest}" if rest else "")
        keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name in BUILTINS:
            found.add(f"{name}()")
        if keywords.get("shell") or keywords.get("trust_remote_code") or keywords.get("allow_pickle"):
            found.add(f"{name}(shell or trust_remote_code or allow_pickle)")
        for risky, cure in RUNS_WHAT_IT_READS.items():
            if risky in (full, name) and (cure is None or keywords.get(cure[0]) is not cure[1]):
                found.add(f"{risky}()")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_module_calls_what_can_execute_the_file_that_it_reads(file):
    name = file.relative_to(ROOT).as_posix()
    found = {what for what in suspicious(file.read_text(encoding="utf-8")) if (name, what) not in ALLOWED}
    assert not found, f"{name} has {', '.join(sorted(found))}: read it otherwise, or allow it here with the reason"


def test_every_exception_from_that_rule_is_still_needed():
    for file, what in ALLOWED:
        assert what in suspicious((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch\ntorch.load(p)", {"torch.load()"}),
        ("import torch\ntorch.load(p, weights_only=False)", {"torch.load()"}),
        ("import torch\ntorch.load(p, weights_only=True)", set()),
        ("from torch import load as l\nl(p)", {"torch.load()"}),
        ("import numpy as np\nnp.load(p)", {"np.load()", "numpy.load()"}),
        ("import numpy as np\nnp.load(p, allow_pickle=False)", set()),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", {"np.load()", "numpy.load()", "np.load(shell or trust_remote_code or allow_pickle)"}),
        ("import pickle\npickle.loads(b)", {"import pickle", "pickle.loads()"}),
        ("from pickle import loads\nloads(b)", {"import pickle", "pickle.loads()"}),
        ("eval('1')\nmodel.eval()", {"eval()"}),
        ("import subprocess\nsubprocess.run('ls', shell=True)", {"subprocess.run(shell or trust_remote_code or allow_pickle)"}),
        ("import yaml\nyaml.load(f)", {"import yaml", "yaml.load()"}),
    ],
)  # fmt: skip
def test_that_rule_finds_what_it_should(text, found):
    assert suspicious(text) == found


def test_yaml_is_read_by_readers_that_make_no_objects():
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and dotted(node.func) == "YAML":
                typ = {k.arg: getattr(k.value, "value", "?") for k in node.keywords}.get("typ", "rt")
                assert typ in ("safe", "rt"), f"{file} reads YAML with typ {typ!r}"


# Weights, features and arrays that would run code.


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def trap(tmp_path):
    """Something that runs when it is unpickled, and the folder that would show that it ran."""
    sprung = tmp_path / "sprung"
    yield Trap(sprung)
    assert not sprung.exists(), "the file was executed"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, trap, suffix, old):
    path = tmp_path / f"weights{suffix}"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "trap": trap}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(WeightsError, match=r"cannot be read as plain tensors .*; files that need code to be executed"):
        read_checkpoint(path)
    with pytest.raises(WeightsError, match="cannot be read as plain tensors"):
        build(f"file:{path}", "test_vit", 32)


def test_a_bare_pickle_under_any_name_of_ours_is_refused(tmp_path, trap):
    content = pickle.dumps(trap)
    for name, read, error in (
        ("weights.pt", read_checkpoint, WeightsError),
        ("weights.safetensors", read_checkpoint, WeightsError),
        ("probes.safetensors", load_probes, InvalidProbes),
        ("features.zarr", FeatureStore.open, InvalidStore),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error):
            read(tmp_path / name)


def test_an_array_of_objects_is_refused(tmp_path, trap):
    np.save(tmp_path / "a.npy", np.array([trap], dtype=object), allow_pickle=True)
    with (
        DatasetBuilder("set", tmp_path / "set", tmp_path, 0) as builder,
        pytest.raises(ValueError, match=r"not a plain \.npy"),
    ):
        npy(builder, str(tmp_path / "a.npy"))


def test_a_parameter_file_with_a_tag_that_would_make_an_object_is_refused(tmp_path):
    text = f"!!python/object/apply:os.mkdir ['{tmp_path / 'sprung'}']"
    with pytest.raises(ConstructorError, match="could not determine a constructor for the tag"):
        YAML(typ="safe", pure=True).load(text)
    YAML().load(text)  # the round-trip reader keeps the tag as text
    assert not (tmp_path / "sprung").exists()


def test_a_backbone_folder_whose_description_names_a_path_for_an_architecture_is_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    digest = hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).hexdigest()
    for architecture in ("hf-hub:someone/model", "local-dir:/tmp/x", "../evil", "os.system"):
        info = dict.fromkeys(("source", "licence"), "x") | {
            "name": "x", "architecture": architecture, "model_args": {}, "weights_sha256": digest, "planted": None,
            "trained_registers": 0, "mlp_widths": [1],
            "transform": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
        }  # fmt: skip
        (tmp_path / "backbone.json").write_text(json.dumps(info))
        with pytest.raises(ValueError, match="has no model"):
            load_backbone(tmp_path)


# Archives: see tests/data/test_archive.py.


# Manifests.


@pytest.mark.parametrize("path", ["../a.png", "/etc/passwd", "x/../../a.png", "C:/a.png", "x\\a.png", ""])
@pytest.mark.parametrize("column", ["path", "mask", "depth"])
def test_a_manifest_cannot_name_a_file_outside_its_root(tmp_path, path, column):
    if not path and column != "path":
        return  # no mask
    write_dataset(tmp_path / "set", "set", [Row("1", "images/1.png", "", "test", mask="m.png", depth="d.png")], [], {})
    table = tmp_path / "set/manifest.csv"
    old = {"path": "images/1.png", "mask": "m.png", "depth": "d.png"}[column]
    table.write_text(table.read_text().replace(old, path))
    with pytest.raises(InvalidManifest, match="leaves the root of the data set; use a relative path"):
        read_dataset(tmp_path / "set")
