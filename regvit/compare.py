"""The comparison of runs as tables, and the checks that a run on a planted backbone makes of itself."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

READOUTS = ("cls", "cls_reg", "patch_mean")  # the rows of a run, as far as it has them


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
    """

    name: str
    registers: str
    num_registers: int
    evaluate: Mapping
    identify: Mapping
    verify: Mapping


@dataclass(frozen=True)
class Table:
    """Cells as text; every row is as long as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """For a terminal, in columns; numbers to the right."""
        lines = [self.header, *self.rows]
        widths = [max(_width(line[i]) for line in lines) for i in range(len(self.header))]
        right = [any(row[i][:1].isdigit() for row in self.rows) for i in range(len(self.header))]

        def pad(cell: str, i: int) -> str:
            space = " " * (widths[i] - _width(cell))
            return space + cell if right[i] else cell + space

        body = ["  ".join(pad(cell, i) for i, cell in enumerate(line)).rstrip() for line in lines]
        return "\n".join([self.title, body[0], "  ".join("-" * width for width in widths), *body[1:]])

    def markdown(self) -> str:
        """For the README; numbers to the right."""
        right = [any(row[i][:1].isdigit() for row in self.rows) for i in range(len(self.header))]
        lines = [[cell.replace("|", "\\|") for cell in line] for line in (self.header, *self.rows)]
        lines.insert(1, ["--:" if side else "---" for side in right])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


def accuracy_table(
    runs: Sequence[Measured], in_distribution: str, ood: Sequence[str], anomaly: Sequence[str], detector: str
) -> Table:
    """Top-1 and anomaly detection, one row a run and readout, in percent with the 95 % interval.

    Args:
        runs: in the order of the rows.
        in_distribution, ood, anomaly: names of the data sets, in the order of the columns.
        detector: whose AUROC (mean over the anomaly sets) and FPR95 are shown.
    Raises:
        ValueError: a run has no metrics for a data set or the detector; the message says which.
    """
    header = ["run", "readout", f"{in_distribution} top-1"]
    header += [f"{name} top-1" for name in ood]
    header += ["mean AUROC"] * bool(anomaly) + [f"{name} FPR95" for name in anomaly]
    rows = []
    for run in runs:
        for readout in [name for name in READOUTS if name in run.evaluate]:
            values = run.evaluate[readout]
            sets = [_get(run, readout, "anomaly", name, detector) for name in anomaly]
            row = [run.name, readout, percent(values["id"], "top1")]
            row += [percent(_get(run, readout, "ood", name), "top1") for name in ood]
            if sets:
                row.append(f"{100 * sum(values['auroc'] for values in sets) / len(sets):.1f}")
            row += [percent(values, "fpr95") for values in sets]
            rows.append(tuple(row))
    title = f"Accuracy and anomalies, % [95 % interval]; detector {detector}"
    return Table(title, tuple(header), tuple(rows))


def outlier_table(runs: Sequence[Measured]) -> Table:
    """Outliers of each run and how near it is to its backbone before planting; `–` where there is nothing to compare."""
    header = (
        "run", "outlier patches, %", "neurons found", "CLS cosine", "patch cosine", "outlier patch cosine",
        "CLS attention on outliers",
    )  # fmt: skip
    keys = ("cls_cosine", "patch_cosine", "outlier_patch_cosine", "cls_attention_on_outliers")
    rows = []
    for run in runs:
        fraction = outlier_fraction(run)
        row = [run.name, "none found" if fraction is None else f"{100 * fraction:.3f}"]
        row.append(str(run.identify["num_neurons"]))
        row += ["–" if run.verify.get(key) is None else f"{run.verify[key]:.3f}" for key in keys]
        rows.append(tuple(row))
    return Table("Outliers, and the cosine to the model before planting", header, tuple(rows))


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
        if not run.verify.get("planted"):
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
