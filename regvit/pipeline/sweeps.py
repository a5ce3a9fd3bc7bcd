"""Sweeps: one comparison over several settings, each an experiment of DVC (sweeps/*.yaml).

    python -m regvit.pipeline.sweeps list | queue <name> | start | table <name>     (--slow: also what takes long)

`queue` is `dvc exp run --queue -S a=1,2,4`, `start` is `dvc queue start` (`dvc queue status`, `logs` and `stop` go with it), and
`table` shows the figures of the experiments of the current commit. A sweep is

    title, expect: what the settings are of, and what should be seen
    vary: {<parameter>: [value, …]}      a point each combination; or points: {<label>: {<parameter>: value, …}}
    set: {<parameter>: value}            for all points alike
    stages: {<stage>@<run>: [<metric>[:<readout>[:<data set>]], …]}      what runs, and what of it is shown
    slow: likewise, where asked for

in which `<run>` is the run that `--run` names, or else the first of params.yaml with test-time registers; `<backbone>` its
backbone, and `<id>` the ID set.
"""

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import dvc.api
from ruamel.yaml import YAML

from regvit.pipeline.command import show_anything
from regvit.pipeline.compare_experiments import UNAVAILABLE
from regvit.pipeline.params import ParamsError, entry_of, faults_of, load_params, read_values
from regvit.report.catalogue import METRICS, Metric
from regvit.report.study import Value
from regvit.report.tables import NONE, Table, show
from regvit.stats.figures import read_figures

DVC = [sys.executable, "-m", "dvc"]
FOLDER = Path("sweeps")
PLACEHOLDERS = ("<run>", "<backbone>", "<id>")
COUNTS = {"layer", "register_neurons"}  # without decimals
KEYS = {"title", "expect", "vary", "points", "set", "stages", "slow"}
# An experiment works in a folder of its own: `.` on the path makes its stages import the library from there, not from
# the working tree, where the installed package points.
ENVIRONMENT = os.environ | {"PYTHONPATH": "."}


@dataclass(frozen=True)
class Sweep:
    """What is varied, and the figures that are shown by stage."""

    name: str
    title: str
    expect: str
    vary: Mapping[str, list]
    points: Mapping[str, Mapping]
    shared: Mapping[str, object]
    stages: Mapping[str, list[str]]

    def commands(self) -> Iterator[list[str]]:
        """The `dvc exp run` that queue the points."""
        for label, changes in (self.points or {"": {}}).items():
            settings = [f"++{name}={json.dumps(value)}" for name, value in _leaves({**self.shared, **changes})]
            settings += [f"++{name}={','.join(map(json.dumps, values))}" for name, values in self.vary.items()]
            name = f"{self.name}-{label}" if label else self.name
            words = [word for setting in settings for word in ("--set-param", setting)]
            yield [*DVC, "exp", "run", "--queue", "--name", name, *words, *self.stages]

    def faults(self) -> Iterator[str]:
        """What would be wrong with params.yaml at the points, a sentence each."""
        for label, changes in (self.points or {"": {}}).items():
            for values in itertools.product(*self.vary.values()):
                given, point = read_values("params.yaml"), dict(zip(self.vary, values, strict=True))
                for name, value in _leaves({**self.shared, **changes, **point}):
                    *path, last = name.split(".")
                    block = given
                    for key in path:
                        block[key] = block.get(key) or {}
                        block = block[key]
                    block[last] = value
                yield from (f"{label or point}: {fault}" for fault in faults_of(given))


def read_sweep(name: str, slow: bool = False, run: str | None = None) -> Sweep:
    """The sweep of sweeps/<name>.yaml, of a run; with what is slow its experiments are others, and so is its name."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        sys.exit(f"there is no {path}; there are {', '.join(sorted(p.stem for p in FOLDER.glob('*.yaml')))}")
    text = path.read_text(encoding="utf-8")
    for placeholder, word in _words(run).items() if any(each in text for each in PLACEHOLDERS) else ():
        text = text.replace(placeholder, word)
    found = YAML(typ="safe", pure=True).load(text)
    if unknown := sorted(found.keys() - KEYS):
        sys.exit(f"{path}: unknown key {unknown[0]}; known are {', '.join(sorted(KEYS))}")
    if bool(found.get("vary")) == bool(found.get("points")) or not found.get("stages"):
        sys.exit(f"{path}: give either vary or points, and the stages that are measured")
    stages = found["stages"] | (found.get("slow", {}) if slow else {})
    varied = {of: found.get(of) or {} for of in ("vary", "points")}
    called = f"{name}_slow" if slow else name
    return Sweep(
        called, found["title"], found.get("expect", ""), **varied, shared=found.get("set") or {}, stages=stages
    )


def _words(run: str | None) -> dict[str, str]:
    """What the placeholders of a sweep stand for."""
    params = load_params()
    treated = [
        name for name, each in params.runs.items() if (each.registers, each.neurons) == ("test_time", "selected")
    ]
    if run is None and not treated:
        sys.exit(
            "no run of params.yaml has test-time registers, which this sweep is of: add one, or name a run by --run"
        )
    run = run or treated[0]
    words = (run, entry_of(params, "runs", run).backbone, params.in_distribution)
    return dict(zip(PLACEHOLDERS, words, strict=True))


def table(sweep: Sweep, known: Mapping[str, Mapping]) -> Table:
    """A row for each of `experiments`, a column a figure; a dash where one has none, as where a backbone has no outliers."""
    rows = []
    for name, experiment in known.items():
        setting = [_shown(experiment, parameter) for parameter in sweep.vary] or [name.removeprefix(f"{sweep.name}-")]
        cells = []
        for stage, columns in sweep.stages.items():
            figures = _figures(experiment["rev"], stage)
            cells += [show(figures.get(column), _metric(stage, column)) for column in columns]
        rows.append((*setting, *cells))
    labels = [_metric(stage, column).label for stage, columns in sweep.stages.items() for column in columns]
    return Table.of(f"{sweep.title}. Expected: {sweep.expect}", (*(sweep.vary or ["point"]), *labels), rows)


def experiments(sweep: Sweep) -> dict[str, Mapping]:
    """Those of the sweep that DVC knows at this commit, by name, in the order of the points."""
    combinations = range(1, 1 + math.prod(map(len, sweep.vary.values())))
    names = [f"{sweep.name}-{point}" for point in sweep.points or combinations]  # as DVC numbers them
    known = {experiment["Experiment"]: experiment for experiment in dvc.api.exp_show()}
    return {name: known[name] for name in names if name in known}


def unfinished(known: Mapping[str, Mapping]) -> Iterator[str]:
    """A line for what failed, one for what waits, one for what runs."""
    states = {name: experiment.get("State") for name, experiment in known.items()}
    for state, more in (("Failed", "; `dvc queue logs <name>` says why"), ("Queued", ""), ("Running", "")):
        if names := [name for name, each in states.items() if each == state]:
            yield f"{state.lower()}: {', '.join(names)}{more}"


def _figures(revision: str, stage: str) -> Mapping[str, Value]:
    """`{metric:readout:data set: value}` that a stage left in an experiment, also without its last parts; empty if it did not run."""
    name, _, of = stage.partition("@")
    run, _, dataset = of.partition("-")
    folder = f"metrics/backbones/{run}" if name == "identify" else f"metrics/runs/{run}/{name}"
    try:
        with dvc.api.open(f"{folder}/{dataset}/figures.csv".replace("//", "/"), rev=revision) as file:
            rows = read_figures(file)
    except UNAVAILABLE:
        return {}
    found: dict[str, Value] = {}
    for row in rows.dropna(subset="value").itertuples():
        if row.classifier in ("", "linear") and not row.detector:
            value = Value(row.value, *(None if end != end else end for end in (row.lo, row.hi)))
            for key in (row.metric, f"{row.metric}:{row.readout}", f"{row.metric}:{row.readout}:{row.dataset}"):
                found.setdefault(key, value)
    return found


def _metric(stage: str, column: str) -> Metric:
    name, _, about = column.partition(":")
    known = METRICS.get(stage.partition("@")[0], {}).get(name)
    known = known or Metric(name.replace("_", " "), 0, 1, 0 if name in COUNTS else 3)
    return known._replace(label=f"{known.label} {about.replace(':', ', ')}".strip())


def _shown(experiment: Mapping, parameter: str) -> str:
    """The value of a parameter in an experiment."""
    value = experiment.get(parameter, experiment.get(f"params.yaml:{parameter}", NONE))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _leaves(changes: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Blocks taken apart into dotted names."""
    for name, value in changes.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("list", "queue", "start", "table"))
    parser.add_argument("name", nargs="?", help="a file of sweeps/, without .yaml")
    parser.add_argument("--slow", action="store_true", help="measure what the sweep calls slow, too")
    parser.add_argument("--run", help="the run that is varied (the first with test-time registers)")
    parser.add_argument("--jobs", default="1", help="experiments that `start` runs at a time (1)")
    given = parser.parse_args()
    if given.action == "list":
        for path in sorted(FOLDER.glob("*.yaml")):
            print(f"{path.stem:<20} {YAML(typ='safe', pure=True).load(path)['title']}")
    elif given.action == "start":
        sys.exit(subprocess.call([*DVC, "queue", "start", "--jobs", given.jobs], env=ENVIRONMENT))
    elif given.name is None:
        parser.error(f"{given.action} needs the name of a sweep; `list` shows them")
    elif given.action == "queue":
        load_params()  # a fault that is there now is no point's
        sweep = read_sweep(given.name, given.slow, given.run)
        if fault := next(sweep.faults(), None):
            sys.exit(f"nothing was queued, as params.yaml would have a fault at {fault}")
        for command in sweep.commands():
            if code := subprocess.call(command, env=ENVIRONMENT):
                sys.exit(f"`dvc exp run` ended with exit code {code}; what it said stands above")
        print("`python -m regvit.pipeline.sweeps start` works the queue off, and `table` shows what is done")
    else:
        sweep = read_sweep(given.name, given.slow, given.run)
        known = experiments(sweep)
        shown = table(sweep, known)
        print(
            shown.text() if shown else f"no experiment of sweep {given.name} belongs to this commit: `queue` it first"
        )
        for line in unfinished(known):
            print(line)


if __name__ == "__main__":
    show_anything()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence, as it ends `cat`
    try:
        main()
    except ParamsError as error:
        sys.exit(str(error))
