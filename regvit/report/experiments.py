"""Experiments side by side: a row a measure, a column an experiment, and the difference of each to the first one.

A difference is paired where both have the values of each image: from the tables in metrics/, and from the predictions
that `evaluate` kept. Otherwise it is that of two independent figures a and b, whose 95 % interval is put together from
theirs (Zou & Donner 2008, "Construction of confidence limits about effect measures"),

    low  = a − b − √((a − a_low)² + (b_high − b)²)        high = a − b + √((a_high − a)² + (b − b_low)²)

which is wider than it needs to be where the images are the same, and never pretends to a pair. Such differences are marked †.
"""

from __future__ import annotations

import csv
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from matplotlib.figure import Figure

from regvit.files import replacing
from regvit.measures.evaluation import Drawn, Plan, compared
from regvit.report.compare import MARKS, SMALLER_IS_BETTER, Table
from regvit.report.comparisons import Measurements, Value, value_of
from regvit.report.measurements import number, patch_measures, show, show_change

UNPAIRED = " †"
PANELS, PER_ROW = 24, 4  # of the picture: at most, and side by side
COLOURS = {1: "tab:green", -1: "tab:red", 0: "tab:blue"}


@dataclass(frozen=True)
class Experiment:
    """What an experiment measured.

    Args:
        name: as it is shown.
        runs: metrics by the run's name.
        data: digest of each data set: images pair only where it is the same.
        digests: of the predictions from which each run's metrics were made.
        predictions: of the runs that have some at hand, resampled.
    """

    name: str
    runs: Mapping[str, Measurements]
    data: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    predictions: Mapping[str, Drawn] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """An experiment minus the first one; `paired`: image by image."""

    value: Value
    paired: bool


@dataclass(frozen=True)
class Row:
    """One measure of one run.

    Args:
        run, label, dataset: what is measured.
        scale, digits, better: as in `measurements.Measure`.
        values: one an experiment; None where it has none.
        changes: one for each experiment after the first.
    """

    run: str
    label: str
    dataset: str
    scale: float
    digits: int
    better: int
    values: tuple[Value | None, ...]
    changes: tuple[Change | None, ...]

    @property
    def differs(self) -> bool:
        """Whether some experiment has another figure than the first, or has one where the first has none."""
        return any(value != self.values[0] for value in self.values[1:])

    @property
    def decided(self) -> bool:
        """Whether the interval of some difference leaves out zero."""
        return any(change is not None and change.value.side for change in self.changes)


def compare_experiments(experiments: Sequence[Experiment], plan: Plan) -> list[Row]:
    """Every measure of every run that at least two experiments have.

    Args:
        experiments: the first one is what the others are held against.
        plan: data sets, the detector that is shown (its first one; predictions need no other), and the seed.
    Raises:
        ValueError: fewer than two experiments, or they share no run.
    """
    if len(experiments) < 2:
        raise ValueError(f"{len(experiments)} experiment is given; two or more can be compared")
    names = list(dict.fromkeys(name for each in experiments for name in each.runs))
    names = [name for name in names if sum(name in each.runs for each in experiments) > 1]
    if not names:
        known = "; ".join(f"{each.name}: {', '.join(each.runs) or 'none'}" for each in experiments)
        raise ValueError(f"no run is in two of the experiments, so nothing can be compared ({known})")
    plan = replace(plan, detectors=plan.detectors[:1])
    rows = []
    for name in names:
        rows += _patch_rows(name, experiments, plan)
        rows += _probe_rows(name, experiments, plan)
    return rows


def unpaired_difference(a: Value, b: Value) -> Value:
    """a − b of independent figures; without an interval where one of them has none."""
    middle = a.value - b.value
    if None in (a.lo, a.hi, b.lo, b.hi):
        return Value(middle)
    low = middle - math.hypot(a.value - a.lo, b.hi - b.value)
    return Value(middle, low, middle + math.hypot(a.hi - a.value, b.value - b.lo))


def _patch_rows(name: str, experiments: Sequence[Experiment], plan: Plan) -> Iterator[Row]:
    """What is measured on patches and attention."""
    runs = [each.runs.get(name) for each in experiments]
    for measure in patch_measures([run for run in runs if run], plan.in_distribution, plan.seed):
        values = [measure.of(run) if run else None for run in runs]

        def paired(i: int, measure=measure) -> Value | None:
            digests = [experiments[j].data.get(measure.dataset) for j in (0, i)]
            if digests[0] is None or digests[0] != digests[1]:
                return None
            return measure.across(runs[i], runs[0])

        changes = [_change(values[i], values[0], paired, i) for i in range(1, len(values))]
        if any(value is not None for value in values):
            about = (measure.label, measure.dataset, measure.scale, measure.digits, measure.better)
            yield Row(name, *about, tuple(values), tuple(changes))


def _probe_rows(name: str, experiments: Sequence[Experiment], plan: Plan) -> Iterator[Row]:
    """Accuracies and anomaly metrics of the readouts that have a row in the tables."""
    runs = [each.runs.get(name) for each in experiments]
    readouts = list(dict.fromkeys(readout for run in runs if run for readout in run.run.shown))
    detector = plan.detectors[0]
    drawn = [each.predictions.get(name) for each in experiments]
    for readout in readouts:
        gained = [_compared(each, drawn[0], readout, plan) for each in drawn]
        places = [("top-1", "top1", plan.in_distribution, ("id",))]
        places += [("top-1", "top1", dataset, ("ood", dataset)) for dataset in plan.ood]
        if plan.anomaly:
            places += [(f"mean {key.upper()}, {detector},", key, "anomalies", ("anomaly_mean", detector)) for key in ("auroc", "fpr95")]  # fmt: skip
        for what, key, dataset, path in places:
            values = [value_of(_at(run.run.evaluate if run else {}, readout, *path), key) for run in runs]

            def paired(i: int, key=key, path=path, gained=gained) -> Value | None:
                return value_of(_at(gained[i], *path), key)

            changes = [_change(values[i], values[0], paired, i) for i in range(1, len(values))]
            if any(value is not None for value in values):
                better = -1 if key in SMALLER_IS_BETTER else 1
                yield Row(name, f"{what} from {readout}, %", dataset, 100, 1, better, tuple(values), tuple(changes))


def _compared(a: Drawn | None, b: Drawn | None, readout: str, plan: Plan) -> Mapping:
    """Paired differences of two runs' predictions; empty where one has none, or they are of other images."""
    if a is None or b is None or a is b:
        return {}
    if any(readout not in each.predictions.readouts for each in (a, b)):
        return {}
    if a.predictions.digests != b.predictions.digests:
        return {}
    return compared(a, readout, b, readout, plan)


def _change(value: Value | None, first: Value | None, paired: Callable[[int], Value | None], i: int) -> Change | None:
    if value is None or first is None:
        return None
    found = paired(i)
    if found is None and value == first:  # figure and interval to the last digit: the same metrics
        found = Value(0.0, 0.0, 0.0, value.n)
    return Change(unpaired_difference(value, first), False) if found is None else Change(found, True)


def _at(values: Mapping, *path: str) -> Mapping:
    for step in path:
        values = values.get(step, {})
    return values


def experiment_table(experiments: Sequence[Experiment], rows: Sequence[Row], everything: bool = False) -> Table:
    """The rows as text.

    Args:
        everything: also the rows in which all experiments have the same figures.
    """
    shown = [row for row in rows if everything or row.differs]
    first, *others = [each.name for each in experiments]
    header = ("run", "measure", "data set", "n", first, *others, *(f"{name} − {first}" for name in others))
    lines = []
    for row in shown:
        values = [show(value, row.scale, row.digits) for value in row.values]
        counts = sorted({value.n for value in row.values if value is not None and value.n is not None})
        changes = [_show_change(change, row) for change in row.changes]
        lines.append((row.run, row.label, row.dataset, "–".join(map(str, counts)) or "–", *values, *changes))
    note = (
        "Brackets: 95 % intervals. ▲ better, ▼ worse where the interval of the difference leaves out zero; not corrected"
        " for the number of rows. Differences are paired, over the images for which both have a value;"
        " †: not paired, the interval is that of two independent figures."
    )
    if left_out := len(rows) - len(shown):
        note += f" {left_out} rows in which nothing differs are left out."
    return Table(f"Experiments against {first}", header, tuple(lines), note)


def _show_change(change: Change | None, row: Row) -> str:
    if change is None:
        return "–"
    if change.value.lo is None or change.value.hi is None:
        text = number(row.scale * change.value.value, row.digits, signed=True) + MARKS[0]
    else:
        text = show_change(change.value, row.scale, row.digits, row.better)
    return text.rstrip() + ("" if change.paired else UNPAIRED)


def write_rows(path: Path, experiments: Sequence[Experiment], rows: Sequence[Row]) -> None:
    """The rows as CSV, a line a figure: `run, measure, data_set, experiment, value, lo, hi, difference, …, paired`."""
    with replacing(path) as beside, open(beside, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        ends = ("value", "lo", "hi", "n", "difference", "difference_lo", "difference_hi", "paired")
        writer.writerow(["run", "measure", "data_set", "experiment", *ends])
        for row in rows:
            for each, value, change in zip(experiments, row.values, (None, *row.changes), strict=True):
                if value is None:
                    continue
                gained = [change.value.value, change.value.lo, change.value.hi, change.paired] if change else [None] * 4
                cells = (value.value, value.lo, value.hi, value.n, *gained)
                known = ("" if cell is None else cell for cell in cells)
                writer.writerow([row.run, row.label, row.dataset, each.name, *known])


def plot_experiments(path: Path, experiments: Sequence[Experiment], rows: Sequence[Row]) -> None:
    """Small multiples: a panel a row, a point an experiment with its interval; green where it is better for sure than the
    first one, red where it is worse. Rows that decide something come first; at most 24 are drawn.

    Raises:
        ValueError: in no row does anything differ.
    """
    rows = sorted((row for row in rows if row.differs), key=lambda row: not row.decided)[:PANELS]
    if not rows:
        raise ValueError("the experiments have the same figures everywhere: there is nothing to draw")
    across = min(PER_ROW, len(rows))
    down = math.ceil(len(rows) / across)
    names = [each.name for each in experiments]
    longest = max(map(len, names))
    slanted = longest * len(names) > 30  # characters that fit under a panel
    figure = Figure(figsize=(3.2 * across, (2.2 + 0.06 * longest * slanted) * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel, row in zip(panels, rows, strict=False):
        for x, (value, change) in enumerate(zip(row.values, (None, *row.changes), strict=True)):
            if value is None:
                continue
            colour = COLOURS[row.better * change.value.side if change else 0]
            middle, low, high = (None if v is None else row.scale * v for v in (value.value, value.lo, value.hi))
            if low is not None and high is not None:
                panel.vlines(x, low, high, color=colour, alpha=0.5, linewidth=3)
            panel.plot([x], [middle], "o", color=colour, markersize=5)
            if change is not None:
                said = _show_change(change, row).removesuffix(UNPAIRED).rstrip(" ▲▼")
                at = {"transform": panel.get_xaxis_transform(), "ha": "center", "va": "top", "fontsize": 6}
                panel.text(x, 0.98, said.replace(" [", "\n[") + (UNPAIRED if not change.paired else ""), **at)
        low, high = panel.get_ylim()
        panel.set_ylim(low, high + 0.25 * (high - low))  # room for the differences
        panel.set_xlim(-0.5, len(names) - 0.5)
        panel.set_xticks(
            range(len(names)), names, fontsize=7, rotation=30 if slanted else 0, ha="right" if slanted else "center"
        )
        panel.tick_params(axis="y", labelsize=7)
        panel.grid(axis="y", linewidth=0.4, alpha=0.5)
        panel.set_title(f"{row.label}\n{row.dataset}, {row.run}", fontsize=7)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    meaning = (
        f"Above: difference to {names[0]}. Green: better, red: worse, its 95 % interval leaves out zero. †: not paired."
    )
    figure.suptitle("\n".join(textwrap.wrap(meaning, 24 + 40 * (across - 1))), fontsize=8)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, metadata={"Software": None})
