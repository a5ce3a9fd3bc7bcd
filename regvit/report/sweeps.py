"""A sweep: one comparison over several settings, each an experiment; what it varies, and its table and plots.

A sweep is described by a mapping (the stages read it from a YAML file of `sweeps/`):

    title: what the settings are of
    expect: what should be seen, in a sentence
    points: {<label>: {<parameter>: value, …}, …}     or     vary: {<parameter>: [value, …]}
    measure: {<stage>: {file: <metrics file>, columns: [<key>, …]}, …}
    slow: likewise, measured only where asked for
    set: {<parameter>: value, …}                      for all points alike

A `vary` of several parameters has a point for each combination. A key is dotted (`cls.id.top1`); `{point}` in it
stands for the point's label. Where `<key>_lo` and `<key>_hi` stand beside a value, they are its 95 % interval.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from regvit.files import replacing

KEYS = ("title", "expect", "points", "vary", "measure", "slow", "set")
PANELS_PER_ROW = 3


@dataclass(frozen=True)
class Point:
    """One setting.

    Args:
        label: on the axis, and in the experiment's name.
        changes: `{parameter: value}` against the parameters as they stand.
    """

    label: str
    changes: Mapping[str, object]


@dataclass(frozen=True)
class Column:
    """One value that is read from each experiment.

    Args:
        stage: that writes it, such as `verify@test_time_reg`.
        file: of metrics, as the stage names it.
        key: dotted; may hold `{point}`.
    """

    stage: str
    file: str
    key: str


@dataclass(frozen=True)
class Sweep:
    """What is varied and what is measured."""

    name: str
    title: str
    expect: str
    points: tuple[Point, ...]
    columns: tuple[Column, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that have to run, each once, in the order of the columns."""
        return tuple(dict.fromkeys(column.stage for column in self.columns))

    def experiment(self, point: Point) -> str:
        """The name of a point's experiment.

        It ends with a digest of what the point changes and which stages run: an experiment holds the metrics of other
        stages, too, as they stood in the commit, and these must not be taken for measured.
        """
        made_of = json.dumps([dict(point.changes), self.stages], sort_keys=True)
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:6]
        return f"{self.name}-{re.sub(r'[^A-Za-z0-9]', '_', point.label)}-{digest}"


@dataclass(frozen=True)
class Value:
    """A measured value with its 95 % interval, where it has one; all three None where it was not measured."""

    value: float | None
    lo: float | None = None
    hi: float | None = None


@dataclass(frozen=True)
class Row:
    """The values of one point, one a column; None where its experiment has not been run."""

    point: Point
    values: tuple[Value, ...] | None


def sweep_of(name: str, document: object, slow: bool = False) -> Sweep:
    """A sweep from its description.

    Args:
        name: of the sweep; experiments are named after it.
        document: as the module's docstring says.
        slow: measure what stands under `slow`, too.
    Raises:
        ValueError: a key is unknown, missing or empty, or two points have the same label.
    """
    where = f"sweep {name}"
    if not re.fullmatch(r"[A-Za-z]\w*", name, flags=re.ASCII):
        raise ValueError(f"{where}: the name {name!r} is not made of letters, digits and _ with a letter first")
    if not isinstance(document, Mapping):
        raise ValueError(f"{where} is {document!r}; expected a block with the keys {', '.join(KEYS)}")
    if unknown := sorted(document.keys() - set(KEYS)):
        raise ValueError(f"{where}: unknown key {unknown[0]}; known are {', '.join(KEYS)}")
    if missing := [key for key in ("title", "measure") if not document.get(key)]:
        raise ValueError(f"{where}: {missing[0]} is missing or empty; add it")
    if bool(document.get("points")) == bool(document.get("vary")):
        raise ValueError(f"{where}: give either points or vary, not {'both' if document.get('vary') else 'neither'}")
    if slow and not document.get("slow"):
        raise ValueError(f"{where} measures nothing that is slow; leave the option out")
    shared = document.get("set") or {}
    points = tuple(Point(label, {**shared, **changes}) for label, changes in _labelled(document, where))
    measured = [*document["measure"].items(), *(document["slow"].items() if slow else ())]
    columns = []
    for stage, entry in measured:
        if not isinstance(entry, Mapping) or entry.keys() != {"file", "columns"} or not entry["columns"]:
            raise ValueError(f"{where}: {stage} is {entry!r}; expected a block with file and a list of columns")
        columns += [Column(stage, entry["file"], key) for key in entry["columns"]]
    sweep = Sweep(name, document["title"], document.get("expect") or "", points, tuple(columns))
    labels = [point.label for point in points]
    if twice := [label for i, label in enumerate(labels) if label in labels[:i]]:
        raise ValueError(f"{where}: two points have the label {twice[0]}; give each its own")
    return sweep


def _labelled(document: Mapping, where: str) -> list[tuple[str, Mapping]]:
    """Label and changes of each point."""
    if document.get("points"):
        return [(str(label), changes or {}) for label, changes in document["points"].items()]
    for parameter, values in document["vary"].items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: vary.{parameter} is {values!r}; expected a list of at least one value")
    names = list(document["vary"])
    combinations = itertools.product(*document["vary"].values())
    return [("_".join(_word(v) for v in values), dict(zip(names, values, strict=True))) for values in combinations]


def _word(value: object) -> str:
    """A value as part of a label."""
    return "+".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)


def assignments(point: Point) -> list[str]:
    """A point's changes as DVC's `--set-param` takes them; `++` sets a parameter whether it is there or not."""
    return [f"++{parameter}={json.dumps(value)}" for parameter, value in _leaves(point.changes)]


def _leaves(changes: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Blocks taken apart into dotted names."""
    for name, value in changes.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_row(sweep: Sweep, point: Point, metrics: Mapping[str, Mapping] | None) -> Row:
    """The values of one point.

    Args:
        metrics: content of each metrics file of the point's experiment; None where there is no such experiment.
    """
    if metrics is None:
        return Row(point, None)
    values = []
    for column in sweep.columns:
        key = column.key.replace("{point}", point.label)
        content = metrics.get(column.file, {})
        values.append(Value(*(_number(content, f"{key}{end}") for end in ("", "_lo", "_hi"))))
    return Row(point, tuple(values))


def _number(content: object, key: str) -> float | None:
    """The number at a dotted key, or None."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return float(content) if isinstance(content, int | float) and not isinstance(content, bool) else None


def markdown(sweep: Sweep, rows: Sequence[Row]) -> str:
    """The table, one row a point, values with their intervals in brackets."""
    lines = [f"{sweep.title}. Expected: {sweep.expect}" if sweep.expect else f"{sweep.title}.", ""]
    lines += [_line(["point", *(column.key for column in sweep.columns)])]
    lines += [_line(["---", *("--:" for _ in sweep.columns)])]
    for row in rows:
        cells = ["not run"] * len(sweep.columns) if row.values is None else [_cell(value) for value in row.values]
        lines.append(_line([row.point.label, *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Value) -> str:
    if value.value is None:
        return "–"
    interval = "" if value.lo is None or value.hi is None else f" [{value.lo:.4g}, {value.hi:.4g}]"
    return f"{value.value:.4g}{interval}"


def write_csv(path: Path, sweep: Sweep, rows: Sequence[Row]) -> None:
    """The table with a line a point and column: `point, stage, key, value, lo, hi`; unmeasured values are left out."""
    with replacing(path) as beside, open(beside, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["point", "stage", "key", "value", "lo", "hi"])
        for row in rows:
            for column, value in zip(sweep.columns, row.values or (), strict=False):
                if value.value is not None:
                    ends = ["" if end is None else end for end in (value.lo, value.hi)]
                    writer.writerow([row.point.label, column.stage, column.key, value.value, *ends])


@dataclass(frozen=True)
class Kept:
    """A table that was written down (`markdown`, `write_csv`), for the report.

    Args:
        name: of the sweep.
        caption: its title, and what was expected.
        points: labels of the settings, in their order.
        values: by column, `<key> (<stage>)`, one a point; None where it was not measured.
    """

    name: str
    caption: str
    points: tuple[str, ...]
    values: Mapping[str, tuple[Value | None, ...]]


def read_kept(path: Path) -> Kept:
    """What `write_csv` wrote, with the first line of the table beside it.

    Raises:
        ValueError: it is no such table; the message says what is missing.
    """
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if missing := {"point", "stage", "key", "value", "lo", "hi"} - set(reader.fieldnames or ()):
        raise ValueError(
            f"{path} has no column {min(missing)}; write it again: python -m regvit.pipeline.sweep_commands table {path.stem}"
        )
    points = tuple(dict.fromkeys(row["point"] for row in rows))
    found: dict[str, dict[str, Value]] = {}
    for row in rows:
        ends = [float(row[end]) if row[end] else None for end in ("lo", "hi")]
        column = f"{row['key']} ({row['stage'].partition('@')[0]})"
        found.setdefault(column, {})[row["point"]] = Value(float(row["value"]), *ends)
    values = {column: tuple(by.get(point) for point in points) for column, by in found.items()}
    return Kept(path.stem, path.with_suffix(".md").read_text().partition("\n")[0], points, values)


def plot(path: Path, sweep: Sweep, rows: Sequence[Row]) -> None:
    """Small multiples: one panel a column, the points in their order, bars for the 95 % intervals.

    Raises:
        ValueError: nothing was measured.
    """
    rows = [row for row in rows if row.values is not None]
    shown = [i for i in range(len(sweep.columns)) if any(row.values[i].value is not None for row in rows)]
    if not shown:
        raise ValueError(f"sweep {sweep.name} has no measured value to draw; run its experiments first")
    across = min(PANELS_PER_ROW, len(shown))
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(3.4 * across, 2.5 * down + 0.4), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for panel, i in zip(panels, shown, strict=False):
        _draw(panel, sweep.columns[i], [(row.point.label, row.values[i]) for row in rows])
    for panel in list(figure.axes)[len(shown) :]:
        panel.set_axis_off()
    figure.suptitle(sweep.title, fontsize=11)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, metadata={"Software": None})


def _draw(panel, column: Column, values: Sequence[tuple[str, Value]]) -> None:
    """One panel: a point where there is a value, and a bar where it has an interval."""
    for x, (_, value) in enumerate(values):
        if value.value is None:
            continue
        if value.lo is not None and value.hi is not None:
            panel.plot([x, x], [value.lo, value.hi], color="tab:blue", alpha=0.5, linewidth=3, solid_capstyle="butt")
        panel.plot([x], [value.value], "o", color="tab:blue", markersize=5)
    known = [(x, value.value) for x, (_, value) in enumerate(values) if value.value is not None]
    panel.plot(*zip(*known, strict=True), color="tab:blue", linewidth=0.8, alpha=0.4)
    panel.set_xlim(-0.5, len(values) - 0.5)
    labels = [label for label, _ in values]
    long = sum(map(len, labels)) > 24
    panel.set_xticks(
        range(len(values)), labels, fontsize=8, rotation=30 if long else 0, ha="right" if long else "center"
    )
    panel.tick_params(axis="y", labelsize=8)
    panel.set_title(f"{column.key}  ({column.stage.partition('@')[0]})", fontsize=8)
    panel.grid(axis="y", linewidth=0.4, alpha=0.5)
