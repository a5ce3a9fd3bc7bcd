"""Metrics and predictions of experiments and commits, from git and DVC's cache, without a checkout."""

import contextlib
import io
import subprocess
import sys
import tarfile
import tempfile
from json import loads
from pathlib import Path

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from ruamel.yaml import YAML

from evaluate import sha256
from regvit.measures.evaluation import COMPARED, Drawn, Plan, draw
from regvit.pipeline.read_tables import TABLES, read_columns
from regvit.probing.predictions import load_predictions
from regvit.report.compare import Measured
from regvit.report.comparisons import Measurements
from regvit.report.experiments import Experiment


def commit_of(name: str) -> str:
    """The commit of an experiment, branch, tag or commit."""
    refs = [line.split() for line in git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").splitlines()]
    named = {ref.rpartition("/")[2]: commit for commit, ref in refs if not ref.startswith("refs/exps/exec")}
    if name in named:
        return named[name]
    try:
        return git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
    except subprocess.CalledProcessError:
        known = ", ".join(sorted(named)) or "none"
        sys.exit(f"there is no experiment, branch, tag or commit {name!r}; experiments: {known}")


def unpack(commit: str | None, folder: Path) -> Path:
    """Parameters and metrics of a commit in a folder; of the working tree where they lie."""
    if commit is None:
        return Path()
    archive = subprocess.run(
        ["git", "archive", commit, "params.yaml", "dvc.lock", "metrics"], stdout=subprocess.PIPE, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def read_experiment(name: str, root: Path) -> Experiment:
    """Everything in the metrics of a tree, whatever its parameters ask for; what an experiment did not run is left out.

    Args:
        root: holds params.yaml, dvc.lock and metrics/.
    """
    yaml = YAML(typ="safe", pure=True)
    params, lock = yaml.load(root / "params.yaml"), yaml.load(root / "dvc.lock")
    metrics, runs, digests = root / "metrics", {}, {}
    for run, entry in params["runs"].items():
        searched = metrics / "identify" / f"{entry['backbone']}.json"
        if not searched.is_file():
            continue
        evaluate, verify = (_if_there(metrics / stage / f"{run}.json") for stage in ("evaluate", "verify"))
        known = (entry["registers"], entry["num_registers"], evaluate, loads(searched.read_text()), verify)
        measured = Measured(run, *known, entry.get("neurons", "selected"))
        found, tables = {}, {}
        for stage, names in TABLES.items():
            files = sorted((metrics / stage / run).glob("*.json"))
            found[stage] = {path.stem: loads(path.read_text()) for path in files}
            for path in files:
                paths = {table: path.with_suffix("") / f"{table}.csv" for table in names}
                tables |= {(stage, path.stem, t): read_columns(at) for t, at in paths.items() if at.is_file()}
        if (verified := metrics / "verify" / run / "images.csv").is_file():
            tables[("verify", params["in_distribution"], "images")] = read_columns(verified)
        runs[run] = Measurements(measured, entry["backbone"], found, tables)
        digests[run] = _if_there(metrics / "evaluate" / run / "differences.json").get("predictions_sha256")
    outs = [out for stage in lock["stages"].values() for out in stage.get("outs", ())]
    data = {Path(out["path"]).name: out["md5"] for out in outs if Path(out["path"]).parent == Path("data")}
    return Experiment(name, runs, data, digests)


def _if_there(path: Path) -> dict:
    return loads(path.read_text()) if path.is_file() else {}


def open_predictions(run: str, commit: str | None, expected: str | None, plan: Plan) -> Drawn | str:
    """A run's predictions at a commit, resampled; or why there are none."""
    path = f"features/{run}/predictions.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(path) if commit is None else Path(folder) / "predictions.safetensors"
        if commit is not None:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    DVCFileSystem(".", rev=commit).get_file(path, str(file))
            except (FileNotFoundError, DvcException) as error:
                return f"{path} is neither in the cache nor on a remote ({error or type(error).__name__})"
        if not file.is_file():
            return f"there is no {path}"
        if sha256(file) != expected:
            return f"{path} is not what its metrics were made from"
        shown = Plan(plan.in_distribution, plan.ood, plan.anomaly, plan.detectors[:1], plan.bootstrap, plan.seed)
        return draw(load_predictions(file), shown, COMPARED)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout
