"""dvc.yaml names, for every stage, just the modules and the parameters that its script uses."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in STAGES.items()}
# These cannot change a result, so editing them must rerun nothing: re-exports; reading and checking parameters, whose
# values DVC tracks itself; device and batch size; progress bars.
WITHOUT_EFFECT = {"regvit/__init__.py", "regvit/progress.py", "stages/params.py", "stages/runtime.py"}


def script_of(stage: str) -> str:
    """`stages/extract.py` of `python stages/extract.py ${item.run} …`."""
    return STAGES[stage]["cmd"].split()[1]


def files_of(module: str) -> set[str]:
    """The project's file of a dotted name: of the library, or flat in stages/ as scripts import each other."""
    path = module.replace(".", "/") + ".py"
    return {file for file in (path, f"stages/{path}") if (ROOT / file).is_file()}


def imports(file: str) -> set[str]:
    """The project's files that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(part for part in (Path(file).parent.name if node.level else "", node.module) if part)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        if names[0] == "regvit":
            exported = {alias.name for alias in getattr(node, "names", ())}
            reexported = ast.parse((ROOT / "regvit/__init__.py").read_text()).body
            for line in reexported:
                if isinstance(line, ast.ImportFrom) and exported & {alias.name for alias in line.names}:
                    names.append(f"regvit.{line.module}")
        for name in names:
            found |= files_of(name)
    return found


def closure(file: str) -> set[str]:
    """The file and all that it imports, directly or not, less what has no effect."""
    seen, todo = set(), {file}
    while todo:
        seen |= todo
        todo = {found for each in todo for found in imports(each)} - seen - WITHOUT_EFFECT
    return seen


def keys_used(file: str) -> set[str]:
    """First keys of `params["key"]` and `load_params()["key"]` in a script and the scripts that it imports."""
    keys = set()
    for script in [each for each in closure(file) if each.startswith("stages/")]:
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                of = node.value.func if isinstance(node.value, ast.Call) else node.value
                if isinstance(of, ast.Name) and of.id in ("params", "load_params"):
                    keys.add(node.slice.value)
    return keys


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_modules_that_its_script_imports_and_no_others(stage):
    listed = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert sorted(listed) == sorted(closure(script_of(stage))), f"correct the deps of {stage} in dvc.yaml"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_tracks_the_parameters_that_its_script_reads_and_no_others(stage):
    listed = {key.split(".")[0] for key in STAGES[stage]["params"]}
    used = keys_used(script_of(stage))
    if stage.startswith("download"):  # reads its entry by `source_of`
        used.add("scenes" if stage == "download_scenes" else "datasets")
    assert sorted(listed) == sorted(used), f"correct the params of {stage} in dvc.yaml"


def test_no_stage_that_makes_features_depends_on_metrics_or_probes():
    assert {"regvit/metrics.py", "regvit/probes.py", "regvit/report.py"} & closure("stages/extract.py") == set()


def test_the_closure_follows_imports_of_imports():
    assert {"regvit/store.py", "regvit/tokens.py", "regvit/hooks.py"} <= closure("stages/extract.py")


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_cached_is_a_metric_or_a_plot_so_that_the_run_cache_keeps_the_stage(stage):
    plain = [out for out in STAGES[stage].get("outs", []) if isinstance(out, dict)]
    assert not plain or stage == "report"  # the report takes seconds, and only tables and pictures can be plots
