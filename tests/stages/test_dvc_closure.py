"""dvc.yaml names, for every stage, just the parameters that its script reads, and the fingerprint of the code that it runs."""

import ast
from functools import cache
from pathlib import Path

import grimp
import pytest
from ruamel.yaml import YAML

from stages.fingerprint import code_of

ROOT = Path(__file__).parents[2]
STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in STAGES.items()}
MEASURING = sorted(STAGES.keys() - {"fingerprint"})
FRAME = {
    "choose",
    "command",
    "params",
    "reproduce",
    "runtime",
    "schema",
}


@cache
def graph() -> grimp.ImportGraph:
    """Which module of the library imports which; without those that look at params.yaml and decide no result."""
    modules = grimp.build_graph("regvit", exclude_type_checking_imports=True)
    for name in {"regvit.pipeline.checks"} | modules.find_descendants("regvit.pipeline.checks"):
        modules.remove_module(name)
    return modules


def script_of(stage: dict) -> Path:
    """stages/extract.py of a stage whose cmd is `python stages/extract.py ${item.run} …`."""
    return ROOT / stage["cmd"].split()[1]


def modules_of(script: Path) -> set[str]:
    """The library's modules that a script imports, and all that these import."""
    known, imported = graph().modules, set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & known
    return imported.union(*(graph().find_upstream_modules(module) for module in imported))


def keys_of(script: Path) -> set[str]:
    """Blocks of params.yaml that a script reads, or a file of regvit/pipeline that it imports."""
    keys = set()
    parts = {module.rpartition(".")[2] for module in modules_of(script) if module.startswith("regvit.pipeline.")}
    for file in [script, *(ROOT / f"regvit/pipeline/{part}.py" for part in parts - FRAME)]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value.func if isinstance(node.value, ast.Call) else node.value
                if isinstance(owner, ast.Name) and owner.id in ("params", "load_params"):
                    keys.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "entry_of":
                keys.add(node.args[1].value)
    return keys


@pytest.mark.parametrize("stage", MEASURING)
def test_a_stage_depends_on_the_fingerprint_of_its_script_and_on_no_other_code(stage):
    script = script_of(STAGES[stage])
    code = {dep for dep in STAGES[stage]["deps"] if dep.startswith(("stages", "regvit", "metrics/fingerprint"))}
    assert code == {f"metrics/fingerprint/{script.stem}.json"}, f"correct the deps of {stage} in dvc.yaml"


@pytest.mark.parametrize("script", sorted(file.stem for file in (ROOT / "stages").glob("*.py")))
def test_a_fingerprint_is_of_all_that_a_script_imports(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = ROOT / f"stages/{script}.py"
    modules = {module for module in modules_of(script) if not module.startswith("regvit.pipeline")}
    files = {file for file in code_of(script) if not file.endswith("__init__.py")}
    imported = {f"{module.replace('.', '/')}.py" for module in modules}
    assert files == {f"stages/{script.name}", *(file for file in imported if (ROOT / file).is_file())}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_tracks_the_parameters_that_its_script_reads_and_no_others(stage):
    listed = {key.split(".")[0] for key in STAGES[stage].get("params", [])}
    used = keys_of(script_of(STAGES[stage]))
    if stage.startswith("download"):  # reads its entry by `source_of`
        used.add("scenes" if stage == "download_scenes" else "datasets")
    assert listed == used, f"correct the params of {stage} in dvc.yaml"


@pytest.mark.parametrize("stage", ["download", "extract", "extract_dense", "backbone", "compose"])
def test_what_makes_features_runs_no_code_of_figures_probes_or_pages(stage, monkeypatch):
    monkeypatch.chdir(ROOT)
    rooms = {file.split("/")[1] for file in code_of(ROOT / f"stages/{stage}.py") if file.startswith("regvit/")}
    assert not {"stats", "probing", "report"} & rooms


@pytest.mark.parametrize("stage", STAGES)
def test_every_output_is_cached_but_the_figures_of_the_runs(stage):
    """With one that is not, DVC would keep the stage out of its run cache; metrics do not."""
    plain = [out for kind in ("outs", "plots") for out in STAGES[stage].get(kind, []) if isinstance(out, dict)]
    assert not any(options.get("cache") is False for out in plain for options in out.values())
    assert (stage == "summary") == bool(STAGES[stage].get("metrics"))


def test_it_reads_from_top_to_bottom_in_one_go():
    lines = (ROOT / "dvc.yaml").read_text().splitlines()
    assert len(lines) <= 350
    assert {file.stem for file in (ROOT / "stages").glob("*.py")} == {
        script_of(stage).stem for stage in STAGES.values()
    }
