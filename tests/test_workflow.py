"""The workflow of pull requests: what GitHub reads in it, and what it runs, as far as that can be known here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
FILE = ROOT / ".github/workflows/metrics.yml"
JOBS = YAML(typ="safe").load(FILE)["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
SCRIPTS = [step["run"] for step in STEPS if "run" in step]


def test_it_is_of_the_published_schema():
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", FILE]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_actions_are_pinned_and_no_expression_of_a_stranger_stands_in_a_script():
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in STEPS if "uses" in step)
    assert not [script for script in SCRIPTS if "${{" in script]


def test_each_job_caches_its_packages_and_the_pipeline_dvcs_cache():
    paths = {name: [step["with"]["path"] for step in job["steps"] if "actions/cache" in step.get("uses", "")]
             for name, job in JOBS.items()}  # fmt: skip
    assert paths == {"tests": [".uv-cache"], "metrics": [".uv-cache", ".dvc/cache"]}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.splitlines()[0][:40])
def test_what_a_step_calls_is_there_and_its_shell_is_sound(script):
    for target in re.findall(r"make (\w+)", script):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"there is no `make {target}`"
    for module in re.findall(r"python -m (regvit[\w.]+)", script):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()
    subprocess.run(["bash", "-n", "-c", script], check=True)
    if script.strip() == "make test":
        assert (ROOT / ".ci/run").read_text().splitlines()[-1] == script.strip()
