"""The comparison of runs as tables, and the checks that a run on a planted backbone makes of itself.

In the tables the CLS readout of a run is held against that of its reference (`references`), and its other readouts against
its own CLS. A figure is marked where the 95 % interval of that paired difference leaves out zero: ▲ better, ▼ worse.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

READOUTS = ("cls", "cls_reg", "cls_reg_learned", "cls_noise", "patch_mean")  # the rows of a run, as far as it has them
CLASSIFIERS = {"linear probe": None, "logistic regression": "logistic", "kNN": "knn"}
SMALLER_IS_BETTER = ("fpr95",)
SIGNS = ("+", "−", "±")
MARKS = {1: " ▲", -1: " ▼", 0: "  "}


@dataclass(frozen=True)
class Measured:
    """One run and the metrics files about it.

    Args:
        name: of the run.
        registers: `none`, `trained` or `test_time`.
        num_registers: how many of them.
        evaluate: `{readout: {id: {top1…}, ood: {dataset: {top1…}}, anomaly: {dataset: {detector: {auroc, fpr95…}}}}}`.
        identify: of the run's backbone.
        verify: the comparison with the model before planting, or `{planted: false}`.
        neurons: whose work the registers take over: `selected`, or a control.
        within: `{"<readout>-<base>": {…}}`, differences of its readouts to its own CLS (`evaluation.differences_within`).
        reference: name of the run that it is held against, if any.
        against: `{"<readout>-<readout>": {…}}`, differences to it (`evaluation.differences_between`).
    """

    name: str
    registers: str
    num_registers: int
    evaluate: Mapping
    identify: Mapping
    verify: Mapping
    neurons: str = "selected"
    within: Mapping = field(default_factory=dict)
    reference: str | None = None
    against: Mapping = field(default_factory=dict)

    @property
    def shown(self) -> tuple[str, ...]:
        """The readouts that have a row."""
        return tuple(name for name in READOUTS if name in self.evaluate)

    def difference(self, readout: str) -> Mapping:
        """What this readout is marked by: to the reference for the CLS readout, to the CLS readout for others."""
        pairs, other = (self.against, readout) if readout == "cls" else (self.within, "cls")
        return pairs.get(f"{readout}-{other}", {})


@dataclass(frozen=True)
class Table:
    """Cells as text; every row is as long as the header. `note` is said below."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def text(self) -> str:
        """For a terminal, in columns; numbers to the right."""
        lines = [self.header, *self.rows]
        widths = [max(_width(line[i]) for line in lines) for i in range(len(self.header))]
        right = self._numbers()

        def pad(cell: str, i: int) -> str:
            space = " " * (widths[i] - _width(cell))
            return space + cell if right[i] else cell + space

        body = ["  ".join(pad(cell, i) for i, cell in enumerate(line)).rstrip() for line in lines]
        lines = [self.title, body[0], "  ".join("-" * width for width in widths), *body[1:]]
        return "\n".join([*lines, *textwrap.wrap(self.note, 120)])

    def markdown(self) -> str:
        """For the README; numbers to the right."""
        lines = [[cell.strip().replace("|", "\\|") for cell in line] for line in (self.header, *self.rows)]
        lines.insert(1, ["--:" if side else "---" for side in self._numbers()])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{table}\n\n{self.note}" if self.note else table

    def _numbers(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(row[i][:1].isdigit() or row[i][:1] in SIGNS for row in self.rows) for i in range(len(self.header))]


@dataclass(frozen=True)
class Check:
    """One figure held to its limit; `value` is None where the metrics lack it, and then the check has failed."""

    subject: str
    what: str
    value: float | None
    low: float
    high: float

    @property
    def passed(self) -> bool:
        return self.value is not None and self.low <= self.value <= self.high

    @property
    def limit(self) -> str:
        """The limit in words: `= 1`, `≥ 0.95`, `≤ 0.02` or `0.005 to 0.03`."""
        if self.low == self.high:
            return f"= {self.low:g}"
        if self.low <= 0:
            return f"≤ {self.high:g}"
        return f"≥ {self.low:g}" if self.high >= 1 else f"{self.low:g} to {self.high:g}"

    def text(self) -> str:
        value = "missing" if self.value is None else f"{self.value:.4g}"
        return f"{'pass' if self.passed else 'FAIL'}  {self.subject}: {self.what} {value} ({self.limit})"


def accuracy_table(runs: Sequence[Measured], in_distribution: str, ood: Sequence[str]) -> Table:
    """A row a run and readout, accuracies in percent with 95 % intervals.

    Raises:
        ValueError: a run was not evaluated on one of the data sets; the message says which.
    """
    header = ("run", "readout", f"{in_distribution} top-1", *(f"{name} top-1" for name in ood))
    rows = []
    for run in runs:
        for readout in run.shown:
            paths = [("id",), *(("ood", name) for name in ood)]
            rows.append((run.name, readout, *(_cell(run, readout, path, "top1") for path in paths)))
    return Table("Accuracy, % [95 % interval]", header, tuple(rows), _marking(runs, True))


def classifier_table(runs: Sequence[Measured], in_distribution: str, ood: Sequence[str], readout: str = "cls") -> Table:
    """The same readout under each classifier that the runs have."""
    header = ("run", "classifier", f"{in_distribution} top-1", *(f"{name} top-1" for name in ood))
    rows = []
    for run in [run for run in runs if readout in run.evaluate]:
        for label, key in CLASSIFIERS.items():
            values = run.evaluate[readout] if key is None else run.evaluate[readout].get(key)
            if values is not None:
                accuracies = [values["id"], *(values["ood"][name] for name in ood)]
                rows.append((run.name, label, *(percent(each, "top1") for each in accuracies)))
    return Table(f"Other classifiers on the readout {readout}, accuracy, % [95 % interval]", header, tuple(rows))


def anomaly_table(runs: Sequence[Measured], anomaly: Sequence[str], detector: str) -> Table:
    """A row a run and readout: AUROC and FPR95 over all anomaly sets, each weighing the same, and FPR95 of each.

    Raises:
        ValueError: a run was not evaluated on one of the data sets; the message says which.
    """
    header = ("run", "readout", "mean AUROC", "mean FPR95", *(f"{name} FPR95" for name in anomaly))
    rows = []
    for run in runs:
        for readout in run.shown:
            mean = ("anomaly_mean", detector)
            row = [_cell(run, readout, mean, metric) for metric in ("auroc", "fpr95")]
            row += [_cell(run, readout, ("anomaly", name, detector), "fpr95") for name in anomaly]
            rows.append((run.name, readout, *row))
    return Table(f"Anomalies, % [95 % interval]; detector {detector}", header, tuple(rows), _marking(runs, True))


def detector_table(runs: Sequence[Measured], detectors: Sequence[str], readout: str = "cls") -> Table:
    """A row a detector, a column a run: mean AUROC over the anomaly sets."""
    runs = [run for run in runs if readout in run.evaluate]
    rows = [
        (detector, *(_cell(run, readout, ("anomaly_mean", detector), "auroc") for run in runs))
        for detector in detectors
    ]
    title = f"Mean AUROC of each detector on the readout {readout}, % [95 % interval]"
    return Table(title, ("detector", *(run.name for run in runs)), tuple(rows), _marking(runs, False))


def difference_table(runs: Sequence[Measured], in_distribution: str, detector: str) -> Table:
    """The paired differences by which figures are marked, over whole groups of data sets, with p-values."""
    rows = []
    for run in runs:
        for readout in run.shown:
            found = run.difference(readout)
            if not found:
                continue
            outer = readout == "cls"
            who = (f"{run.name} − {run.reference}" if outer else run.name, readout if outer else f"{readout} − cls")
            mean = found.get("anomaly_mean", {}).get(detector)
            lines = [(f"{in_distribution} top-1", found["id"], "top1"), ("ID + OOD top-1", found.get("pooled"), "top1")]
            lines += [("mean AUROC", mean, "auroc"), ("mean FPR95", mean, "fpr95")]
            rows += [(*who, what, points(values, key), _p(values[f"{key}_p"])) for what, values, key in lines if values]
    note = (
        "The same images, probe seeds and resamples on both sides. p: accuracy by a sign-flip permutation test of the images"
        " (exact McNemar for one seed), AUROC and FPR95 by the bootstrap; not corrected for the number of rows, so that"
        " 1 in 20 is below 0.05 by chance. All data sets and detectors:"
        " `metrics/differences.csv`, and within a run `metrics/evaluate/<run>/differences.json`."
    )
    title = f"Paired differences, percentage points [95 % interval]; detector {detector}"
    return Table(title, ("run", "readout", "what", "difference", "p"), tuple(rows), note if rows else "")


def _marking(runs: Sequence[Measured], others: bool) -> str:
    """What ▲ and ▼ mean in these rows, which may have other readouts than CLS."""
    held = [f"{run.name} against {run.reference}" for run in runs if run.reference and "cls" in run.shown]
    others = others and any(readout != "cls" for run in runs for readout in run.shown)
    against = ["cls: " + ", ".join(held)] if held else []
    against += ["other readouts: against cls of the same run"] if others else []
    if not against:
        return ""
    return f"▲ better, ▼ worse: the 95 % interval of the paired difference leaves out zero ({'; '.join(against)})."


def _cell(run: Measured, readout: str, path: tuple[str, ...], metric: str) -> str:
    """The figure, its interval and its mark."""
    difference = run.difference(readout)
    for step in path:
        difference = difference.get(step, {})
    return percent(_get(run, readout, *path), metric) + MARKS[_side(difference, metric)]


def _side(difference: Mapping, metric: str) -> int:
    """1 where it is better for sure, −1 where worse, 0 where zero is in the interval or nothing was compared."""
    if not difference:
        return 0
    sign = (difference[f"{metric}_lo"] > 0) - (difference[f"{metric}_hi"] < 0)
    return -sign if metric in SMALLER_IS_BETTER else sign


def outlier_table(runs: Sequence[Measured]) -> Table:
    """Outliers of each run and how near it is to its backbone before planting; `–` where there is nothing to compare."""
    header = (
        "run", "outlier patches, %", "neurons found", "CLS cosine", "patch_mean cosine", "patch cosine", "outlier patch cosine",
        "CLS attention on outliers",
    )  # fmt: skip
    keys = ("cls_cosine", "patch_mean_cosine", "patch_cosine", "outlier_patch_cosine", "cls_attention_on_outliers")
    rows = []
    for run in runs:
        fraction = outlier_fraction(run)
        row = [run.name, "none found" if fraction is None else f"{100 * fraction:.3f}"]
        row.append(str(run.identify["num_neurons"]))
        row += ["–" if run.verify.get(key) is None else ranged(run.verify, key) for key in keys]
        rows.append(tuple(row))
    return Table("Outliers, and the cosine to the model before planting", header, tuple(rows))


def control_table(identify: Mapping[str, Mapping]) -> Table:
    """What becomes of the outliers on the images of the search, in percent of the patches: the cure and its controls.

    Args:
        identify: metrics of the search by backbone; those without outliers get no row.
    """
    header = ("backbone", "untreated", "one register", "neurons silenced", "empty register", "random neurons moved")
    kinds = ("", "_after", "_ablated", "_empty", "_random")
    rows = [
        (name, *(ranged(found, f"outlier_fraction{kind}", 100, 2) for kind in kinds))
        for name, found in identify.items()
        if found["num_neurons"]
    ]
    note = (
        "The cure moves the register neurons into one test-time register; the last two columns are what must not cure."
    )
    return Table("Outlier patches left, %", header, tuple(rows), note if rows else "")


def ranged(values: Mapping, key: str, times: float = 1, digits: int = 3) -> str:
    """`0.901 [0.892–0.909]` from `key`, `key_lo` and `key_hi`."""
    value, low, high = (times * values[name] for name in (key, f"{key}_lo", f"{key}_hi"))
    return f"{value:.{digits}f} [{low:.{digits}f}–{high:.{digits}f}]"


def outlier_fraction(run: Measured) -> float | None:
    """Share of patches that are outliers in the run's own model; None where its backbone shows none.

    On held-out images where the run was held against the model before planting, else on the images of the search.
    """
    if not run.identify["outliers_found"]:
        return None
    if run.verify.get("outlier_fraction") is not None:
        return run.verify["outlier_fraction"]
    key = "outlier_fraction_after" if run.registers == "test_time" else "outlier_fraction"
    return run.identify.get(key)


def self_checks(runs: Sequence[Measured]) -> Iterator[Check]:
    """What has to hold on planted backbones, where the truth is known: found exactly, spoilt, and cured.

    With several registers each one is a further sink (FPR and cosines suffer, as measured), so the cure is held to its
    limits with one test-time register only.
    """
    for run in runs:
        if not run.verify.get("planted") or run.neurons != "selected":  # controls are not meant to cure
            continue
        if run.registers == "none":
            for key in ("precision", "recall"):
                yield Check(run.name, f"{key} of the register neurons", run.identify.get(key), 1, 1)
            limits = {
                "outlier_fraction": (0.005, 0.03),
                "cls_cosine": (-1, 0.93),
                "outlier_patch_cosine": (-1, 0.3),
                "cls_attention_on_outliers": (0.25, 1),
            }
        elif run.registers == "test_time" and run.num_registers == 1:
            limits = {
                "outlier_fraction": (0, 0.0002),
                "cls_cosine": (0.95, 1.0001),  # a cosine may round past 1
                "patch_cosine": (0.98, 1.0001),
                "cls_attention_on_outliers": (0, 0.02),
            }
        else:
            continue
        for key, (low, high) in limits.items():
            yield Check(run.name, key.replace("_", " ").replace("cls", "CLS"), run.verify.get(key), low, high)


def percent(values: Mapping, key: str) -> str:
    """`65.2 [61.0–69.1]` from the fractions `key`, `key_lo` and `key_hi`."""
    value, low, high = (100 * values[name] for name in (key, f"{key}_lo", f"{key}_hi"))
    return f"{value:.1f} [{low:.1f}–{high:.1f}]"


def points(values: Mapping, key: str) -> str:
    """`+1.2 [−0.3, +2.7]` from the fractions `key`, `key_lo` and `key_hi`."""
    value, low, high = (_signed(100 * values[name]) for name in (key, f"{key}_lo", f"{key}_hi"))
    return f"{value} [{low}, {high}]"


def _signed(value: float) -> str:
    rounded = f"{abs(value):.1f}"
    return ("±" if float(rounded) == 0 else "+" if value > 0 else "−") + rounded


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _get(run: Measured, readout: str, *path: str) -> Mapping:
    values = run.evaluate[readout]
    for step in path:
        if step not in values:
            raise ValueError(
                f"run {run.name!r} has no metrics for {readout}.{'.'.join(path)}: {step!r} is not among"
                f" {', '.join(values) or 'nothing'}; run `dvc repro`"
            )
        values = values[step]
    return values


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if not unicodedata.combining(c))
