"""requirements*.in list what is imported and nothing else, and the locked files say where nothing comes from."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OURS = (
    {"regvit", "stages", "benchmarks", "tests"}
    | {path.stem for path in ROOT.glob("tests/**/*")}
    | {path.stem for path in ROOT.glob("stages/*")}
)
PROGRAMS = {  # what is called, or read by what is imported, and why it is listed
    "dvc": "the pipeline",
    "ruamel-yaml-clib": "ruamel.yaml reads by it",
    "onnxscript": "torch.onnx.export(dynamo=True)",
    "pyarrow": "strings of pandas",
    "pip": "downloads packages", "setuptools": "builds the editable install", "uv": "installs and locks",
    "pytest": "runs the tests", "pytest-xdist": "-n 2", "ruff": "make test", "import-linter": "make test",
    "check-jsonschema": "the workflow's schema", "ipykernel": "executes the example",
}  # fmt: skip
COMPANIONS = {  # imported beside the package that brings them
    "annotated-types": "pydantic", "pydantic-core": "pydantic", "markupsafe": "jinja2", "requests": "pooch", "pyyaml": "timm",
    "dvc-data": "dvc", "scmrepo": "dvc",
}  # fmt: skip


def listed(file: str) -> set[str]:
    """Names in a requirements file."""
    lines = (re.sub(r"\s*#.*", "", line) for line in (ROOT / file).read_text().splitlines())
    return {canonical(Requirement(line).name) for line in lines if line}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(*folders: str) -> set[str]:
    """Distributions of the modules that are imported below these folders."""
    homes, names = metadata.packages_distributions(), set()
    for path in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module)
    tops = {name.partition(".")[0] for name in names} - OURS - set(sys.stdlib_module_names)
    special = {"google": "protobuf", "ruamel": "ruamel-yaml"}  # namespaces that several share
    found = {special.get(top) or canonical(homes.get(top, [top])[0]) for top in tops}
    return {COMPANIONS.get(name, name) for name in found}


def test_the_pipeline_imports_what_is_listed_and_nothing_else_is_listed():
    assert imported("regvit", "stages", "benchmarks") - listed("requirements.in") == set()
    assert listed("requirements.in") - imported("regvit", "stages", "benchmarks") - PROGRAMS.keys() == set()


def test_the_tests_import_what_is_listed_and_nothing_else_is_listed():
    both = listed("requirements.in") | listed("requirements-test.in")
    assert imported("tests") - both == set()
    assert listed("requirements-test.in") - imported("tests") - PROGRAMS.keys() == set()
    assert listed("requirements.in") & listed("requirements-test.in") == set()


@pytest.mark.parametrize("name", ["requirements", "requirements-test"])
def test_the_locked_file_has_exact_versions_with_hashes_of_all_that_is_listed_and_names_no_index(name):
    text = (ROOT / f"{name}.txt").read_text()
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:]
    assert all(re.match(r"[\w.\[\]-]+==\S+", entry) and "--hash=sha256:" in entry for entry in entries)
    assert listed(f"{name}.in") <= {canonical(re.split(r"[=\[]", entry)[0]) for entry in entries}
    assert not re.search(r"--(extra-)?index-url|https?://|--find-links", text)


def test_the_two_locked_files_agree():
    pins = [dict(re.findall(r"^([a-z0-9.-]+)(?:\[.*\])?==(\S+)", (ROOT / f"{name}.txt").read_text(), re.M))
            for name in ("requirements", "requirements-test")]  # fmt: skip
    assert {name for name in pins[0].keys() & pins[1].keys() if pins[0][name] != pins[1][name]} == set()


def test_the_package_declares_what_the_pipeline_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        canonical(Requirement(line).name)
        for line in [*project["dependencies"], *extras["pipeline"], *extras["cluster"]]
    }
    assert imported("regvit") - declared == set()
