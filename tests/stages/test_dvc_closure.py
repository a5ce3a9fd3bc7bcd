"""dvc.yaml names, for every stage, just the code and the parameters that its script uses."""

import ast
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "stages"))
from fingerprint import closure, scripts  # noqa: E402

STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
FINGERPRINT = STAGES.pop("fingerprint")
STAGES = {name: stage.get("do", stage) for name, stage in STAGES.items()}


def script_of(stage: dict) -> str:
    """`stages/extract.py` of a stage whose cmd is `python stages/extract.py ${item.run} …`."""
    return stage["cmd"].split()[1]


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
def test_a_stage_depends_on_the_fingerprint_of_its_own_script_and_on_no_code_else(stage):
    of_code = [dep for dep in STAGES[stage]["deps"] if dep.endswith(".py") or "fingerprint" in dep]
    assert of_code == [f"metrics/fingerprint/{Path(script_of(STAGES[stage])).stem}.json"]


def test_every_script_of_the_pipeline_has_a_fingerprint_and_nothing_else_has():
    assert scripts(ROOT) == sorted({Path(script_of(stage)).stem for stage in STAGES.values()})
    assert FINGERPRINT["deps"] == ["regvit", "stages"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_tracks_the_parameters_that_its_script_reads_and_no_others(stage):
    listed = {key.split(".")[0] for key in STAGES[stage].get("params", [])}
    used = keys_used(script_of(STAGES[stage]))
    if stage.startswith("download"):  # reads its entry by `source_of`
        used.add("scenes" if stage == "download_scenes" else "datasets")
    assert sorted(listed) == sorted(used), f"correct the params of {stage} in dvc.yaml"


def test_extraction_reads_no_parameters_as_hundreds_of_its_stages_would_each_have_dvc_parse_them():
    assert "params" not in STAGES["extract"]
    assert "features/${item.run}/extract.json" in STAGES["extract"]["deps"]


def test_no_stage_that_makes_features_depends_on_metrics_or_probes():
    assert {"regvit/stats/accuracy.py", "regvit/probing/probes.py", "regvit/report/page.py"} & closure(
        "stages/extract.py", ROOT
    ) == set()


def test_the_closure_follows_imports_of_imports():
    assert {"regvit/features/store.py", "regvit/models/tokens.py", "regvit/models/hooks.py"} <= closure(
        "stages/extract.py", ROOT
    )


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_cached_is_a_metric_or_a_plot_so_that_the_run_cache_keeps_the_stage(stage):
    plain = [out for out in STAGES[stage].get("outs", []) if isinstance(out, dict)]
    assert not plain or stage == "report"  # the report takes seconds, and only tables and pictures can be plots
