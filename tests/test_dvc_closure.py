"""dvc.yaml names, for every stage, just the modules and the parameters that its script uses."""

import ast
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "stages"))
from code_deps import closure, script_of  # noqa: E402

STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in STAGES.items()}


def keys_used(file: str) -> set[str]:
    """First keys of `params["key"]` and `load_params()["key"]` in a script and the scripts that it imports."""
    keys = set()
    for script in [each for each in closure(file, ROOT) if each.startswith("stages/")]:
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                of = node.value.func if isinstance(node.value, ast.Call) else node.value
                if isinstance(of, ast.Name) and of.id in ("params", "load_params"):
                    keys.add(node.slice.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "entry_of":
                keys.add(node.args[1].value)
    return keys


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_modules_that_its_script_imports_and_no_others(stage):
    listed = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert sorted(listed) == sorted(closure(script_of(STAGES[stage]), ROOT)), (
        "python stages/code_deps.py --write corrects dvc.yaml"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_tracks_the_parameters_that_its_script_reads_and_no_others(stage):
    listed = {key.split(".")[0] for key in STAGES[stage]["params"]}
    used = keys_used(script_of(STAGES[stage]))
    if stage.startswith("download"):  # reads its entry by `source_of`
        used.add("scenes" if stage == "download_scenes" else "datasets")
    assert sorted(listed) == sorted(used), f"correct the params of {stage} in dvc.yaml"


def test_no_stage_that_makes_features_depends_on_metrics_or_probes():
    assert {"regvit/metrics.py", "regvit/probes.py", "regvit/report.py"} & closure("stages/extract.py", ROOT) == set()


def test_the_closure_follows_imports_of_imports():
    assert {"regvit/store.py", "regvit/tokens.py", "regvit/hooks.py"} <= closure("stages/extract.py", ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_cached_is_a_metric_or_a_plot_so_that_the_run_cache_keeps_the_stage(stage):
    plain = [out for out in STAGES[stage].get("outs", []) if isinstance(out, dict)]
    assert not plain or stage == "report"  # the report takes seconds, and only tables and pictures can be plots
