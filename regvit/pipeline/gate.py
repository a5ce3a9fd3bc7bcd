"""A gate for pull requests: which metrics changed, and which of the guarded ones fell further than they may.

A rule names metrics by pattern, says which direction is better, and how much worse a value may become. It should name
quantities that are good or bad by themselves: the difference of two readouts falls when the one held against improves,
and a control is neither. A metric with a 95 % interval (`<name>_lo`, `<name>_hi` beside it) fails only if the new value
also lies outside the old interval on the bad side: what stays inside is noise of the finite test set. A guarded metric that is gone, or is no number any more,
fails; so does a rule that guards nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

DIRECTIONS = ("higher", "lower", "equal")


@dataclass(frozen=True)
class Rule:
    """What is guarded.

    Args:
        metric: `<file>:<key.key.…>`, with `*` and `?` as in a shell; in the file they do not cross a slash, in the key
            they cross dots.
        better: `higher`, `lower`, or `equal` (any change beyond the tolerance is bad).
        tolerance: how much worse a value may become, in the metric's own unit.
        without: patterns of keys that are not guarded, though `metric` names them.
    """

    metric: str
    better: str
    tolerance: float
    without: Sequence[str] = ()

    def __post_init__(self):
        if not isinstance(self.metric, str) or not all(self.metric.partition(":")):
            raise ValueError(f"metric is {self.metric!r}; expected '<file>:<key>', e.g. 'metrics/verify/*.json:n'")
        if isinstance(self.without, str) or not all(isinstance(pattern, str) for pattern in self.without):
            raise ValueError(f"rule {self.metric!r}: without is {self.without!r}; expected a list of patterns of keys")
        if self.better not in DIRECTIONS:
            raise ValueError(f"rule {self.metric!r}: better is {self.better!r}; expected {', '.join(DIRECTIONS)}")
        if not (isinstance(self.tolerance, int | float) and 0 <= self.tolerance < math.inf):
            raise ValueError(f"rule {self.metric!r}: tolerance is {self.tolerance!r}; expected a number of at least 0")

    def guards(self, name: str) -> bool:
        """Whether a metric falls under the rule; the ends of its interval do not."""
        file, _, key = name.partition(":")
        wanted_file, _, wanted_key = self.metric.partition(":")
        folders, wanted_folders = file.split("/"), wanted_file.split("/")
        return (
            len(folders) == len(wanted_folders)
            and all(map(fnmatchcase, folders, wanted_folders))
            and fnmatchcase(key, wanted_key)
            and not key.endswith(("_lo", "_hi"))
            and not any(fnmatchcase(key, pattern) for pattern in self.without)
        )


@dataclass(frozen=True)
class Change:
    """One metric before and after; None where it was not there."""

    name: str
    old: float | None
    new: float | None
    old_interval: tuple[float, float] | None
    new_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Failure:
    """A guarded metric that fell, and why that is too much."""

    name: str
    reason: str


def flatten(files: Mapping[str, object]) -> dict[str, float]:
    """`{"<file>:<key.key>": number}` of the contents of metric files; what is no number is left out.

    Args:
        files: parsed JSON by path.
    """
    found: dict[str, float] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if not prefix.endswith(":") else f"{prefix}{key}", inner)
        elif isinstance(value, int | float):  # booleans count as 0 and 1
            found[prefix] = float(value)

    for path, content in files.items():
        walk(f"{path}:", content)
    return found


def changes(old: Mapping[str, float], new: Mapping[str, float]) -> list[Change]:
    """Every metric that is on either side, with its intervals, sorted by name; interval ends get no row of their own."""
    names = {name for name in (*old, *new) if not _is_end(name, old) and not _is_end(name, new)}
    return [Change(n, old.get(n), new.get(n), _interval(n, old), _interval(n, new)) for n in sorted(names)]


def judge(all_changes: Iterable[Change], rules: Iterable[Rule]) -> list[Failure]:
    """The guarded metrics that became worse than their rule allows, in order of the rules."""
    all_changes, failures = list(all_changes), []
    for rule in rules:
        guarded = [change for change in all_changes if rule.guards(change.name)]
        if not guarded:
            failures.append(Failure(rule.metric, "the rule guards no metric: correct its pattern, or take it away"))
        failures += [failure for change in guarded if (failure := _judge(change, rule)) is not None]
    return failures


def markdown(
    all_changes: Iterable[Change],
    failures: Iterable[Failure],
    params: Iterable[tuple[str, str, str]],
    rules: Iterable[Rule] = (),
    limit: int | None = None,
) -> str:
    """What a pull request is told: the verdict, changed parameters, changed metrics with their intervals.

    Guarded metrics come first, in order of the rules; then the others, those first that moved furthest in half widths
    of their old interval.

    Args:
        params: (name, old, new) of each changed parameter.
        rules: tell which metrics are guarded.
        limit: characters that the text may have (a comment on GitHub: 65,536); rows that do not fit are left out of the
            end of each list and counted. None: all of them.
    """
    failures, params = list(failures), list(params)
    changed = [change for change in all_changes if change.old != change.new]
    guarded = list({change.name: change for rule in rules for change in changed if rule.guards(change.name)}.values())
    names = {change.name for change in guarded}
    others = sorted((change for change in changed if change.name not in names), key=_moved, reverse=True)
    room = None if limit is None else limit - 700  # what stands around the four lists
    blocks = []
    if failures:
        rows, left_out = _fitting([f"- `{failure.name}`: {failure.reason}" for failure in failures], room and room // 3)
        blocks.append([f"**{len(failures)} guarded metric(s) fell:**", "", *rows, *left_out])
    else:
        blocks.append(["No guarded metric fell."])
    if params:
        shown = [f"| `{name}` | {old} | {new} |" for name, old, new in params]
        rows, left_out = _fitting(shown, room and room // 3)
        blocks.append(["| parameter | base | here |", "|---|---|---|", *rows, *left_out])
    for title, of in (("guarded metric", guarded), ("other metric", others)):
        if of:
            used = sum(len(line) + 1 for block in blocks for line in block)
            rows, left_out = _fitting([_row(change) for change in of], room and room - used)
            blocks.append([f"| {title} | base | here | difference |", "|---|--:|--:|--:|", *rows, *left_out])
    if not changed:
        blocks.append(["No metric changed."])
    return "\n\n".join(["## Metrics against the base", *("\n".join(block) for block in blocks)]) + "\n"


def _moved(change: Change) -> float:
    """How far a metric moved, in half widths of its old interval; -1 where that cannot be told."""
    if change.old is None or change.new is None or change.old_interval is None:
        return -1.0
    low, high = change.old_interval
    moved = 2 * abs(change.new - change.old) / (high - low) if high > low else math.inf
    return -1.0 if math.isnan(moved) else moved


def _row(change: Change) -> str:
    both = change.old is not None and change.new is not None
    difference = f"{change.new - change.old:+.4g}" if both else ""
    old, new = _shown(change.old, change.old_interval), _shown(change.new, change.new_interval)
    return f"| `{change.name}` | {old} | {new} | {difference} |"


def _fitting(rows: list[str], room: int | None) -> tuple[list[str], list[str]]:
    """The first rows that fit into so many characters, and lines that count the others."""
    if room is None:
        return rows, []
    kept = 0
    while kept < len(rows) and (room := room - len(rows[kept]) - 1) >= 0:
        kept += 1
    return rows[:kept], [] if kept == len(rows) else [
        "",
        f"… and {len(rows) - kept} more, which `regvit/pipeline/gate_commands.py` prints.",
    ]


def _judge(change: Change, rule: Rule) -> Failure | None:
    if change.old is None:
        return None  # new here: there is nothing to fall from
    if change.new is None or not math.isfinite(change.new):
        return Failure(change.name, f"was {change.old:.4g} and is gone; run `dvc repro`, and commit metrics/")
    worse = {"higher": change.old - change.new, "lower": change.new - change.old, "equal": abs(change.new - change.old)}
    if worse[rule.better] <= rule.tolerance + 1e-12:
        return None
    if change.old_interval is not None and rule.better != "equal":
        low, high = change.old_interval
        if low <= change.new <= high:
            return None
        beyond = f" and lies outside the old interval [{low:.4g}, {high:.4g}]"
    else:
        beyond = ""
    return Failure(
        change.name,
        f"{change.old:.4g} → {change.new:.4g}: {worse[rule.better]:.4g} worse, more than the {rule.tolerance:g} "
        f"allowed{beyond}",
    )


def _interval(name: str, values: Mapping[str, float]) -> tuple[float, float] | None:
    low, high = values.get(f"{name}_lo"), values.get(f"{name}_hi")
    return None if low is None or high is None else (low, high)


def _is_end(name: str, values: Mapping[str, float]) -> bool:
    return name.endswith(("_lo", "_hi")) and name[:-3] in values


def _shown(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" + ("" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]")
