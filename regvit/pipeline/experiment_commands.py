"""Experiments: `python -m regvit.pipeline.experiment_commands show | compare <name> <name> …`; `make experiments`, `make compare EXPS="…"`.

`show` is `dvc exp show` with the columns that say something: what was changed, and the figures of metrics/summary.json
that differ (all metrics: 16,000 columns). Options of `dvc exp show` may follow (`--md`, `--csv`, `-A`). The other files stay
metrics: `dvc metrics diff` compares them, DVC's run cache leaves out stages with a plain output that is not cached, and as
plots they would be drawn.

`compare` holds experiments, commits, branches or `workspace` (the working tree) against the first one named: a table with
paired intervals (work/compare/compare.md and .csv) and a picture (.png). Predictions come from DVC's cache or remote at
that commit; where they are in neither, intervals are not paired, and the table says so.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ruamel.yaml import YAML

from evaluate import plan_of
from regvit.files import write_text
from regvit.measures.evaluation import Plan
from regvit.pipeline.experiment_trees import commit_of, open_predictions, read_experiment, unpack
from regvit.report.experiments import Experiment, compare_experiments, experiment_table, plot_experiments, write_rows

WORKSPACE = "workspace"
SUMMARY = "metrics/summary.json"
ALWAYS = ("outliers", "top1")  # shown even where nothing differs
FIXED = ("Experiment", "Created", "rev", "typ", "parent", "State", "Executor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("show", help="dvc exp show with few columns; its options may follow")
    compare = actions.add_parser("compare", help="table and picture with paired intervals")
    compare.add_argument(
        "names", nargs="+", help=f"experiments, commits, branches or {WORKSPACE}; the first is held against"
    )
    compare.add_argument("--out", type=Path, default=Path("work/compare"), help="folder (work/compare)")
    compare.add_argument("--all", action="store_true", help="also the rows in which nothing differs")
    given, rest = parser.parse_known_args()
    if given.action == "show":
        sys.exit(show(rest))
    if rest:
        parser.error(f"unknown option {rest[0]}")
    write_comparison(given.names, given.out, given.all)


def show(options: list[str]) -> int:
    """Runs `dvc exp show`; its exit code."""
    params = YAML(typ="safe", pure=True).load(Path("params.yaml"))
    names = [f"({SUMMARY}:)?{run}\\." for run in params["runs"]]
    blocks = [rf"(params\.yaml:)?{block}(\.|$)" for block in params]
    kept = "|".join([*(f"{column}$" for column in FIXED), *names, *blocks])
    always = "|".join(f"{name}({'|'.join(ALWAYS)})$" for name in names)
    filters = ["--only-changed", "--drop", f"^(?!{kept})", "--keep", f"^({always})"]
    return subprocess.call([sys.executable, "-m", "dvc", "exp", "show", "--no-pager", *filters, *options])


def write_comparison(names: list[str], out: Path, everything: bool) -> None:
    """Table and picture; the table is printed, too."""
    revisions = [None if name == WORKSPACE else commit_of(name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        roots = [unpack(commit, Path(folder) / str(i)) for i, commit in enumerate(revisions)]
        plan = plan_of(YAML(typ="safe", pure=True).load(roots[0] / "params.yaml"))
        found = [read_experiment(name, root) for name, root in zip(names, roots, strict=True)]
        found = [
            with_predictions(each, found, commit, root, plan)
            for each, commit, root in zip(found, revisions, roots, strict=True)
        ]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence; not before, DVC may be on a network
    try:
        rows = compare_experiments(found, plan)
    except ValueError as error:
        sys.exit(f"compare: {error}")
    table = experiment_table(found, rows, everything)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "compare.md", f"{table.title}:\n\n{table.markdown()}\n")
    write_rows(out / "compare.csv", found, rows)
    written = ".md, .csv"
    if any(row.differs for row in rows):
        plot_experiments(out / "compare.png", found, rows)
        written += ", .png"
    print(f"{table.text()}\n\n{out}/compare{written}")


def with_predictions(
    of: Experiment, others: list[Experiment], commit: str | None, root: Path, plan: Plan
) -> Experiment:
    """The experiment with the predictions of those runs whose figures are not the same everywhere."""
    drawn = {}
    for name, run in of.runs.items():
        same = all(name in each.runs and each.runs[name].run.evaluate == run.run.evaluate for each in others)
        if same or not run.run.evaluate:
            continue
        predictions = open_predictions(name, commit, of.digests.get(name), plan)
        if isinstance(predictions, str):
            print(f"compare: {of.name}: {predictions}; its differences in accuracy are not paired", file=sys.stderr)
        else:
            drawn[name] = predictions
    return Experiment(of.name, of.runs, of.data, of.digests, drawn)


if __name__ == "__main__":
    main()
