"""A no-op `dvc repro` of a large pipeline: `python -m benchmarks.pipeline [--datasets 50] [--runs 4]`.

Makes a copy of this project with so many data sets and runs in params.yaml, puts a tiny file or folder in the place of
every output, records all of it as `dvc commit` would (no stage runs), and then times `dvc repro`, which finds
nothing to do, and `dvc status`: seconds of the CPU and by the clock. Nothing outside of a temporary folder is touched.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dvc.repo import Repo
from dvc.stage.serialize import to_lockfile
from dvc.utils.serialize import dump_yaml
from ruamel.yaml import YAML

from benchmarks.machine import describe

ROOT = Path(__file__).resolve().parents[1]
WANTED = 6.0  # seconds of a no-op repro with 50 data sets and 4 runs
COPIED = ("dvc.yaml", "params.yaml", "stages", "regvit", ".dvcignore", ".gitignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=50)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="where to put cProfile's record of one repro")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pipeline.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        stages = build(project, given.datasets, given.runs)
        found = {"stages": stages, "datasets": given.datasets, "runs": given.runs}
        for command in ("repro", "status"):
            times = [timed(project, command) for _ in range(given.rounds)]
            found[command] = {"cpu_s": min(cpu for cpu, _ in times), "wall_s": min(wall for _, wall in times)}
            print(f"no-op dvc {command}, {stages} stages: {found[command]['cpu_s']:.1f} s of the CPU, "
                  f"{found[command]['wall_s']:.1f} s by the clock")  # fmt: skip
        if given.profile:
            dvc(project, "repro", before=["-m", "cProfile", "-o", str(given.profile.resolve())])
    found["wanted_s"] = WANTED
    given.out.write_text(json.dumps({"machine": describe(), **found}, indent=1) + "\n")


def build(project: Path, datasets: int, runs: int) -> int:
    """The project with all outputs in place and recorded. Returns the number of its stages."""
    project.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, project / name)
    enlarge(project / "params.yaml", datasets, runs)
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    dvc(project, "init", "-q")
    dvc(project, "config", "core.analytics", "false")
    with contextlib.chdir(project), Repo() as repo:
        stages = list(repo.index.stages)
        for path in {Path(out.fs_path) for stage in stages for out in stage.outs}:
            place(path)
        for path in {Path(dep.fs_path) for stage in stages for dep in stage.deps}:
            if not path.exists():
                place(path)
        locked = {}
        with repo.lock:
            for stage in stages:
                stage.save(run_cache=False)
                stage.commit()
                locked |= to_lockfile(stage)
        # At once: `dvc commit` writes the whole file after each stage, which for hundreds of them takes minutes.
        dump_yaml(str(project / "dvc.lock"), {"schema": "2.0", "stages": locked})
    return len(stages)


def enlarge(params: Path, datasets: int, runs: int) -> None:
    """Adds data sets and runs, copies of what is there, until there are so many."""
    yaml = YAML()
    values = yaml.load(params)
    for block, count in (("datasets", datasets), ("runs", runs)):
        of_kind = list(values[block].items())
        pattern = next(entry for name, entry in reversed(of_kind))
        for i in range(count - len(of_kind)):
            values[block][f"more_{i}"] = dict(pattern)
    yaml.dump(values, params)


def place(path: Path) -> None:
    """Something tiny: a file where the name has a suffix of files, else a folder with a file."""
    if path.suffix and path.suffix != ".zarr":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.name}\n")
    else:
        path.mkdir(parents=True, exist_ok=True)
        (path / "content").write_text(f"{path.name}\n")


def timed(project: Path, command: str) -> tuple[float, float]:
    """Seconds of the CPU and by the clock of a command that finds nothing to do.

    Raises:
        RuntimeError: it found something to do.
    """
    cpu, wall = os.times(), time.monotonic()
    said = dvc(project, command)
    wall, now = time.monotonic() - wall, os.times()
    if "up to date" not in said:
        raise RuntimeError(f"dvc {command} was no no-op: {said[-500:]}")
    return now.children_user + now.children_system - cpu.children_user - cpu.children_system, wall


def dvc(project: Path, *arguments: str, before: tuple | list = ()) -> str:
    """Runs DVC there and gives what it says.

    Raises:
        RuntimeError: it failed.
    """
    way = before or ["-m"]
    done = subprocess.run([sys.executable, *way, *(["-m"] if before else []), "dvc", *arguments], cwd=project,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"dvc {' '.join(arguments)} failed: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
