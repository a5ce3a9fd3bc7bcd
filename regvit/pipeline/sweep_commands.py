"""Sweeps: `python -m regvit.pipeline.sweep_commands list | run <name> | queue <name> | start | table <name>`; see sweeps/*.yaml.

`run` runs the points of a sweep one after the other; `queue` hands them to DVC's queue, which `start` works off
(`--jobs 2`: two at a time; `dvc queue status`, `dvc queue logs`, `dvc queue stop`). `table` writes
metrics/sweeps/<name>.{md,csv,png} from the experiments of the current commit and prints the table; `dvc repro report`
draws what lies there into the report. `--slow` takes in what the sweep calls slow. Only the stages that a sweep measures run, and what they need. Each experiment works in a copy of
the committed tree with the changes of the working tree; yours stays as it is.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from regvit.files import write_text
from regvit.report.sweeps import Sweep, assignments, markdown, plot, read_row, sweep_of, write_csv

DVC = [sys.executable, "-m", "dvc"]
FOLDER = Path("sweeps")
# An experiment works in a folder of its own: `.` on the path makes its stages import the library from there, not from
# the working tree, where the installed package points.
ENVIRONMENT = os.environ | {"PYTHONPATH": "."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("list", "run", "queue", "start", "table"))
    parser.add_argument("name", nargs="?", help="a file of sweeps/, without .yaml")
    parser.add_argument("--slow", action="store_true", help="measure what the sweep calls slow, too")
    parser.add_argument("--jobs", type=int, default=1, help="experiments that `start` runs at a time (1)")
    parser.add_argument(
        "--out", type=Path, default=Path("metrics/sweeps"), help="folder of table and plots (metrics/sweeps)"
    )
    given = parser.parse_args()
    if given.action == "list":
        for path in sorted(FOLDER.glob("*.yaml")):
            sweep = read_sweep(path.stem)
            print(f"{sweep.name:<20} {len(sweep.points):>2} points  {sweep.title}")
        return
    if given.action == "start":
        sys.exit(subprocess.call([*DVC, "queue", "start", "--jobs", str(given.jobs)], env=ENVIRONMENT))
    if given.name is None:
        parser.error(f"{given.action} needs the name of a sweep; `list` shows them")
    sweep = read_sweep(given.name, given.slow)
    if given.action == "table":
        write_table(sweep, given.out)
    else:
        submit(sweep, given.action)


def read_sweep(name: str, slow: bool = False) -> Sweep:
    """The sweep of sweeps/<name>.yaml."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        sys.exit(f"there is no {path}; there are {', '.join(sorted(p.stem for p in FOLDER.glob('*.yaml')))}")
    try:
        return sweep_of(name, YAML(typ="safe", pure=True).load(path), slow)
    except ValueError as error:
        sys.exit(str(error))


def submit(sweep: Sweep, action: str) -> None:
    """Queues the points, or runs them one after the other; those of this commit that are there are left alone."""
    known, how = experiments(), {"queue": "--queue", "run": "--temp"}[action]
    for point in sweep.points:
        name = sweep.experiment(point)
        if name in known:
            state = "queued or has failed (`dvc queue status`)" if known[name] is None else "done"
            print(f"{name} is {state}; `dvc exp remove {name}` lets it run again")
            continue
        settings = [word for change in assignments(point) for word in ("--set-param", change)]
        command = [*DVC, "exp", "run", how, "--name", name, *settings, *sweep.stages]
        if code := subprocess.call(command, env=ENVIRONMENT):
            sys.exit(f"{name}: `dvc exp run` ended with exit code {code}; what it said stands above")
    if action == "queue":
        print("`python -m regvit.pipeline.sweep_commands start` works the queue off")
    print(f"`python -m regvit.pipeline.sweep_commands table {sweep.name}` shows what is done")


def experiments() -> dict[str, dict[str, dict] | None]:
    """`{experiment: {metrics file: content}}` of the current commit; None where it has not been run to its end."""
    shown = subprocess.run([*DVC, "exp", "show", "--json"], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {}
    for state in json.loads(shown):
        for experiment in state.get("experiments") or ():
            data = experiment["revs"][0].get("data")
            done = data and (experiment.get("executor") or {}).get("state", "success") == "success"
            files = (
                {path: entry["data"] for path, entry in data["metrics"].items() if "data" in entry} if done else None
            )
            found[experiment["name"]] = files
    return found


def write_table(sweep: Sweep, folder: Path) -> None:
    """Table and plots of what has been run."""
    found = experiments()
    rows = [read_row(sweep, point, found.get(sweep.experiment(point))) for point in sweep.points]
    text = markdown(sweep, rows)
    print(text)
    if all(row.values is None for row in rows):
        sys.exit(
            f"no experiment of sweep {sweep.name} belongs to this commit: `python -m regvit.pipeline.sweep_commands run {sweep.name}`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{sweep.name}.md", text)
    write_csv(folder / f"{sweep.name}.csv", sweep, rows)
    plot(folder / f"{sweep.name}.png", sweep, rows)
    print(f"{folder}/{sweep.name}.md, .csv, .png")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence, as it ends `cat`
    main()
