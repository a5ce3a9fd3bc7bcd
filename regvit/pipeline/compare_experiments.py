"""Experiments, commits or the working tree against the first one named, with paired intervals (`make compare EXPS="a b"`).

`dvc metrics diff` and `dvc exp diff` say what changed; this says whether it is more than chance: figures image by image and
predictions come out of DVC's cache (or remote) at each commit, and are paired. `workspace` is the working tree.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc_data.index.index import DataIndexDirError
from ruamel.yaml import YAML
from scmrepo.exceptions import SCMError

from regvit.measures.evaluation import paired_differences, readout_pairs
from regvit.probing.predictions import open_predictions
from regvit.report.catalogue import METRICS
from regvit.report.differences import COLUMNS, image_differences
from regvit.report.results import Results
from regvit.report.study import Study, all_figures
from regvit.report.tables import Table, show, show_change

WORKSPACE = "workspace"
UNAVAILABLE = (
    DvcException,
    SCMError,
    DataIndexDirError,
    OSError,
)  # what DVC raises for names and outputs that it has not
NOTE = "Differences are of the same images; ▲ better, ▼ worse: the 95 % interval leaves out zero, which 1 in 20 does by chance."
OUTPUTS = ("metrics/runs", "metrics/backbones", "features/predictions")


def fetch(name: str, folder: Path) -> Study:
    """The study of an experiment, its tables and predictions in a folder."""
    if name == WORKSPACE:
        folder = Path()
        text = Path("params.yaml").read_text()
    else:
        try:
            tree = DVCFileSystem(rev=name)
            text = tree.read_text("params.yaml")
            for output in OUTPUTS:
                (folder / output).parent.mkdir(parents=True, exist_ok=True)
                tree.get(output, str(folder / output), recursive=True)
        except UNAVAILABLE as error:
            sys.exit(f"compare: {name}: {error}; is it an experiment, branch or commit, and its results in the cache?")
    return Study.of(YAML(typ="safe", pure=True).load(text), folder / "metrics")


def paired(first: Study, other: Study, run: str) -> pd.DataFrame:
    """Every figure of a run in one experiment minus that in the first."""
    rows = pd.DataFrame(image_differences(other, run, run, first), columns=list(COLUMNS))
    paths = [study.folder.parent / f"features/predictions/{run}.zarr" for study in (other, first)]
    a, b = map(open_predictions, paths)
    pairs = [(mine, theirs) for mine, theirs in readout_pairs(a, b) if mine == theirs]
    gained = [paired_differences(a, mine, b, theirs, seed=first.seed) for mine, theirs in pairs]
    return pd.concat([rows, *(table.assign(stage="evaluate") for table in gained)])


def rows(first: Results, other: Results, run: str) -> Iterator[tuple]:
    """A row for each figure that differs."""
    for stage in METRICS:
        for place in other.places(stage):
            values = [results.value(run, place) for results in (first, other)]
            if None not in values and values[0] != values[1]:
                metric = METRICS[stage][place.metric]
                label = " ".join(filter(None, (metric.glance or metric.label, place.classifier, place.detector)))
                change = other.differences.get((run, run, place.readout, place))
                cells = (*(show(value, metric) for value in values), show_change(change, metric))
                yield run, label.format(readout=place.readout), place.dataset, *cells


def main(*names: str) -> int:
    if len(names) < 2:
        sys.exit('usage: make compare EXPS="<experiment> <experiment> …"; the others are held against the first')
    with tempfile.TemporaryDirectory() as folder:
        studies = [fetch(name, Path(folder) / str(i)) for i, name in enumerate(names)]
        base = Results.measured(studies[0])
        for name, study in zip(names[1:], studies[1:], strict=True):
            shared = [run for run in study.runs if run in studies[0].runs]
            differences = pd.concat([paired(studies[0], study, run) for run in shared])
            results = Results.of(study, all_figures(study), differences)
            lines = [row for run in shared for row in rows(base, results, run)]
            header = ("run", "measure", "data set", names[0], name, "difference")
            table = Table.of(f"{name} against {names[0]}", header, lines, NOTE)
            print(table.text() if table else f"{name} has the same figures as {names[0]}", "\n")
    return 0
