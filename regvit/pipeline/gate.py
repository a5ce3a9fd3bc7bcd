"""A gate for pull requests: did a guarded figure of `dvc metrics` become worse than it may? Exit code 1 if one did.

    python -m regvit.pipeline.gate [--against main] [--out comment.md]

What is guarded stands in guard.yaml, a list of {metric, better, tolerance, run?}: `better` is `higher`, `lower` or `equal`,
`tolerance` how much worse a figure may become, in its own unit, which is the noise of a finite test set; `run` and `metric` may
hold `*`. A guarded figure that is gone fails, and so does a rule that guards nothing: DVC itself shows an empty table, and ends
well, where it finds no metrics. The files that git keeps are compared, so neither cache nor remote is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ruamel.yaml import YAML

from regvit.files import write_text
from regvit.pipeline.command import show_anything
from regvit.report.tables import NONE, Cell, Table

DIRECTIONS = ("higher", "lower", "equal")
MOST_PARAMS, MOST_FAILURES = 15, 15  # lines; the figures are one row each, of which there are sixteen


@dataclass(frozen=True)
class Rule:
    """What is guarded; see above."""

    metric: str
    better: str
    tolerance: float
    run: str = "*"

    def __post_init__(self):
        if self.better not in DIRECTIONS:
            raise ValueError(f"{self.metric}: better is {self.better!r}; expected {', '.join(DIRECTIONS)}")
        if not (isinstance(self.tolerance, int | float) and 0 <= self.tolerance < math.inf):
            raise ValueError(f"{self.metric}: tolerance is {self.tolerance!r}; expected a number of at least 0")

    def guards(self, change: Change) -> bool:
        return fnmatchcase(change.run, self.run) and fnmatchcase(change.metric, self.metric)


@dataclass(frozen=True)
class Change:
    """A figure of a run before and after; None where it is not there."""

    run: str
    metric: str
    old: float | None
    new: float | None

    def fault(self, rule: Rule) -> str | None:
        """Why the rule does not allow the change; None where it does."""
        if self.old is None:
            return None  # new here: there is nothing to fall from
        if self.new is None:
            return f"was {self.old:.4g} and is gone; run `dvc repro`, and commit metrics/"
        gain = self.new - self.old
        worse = {"higher": -gain, "lower": gain, "equal": abs(gain)}[rule.better]
        if worse <= rule.tolerance + 1e-12:
            return None
        return f"{self.old:.4g} → {self.new:.4g}: {worse:.4g} worse, more than the {rule.tolerance:g} allowed"


def changes_of(metrics_diff: Mapping[str, Mapping[str, Mapping]]) -> list[Change]:
    """Every figure in what `dvc metrics diff --json --all` says."""
    return [
        Change(Path(path).stem, metric, values.get("old"), values.get("new"))
        for path, metrics in metrics_diff.items()
        for metric, values in metrics.items()
    ]


def judge(changes: Sequence[Change], rules: Iterable[Rule]) -> dict[tuple[str, str], str]:
    """`{(run, metric): why it fails}`, in the order of the rules."""
    faults: dict[tuple[str, str], str] = {}
    for rule in rules:
        guarded = [change for change in changes if rule.guards(change)]
        if not guarded:
            faults[rule.run, rule.metric] = "the rule guards no metric: run `dvc repro`, or correct the rule"
        faults |= {(each.run, each.metric): fault for each in guarded if (fault := each.fault(rule))}
    return faults


def markdown(changes: Sequence[Change], faults: Mapping, params: Sequence[tuple[str, str, str]]) -> str:
    """What a pull request is told: the verdict, one table of the figures that changed, and the parameters that did.

    Args:
        params: (name, old, new) of each changed parameter.
    """
    if faults:
        lines = [f"- `{run}: {metric}`: {fault}" for (run, metric), fault in faults.items()]
        verdict = "\n".join([f"**{len(faults)} guarded figure(s) fell:**", "", *_first(lines, MOST_FAILURES)])
    else:
        verdict = "No guarded figure fell."
    changed = [change for change in changes if change.old != change.new]
    runs, metrics = ({getattr(change, of): None for change in changed} for of in ("run", "metric"))
    cells = {(change.run, change.metric): _cell(change, faults) for change in changed}
    rows = [(metric, *(cells.get((run, metric), "") for run in runs)) for metric in metrics]
    figures = Table.of("", ("figure", *runs), rows).markdown() if rows else "No figure changed."
    blocks = ["## Metrics against the base", verdict, figures]
    if params:
        shown = Table.of("", ("parameter", "base", "here"), params[:MOST_PARAMS]).markdown()
        more = f"\n\n… and {len(params) - MOST_PARAMS} more: `dvc params diff`" if len(params) > MOST_PARAMS else ""
        blocks.append(shown + more)
    return "\n\n".join(blocks) + "\n"


def _cell(change: Change, faults: Mapping) -> Cell:
    old, new = (NONE if value is None else f"{value:.4g}" for value in (change.old, change.new))
    gain = f"({change.new - change.old:+.4f})" if None not in (change.old, change.new) else ""
    return Cell(f"{old} → {new}", gain, "✗" if (change.run, change.metric) in faults else "")


def _first(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"- … and {len(lines) - most} more"]


def read_rules(path: Path) -> list[Rule]:
    """The rules of guard.yaml."""
    if not path.is_file():
        sys.exit(f"gate: there is no {path}; it lists the guarded metrics")
    entries = YAML(typ="safe", pure=True).load(path)
    if not isinstance(entries, list) or not entries:
        sys.exit(f"gate: {path} holds {entries!r}; expected a list of {{metric, better, tolerance}}")
    try:
        return [Rule(**entry) for entry in entries]
    except (TypeError, ValueError) as error:
        sys.exit(f"gate: {path}: {error}; an entry has the keys metric, better and tolerance, and may have run")


def diff(what: str, revision: str, *options: str) -> dict:
    """What `dvc <what> diff --json` says against a revision."""
    command = [sys.executable, "-m", "dvc", what, "diff", "--json", *options, revision]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"gate: dvc {what} diff {revision} failed: {ran.stderr.strip()}")
    return json.loads(ran.stdout or "{}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="main", help="commit, branch or tag to compare with (default: main)")
    parser.add_argument("--out", type=Path, help="write the Markdown there as well")
    options = parser.parse_args()
    rules = read_rules(Path("guard.yaml"))
    changes = changes_of(diff("metrics", options.against, "--all"))
    faults = judge(changes, rules)
    found = diff("params", options.against).get("params.yaml", {})
    params = [(name, str(v.get("old", NONE)), str(v.get("new", NONE))) for name, v in sorted(found.items())]
    text = markdown(changes, faults, params)
    if options.out:
        write_text(options.out, text)
    print(text)
    return int(bool(faults))


if __name__ == "__main__":
    show_anything()
    sys.exit(main())
